"""Writes `benchmarks/README.md`, the page of results, from `benchmarks/results/`: `python benchmarks/page.py`.

Every number there is one of a result's, so that none can be older than what it is taken from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from result import interval

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = RESULTS.parent / "README.md"

HEAD = """# Results

What `benchmarks/results/` holds, a section for each claim: written by `python benchmarks/page.py`, and a test holds it
to the files. Each command makes the file anew; `--quick` shows that it runs. Interrupted runs go on where they were.
What is measured and how stands at the top of each benchmark.
"""

Row = dict[str, Any]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bracketed(interval: Sequence[float], digits: int) -> str:
    low, high = interval
    return f"[{low:.{digits}f}, {high:.{digits}f}]"


def lead(values: Sequence[float], others: Sequence[float], digits: int) -> str:
    """How far the mean is ahead of the others', of the same samples, with 95 % of the bootstrap of pairs."""
    difference = np.subtract(values, others)
    return f"{difference.mean():+.{digits}f} {bracketed(interval(difference), digits)}"


def demo(result: dict[str, Any]) -> Iterator[str]:
    """Guidance restores and steers: the demo's workflows, in a running ComfyUI"""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    rows = []
    for name, run in result["workflows"].items():
        measure = "psnr" if "psnr_guided" in run else "score"
        degraded, off, on = (run.get(f"{measure}_{stage}", []) for stage in ("degraded", "unguided", "guided"))
        digits = 1 if measure == "psnr" else 2
        title = "PSNR, dB" if measure == "psnr" else run["score"]
        means = [f"{mean(values):.{digits}f}" if values else "" for values in (degraded, off, on)]
        rows.append((name, title, *means, str(len(on))))
    yield table(("workflow", "measured", "degraded, enlarged", "unguided", "guided", "pictures"), rows)


def guidance(result: dict[str, Any]) -> Iterator[str]:
    """What steering achieves against strength, and what it costs in quality"""
    rows = [
        (
            row["task"],
            row["method"] if row["strength"] else "unguided",
            f"{row['strength']:g}",
            f"{row['success']:.3f} {bracketed(row['interval'], 3)}",
            f"{row['frechet']:.3f}",
            str(row["nfe"]),
            str(row["n"]),
        )
        for row in result["rows"]
        if "task" in row
    ]
    for row in result["rows"]:
        if row.get("settings") == "reference":
            yield f"As many real portraits have a Fréchet distance of {row['frechet']:.3f}.\n\n"
    yield "Success: attributes found (text), mIoU (segmentation), Gram distance (style: lower is better), the share "
    yield "that is verified at a false acceptance rate of 1 % (face).\n\n"
    yield table(("task", "method", "strength", "success, 95 %", "Fréchet distance", "calls", "n"), rows)
    others = ("DPS", "FreeDoM", "TFG", "DiffRGD")
    compared = []
    for task in dict.fromkeys(row["task"] for row in result["rows"] if "task" in row):
        best = {
            method: max(
                (row for row in result["rows"] if row.get("task") == task and row["method"] == method),
                key=lambda row: np.mean(row["score"]),
            )
            for method in ("DSG", *others)
        }
        over = (lead(best["DSG"]["score"], best[method]["score"], 3) for method in others)
        shown = (f"{row['success']:.3f}, {row['frechet']:.3f} ({row['strength']:g})" for row in best.values())
        compared.append((task, *shown, *over))
    yield "\n\nEach method at the strength with the highest mean score (for a face the cosine of the identities, for a "
    yield "style the negative distance): success, Fréchet distance, strength. On the right DSG's score less theirs, of "
    yield "the same samples, 95 %.\n\n"
    yield table(("task", "DSG", *others, *(f"DSG over {method}" for method in others)), compared)


def inverse(result: dict[str, Any]) -> Iterator[str]:
    """What guidance restores from measurements that say nearly all, with published and with tuned settings"""

    def quality(row: Row) -> tuple[str, ...]:
        psnr = f"{row['psnr']:.2f} {bracketed(row['psnr_interval'], 2)}"
        return f"{row['strength']:.3g}", psnr, f"{row['ssim']:.3f}", f"{row['frechet']:.3f}"

    measured = [row for row in result["rows"] if "psnr_interval" in row]
    tasks = list(dict.fromkeys(row["task"] for row in measured))
    measured.sort(key=lambda row: (tasks.index(row["task"]), -row["nfe"]))  # what a later run has added
    dsg = {
        (row["task"], row["nfe"], row["n"], row["settings"]): row["each"] for row in measured if row["method"] == "DSG"
    }

    def over(row: Row, settings: str) -> str:
        """PSNR less that of DSG with as many calls, of the same portraits."""
        base = dsg.get((row["task"], row["nfe"], row["n"], settings))
        if base is None or row["method"] == "unguided":
            return ""
        return lead(row["each"], base, 2) if row["each"] != base else ""

    def off_shell(row: Row) -> str:
        return "" if row["off_shell"] is None else f"{row['off_shell']:.0%}"

    rows = [
        (
            *(str(row[key]) for key in ("task", "nfe", "method", "settings")),
            *quality(row),
            over(row, "published"),
            over(row, "tuned"),
            off_shell(row),
            str(row["n"]),
        )
        for row in measured
        if row["settings"].split()[0] in ("none", "published", "tuned")
    ]
    columns = ("task", "calls", "method", "settings", "strength", "PSNR, dB", "SSIM", "Fréchet", "over DSG, published")
    yield table((*columns, "over DSG, tuned", "off the shell", "n"), rows)
    references = {row["method"]: row for row in result["rows"] if row["settings"] == "reference"}
    if references:
        yield f"\n\nThe originals themselves have a Fréchet distance of {references['originals']['frechet']:.3f}; what "
        yield f"the autoencoder makes of them has {references['autoencoder']['frechet']:.3f}, and "
        yield f"{references['autoencoder']['psnr']:.2f} dB."
    degraded = [row for row in result["rows"] if row["method"] == "degraded"]
    if degraded:
        found = (f"{row['task']} {row['psnr']:.2f} dB and {row['frechet']:.3f}" for row in degraded)
        yield " The degraded pictures, enlarged by bicubic interpolation, with 0 for missing pixels: "
        yield f"{'; '.join(found)}."
    rows = [
        (
            *(str(row[key]) for key in ("task", "nfe", "sampler", "schedule", "method")),
            *quality(row),
            str(row["n"]),
        )
        for row in measured
        if row["settings"] == "few"
    ]
    if rows:
        yield "\n\nFew steps, DSG with tuned rates of each step:\n\n"
        columns = ("task", "calls", "sampler", "schedule", "method", "strength", "PSNR, dB", "SSIM", "Fréchet", "n")
        yield table(columns, rows)
    rows = [
        (f"{row['strength']:g}", f"{row['diversity']:.4f}", f"{row['psnr']:.2f}")
        for row in result["rows"]
        if row["settings"] == "diversity"
    ]
    if rows:
        yield "\n\nDSG, pictures of one measurement and different noise:\n\n"
        yield table(("guidance_rate", "RMS distance between them", "PSNR, dB"), rows)


def inverse_open(result: dict[str, Any]) -> Iterator[str]:
    """What guidance restores where the measurement leaves most to the model"""
    yield from inverse(result)


def inverse_many(result: dict[str, Any]) -> Iterator[str]:
    """The same with 1000 steps"""
    yield from inverse(result)


def auto_strength(determined: dict[str, Any], left: dict[str, Any], guidance: dict[str, Any]) -> Iterator[str]:
    """Whether auto_strength spares looking for a guidance_rate"""
    gains: dict[str, dict[str, np.ndarray]] = {}
    for result, score in ((determined, "each"), (left, "each"), (guidance, "score")):
        for row in result["rows"]:
            compared = row.get("settings", "grid") in ("grid", "none") and row["nfe"] == 50 and score in row
            if compared and row["method"] in ("unguided", "DSG", "DSG auto"):
                name = "auto" if row["method"] == "DSG auto" else f"{row['strength']:g}"
                gains.setdefault(row["task"], {})[name] = np.array(row[score])
    for of_task in gains.values():
        unguided = of_task.pop("0")
        for name in of_task:
            of_task[name] = of_task[name] - unguided
    rates = sorted(name for name in next(iter(gains.values())) if name != "auto")
    names = [*rates, "auto"]
    generator = np.random.default_rng(0)
    again, shares, rows, picked = [], [], [], {}

    def line(task: str, best: str, shares: Sequence[float], again: np.ndarray, count: str) -> tuple[str, ...]:
        ends = np.quantile(again[-1], (0.025, 0.975))
        return task, best, *(f"{share:.0%}" for share in shares), bracketed(100 * ends, 0) + " %", count

    for task, of_task in gains.items():
        means = {name: gain.mean() for name, gain in of_task.items()}
        best = max(rates, key=means.__getitem__)
        count = len(of_task[best])
        if count not in picked:  # tasks of as many samples share them
            picked[count] = generator.integers(count, size=(2000, count))
        picks = picked[count]
        # [names, 2000]: the share of the best rate's gain that each reaches, of the same samples
        again.append(np.stack([of_task[name][picks].mean(1) / of_task[best][picks].mean(1) for name in names]))
        shares.append([means[name] / means[best] for name in names])
        rows.append(line(task, best, shares[-1], again[-1], str(count)))
    mean, mean_again = np.mean(shares, 0), np.mean(again, 0)
    rows.append(line("mean", "", mean, mean_again, ""))
    yield "What 50 steps of DSG gain over unguided ones, with one guidance_rate for all tasks or with auto_strength "
    yield "1, as a share of what the task's best rate gains. Measured is PSNR, and where networks guide, each sample's "
    yield "score.\n\n"
    yield table(("task", "best rate", *names, "auto, 95 %", "n"), rows)
    single = int(np.argmax(mean[:-1]))
    ends = np.quantile(mean_again[-1] - mean_again[single], (0.025, 0.975))
    yield f"\n\nauto less the best single rate, {names[single]}: "
    yield f"{100 * (mean[-1] - mean[single]):+.1f} {bracketed(100 * ends, 1)} percentage points."


def posterior(result: dict[str, Any]) -> Iterator[str]:
    """How near guided samples come to the exact posterior, on Gaussian mixtures"""
    keys = ("floor", "mean_error", "std_ratio", "weights", "off_shell")

    def between(found: Sequence[float] | None) -> str:
        return f" [{found[0]:.3f}, {found[1]:.3f}]" if found else ""

    rows = [
        (
            *(str(row[key]) for key in ("task", "dim", "steps", "method")),
            f"{row['strength'] or 0:.3g}",
            str(row["nfe"]),
            f"{row['wasserstein']:.3f}{between(row.get('wasserstein_interval'))}",
            *(f"{row[key]:.3f}" for key in keys),
        )
        for row in result["rows"]
    ]
    columns = ("task", "dimensions", "steps", "method", "strength", "calls", "sliced Wasserstein, 95 %", "its floor")
    yield table((*columns, "error of the mean", "std over the exact", "error of the weights", "off the shell"), rows)


def epsilon_scaling(result: dict[str, Any]) -> Iterator[str]:
    """What Epsilon Scaling gains, and whether its calibration knows"""

    def distance(row: Row) -> str:
        b = row["correction"] if row["k"] else f"{row['b'] or 1:.4g}"
        return f"{row['frechet']:.3f} ± {row['frechet_se']:.3f}" + (f" ({b})" if row["b"] else "")

    rows = []
    for key in dict.fromkeys((row["model"], row["sampler"], row["steps"]) for row in result["rows"]):
        cell = {r["correction"]: r for r in result["rows"] if (r["model"], r["sampler"], r["steps"]) == key}
        none, chosen = cell["none"], cell[cell["uniform"]["verdict"]]
        grid = [row for name, row in cell.items() if name.startswith("b ")]
        best = min((none, *grid), key=lambda row: row["frechet"])
        over = f"{chosen['frechet'] / best['frechet'] - 1:+.1%}"
        rows.append((*map(str, key), distance(none), distance(chosen), distance(best), over, str(none["n"])))
    columns = ("model", "sampler", "steps", "none", "calibrated (b)", "the grid's best (b)", "over the best", "n")
    yield "Fréchet distance with its standard error.\n\n"
    yield table(columns, rows)


def amed(result: dict[str, Any]) -> Iterator[str]:
    """Learned solvers for few model calls, beside every stock sampler"""
    most = max(row["n"] for row in result["rows"] if "n" in row)
    rows = [row for row in result["rows"] if row.get("n") == most]
    stock = any("over_stock" in row for row in rows)

    def over(row: Row, name: str, nearer: str) -> list[str]:
        if nearer not in row:
            return [""] * 3
        ratios = (
            f"{row[key]:.2f} {bracketed(row[f'{key}_interval'], 2)}" for key in (f"over_{name}", f"mean_over_{name}")
        )
        return [*ratios, f"{row[nearer]:.0%}"]

    yield "RMSE to 200 steps of Heun's method over all trajectories, and the median of that of each.\n\n"
    yield table(
        (
            "calls",
            "solver",
            "schedule",
            "RMSE",
            "median",
            "RMSE over iPNDM alone",
            "mean over iPNDM alone",
            "nearer",
            *(("RMSE over stock", "mean over stock", "nearer") if stock else ()),
            "Fréchet distance",
            "training",
        ),
        (
            (
                str(row["nfe"]),
                ("AMED, " if row["learned"] else "") + row["solver"] + (", AFS" if row["nfe"] % 2 else ""),
                row["schedule"],
                f"{row['rmse']:.4f} ± {row['rmse_se']:.4f}",
                f"{row['median']:.4f}",
                *over(row, "student", "nearer_than_student" if "nearer_than_student" in row else "nearer"),
                *(over(row, "stock", "nearer_than_stock") if stock else ()),
                f"{row['frechet']:.3f} ± {row['frechet_se']:.3f}" if "frechet" in row else "",
                f"{row['train_seconds']:.0f} s" if row["learned"] else "",
            )
            for row in sorted(rows, key=lambda row: (row["nfe"], row["rmse"]))
        ),
    )
    for row in result["rows"]:
        if row["solver"] == "overhead":
            yield f"\n\nThe predictor and its look at the bottleneck take {row['predictor']:.2%} of a model call's "
            yield f"time; all that the run does outside of the calls, {row['over_euler']:.2%} more than euler does."


def cost(result: dict[str, Any]) -> Iterator[str]:
    """What a guided step costs, over an unguided one"""
    rows = [
        (
            row["model"],
            row["kind"],
            row["gradient"] or "",
            f"{row['cfg']:g}",
            str(row["interval"]),
            "yes" if row["checkpointing"] else "",
            f"{row['decode_scale']:g}",
            f"{row['step_ratio']:.2f}",
            f"{row['peak_memory_mb']:.0f} MB",
        )
        for row in result["rows"]
    ]
    columns = ("model", "kind", "gradient", "cfg", "interval", "checkpointing", "decode_scale", "time", "peak memory")
    yield table(columns, rows)


def endurance(result: dict[str, Any]) -> Iterator[str]:
    """Whether a server stays as it is under one guided prompt after the other"""
    titles = {
        "rss_mb": "memory, MB",
        "relative_seconds": "time, of the workflow's median",
        "handles": "open handles",
        "threads": "threads",
    }
    rows = [
        (
            titles[row["slope"]],
            f"{row['mean']:.4g}",
            f"{100 * row['value']:+.3g} [{100 * row['low']:+.3g}, {100 * row['high']:+.3g}]",
            str(row["n"]),
        )
        for row in result["rows"]
        if "slope" in row
    ]
    count, kinds = (len({row[name] for row in result["rows"] if name in row}) for name in ("prompt", "workflow"))
    yield f"{count} prompts of {kinds} workflows in turn. The first fifth, in which caches fill, is left out; a slope "
    yield "is noise where its interval holds 0.\n\n"
    yield table(("of the server", "mean", "what 100 prompts add, 95 %", "n"), rows)


SECTIONS: tuple[tuple[Callable[..., Iterator[str]], tuple[str, ...]], ...] = (
    (demo, ("demo_report",)),
    (guidance, ("guidance",)),
    (inverse, ("inverse",)),
    (inverse_open, ("inverse_open",)),
    (inverse_many, ("inverse_many",)),
    (auto_strength, ("inverse", "inverse_open", "guidance")),
    (posterior, ("posterior",)),
    (epsilon_scaling, ("epsilon_scaling",)),
    (amed, ("amed",)),
    (cost, ("cost",)),
    (endurance, ("endurance",)),
)
"""What is shown, and the results that it is of."""


def page() -> str:
    """Of the results that there are."""
    parts = [HEAD]
    for section, names in SECTIONS:
        files = [RESULTS / f"{name}.json" for name in names]
        if not all(file.exists() for file in files):
            continue
        results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        about = []
        for name, file in zip(names, files, strict=True):
            bench = name.replace("_open", " --open").replace("_many", " --many")
            made = "demo" if section is demo else f"bench {bench} --json benchmarks/results/{file.name}"
            about += [f"`python quickstart.py {made}`", f"[{file.name}](results/{file.name})"]
            if (plot := file.with_suffix(".png")).exists():
                about.append(f"[plot](results/{plot.name})")
        host = results[0]["host"]
        about.append(f"ComfyUI {host['comfyui']}, torch {host.get('torch') or results[0]['machine']['torch']}")
        parts.append(f"\n## {section.__doc__}\n\n{' · '.join(about)}\n\n")
        parts.append("".join(section(*results)) + "\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
