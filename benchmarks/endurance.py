"""Whether a server that runs guided prompts one after the other stays as it is: memory, time and open handles.

    python quickstart.py bench endurance [--quick] [--prompts N] [--json FILE]

One ComfyUI runs N guided prompts (500; 20 with --quick), of several methods in turn, each with a seed of its own. Its
history, in which it keeps 10 000 prompts, is cleared after each: it grows by some 10 kB a prompt. A row a prompt:
`workflow`, `seconds`, and of the server's process after it `rss_mb`, `handles` (open files and sockets) and `threads`.
Then a row a `slope`: what a prompt adds, by least squares over all but the first fifth, in which caches fill, with the
95 % interval of a bootstrap over rounds of all workflows. Seconds count relative to the median of their workflow. A
slope is noise where its interval holds 0; 20 prompts are too few to tell.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "demo"), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import psutil  # noqa: E402
from comfy_server import ComfyServer  # noqa: E402
from PIL import Image  # noqa: E402

WORKFLOWS = ("dsg", "checkpointing", "cond only", "time travel", "dps", "diffrgd", "tfg", "two losses")
SETTLING = 0.2
MEASURES = ("rss_mb", "relative_seconds", "handles", "threads")


def prompts(count: int, side: int, first_seed: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and prompt, the workflows in turn."""
    from prompts import DSG, LOW_PASS, PICTURE, combined, custom, dsg, empty, guided, node

    steps = {name: value for name, value in DSG.items() if name != "guidance_rate"} | {"gradient": "full"}

    def other(class_type: str, **settings: Any) -> dict[str, Any]:
        return {"sampler": node(class_type, sampler=["plain", 0], **steps, **settings)}

    travel = {"recurrence": 1, "recurrence_start": 0.3, "recurrence_end": 0.7}
    tfg = {"preset": "custom", "rho": 0.5, "mu": 0.5, "n_iter": 2, "n_recur": 1, "sigma_bar": 0.0, "samples": 1}
    large = node("SphereGuideLowPassLoss", image=PICTURE, factor=16)
    changes: dict[str, dict[str, Any]] = {
        "dsg": {"sampler": dsg(gradient="full")},
        "checkpointing": {"sampler": dsg(gradient="full", checkpointing=True)},
        "cond only": {"sampler": dsg(gradient="cond only")},
        "time travel": {"sampler": dsg(gradient="full", **travel)},
        "dps": other("SphereGuideDPS", step_size=0.3),
        "diffrgd": other("SphereGuideDiffRGD", step_size=5.0, iterations=1),
        "tfg": other("SphereGuideTFG", **tfg),
        "two losses": {"sampler": dsg(gradient="full"), "loss": combined(), "a": LOW_PASS, "b": large},
    }
    for i in range(count):
        name = WORKFLOWS[i % len(WORKFLOWS)]
        sample = custom(noise_seed=first_seed + i, cfg=3.0 if name == "cond only" else 1.0)
        yield name, guided(latent=empty(side), sample=sample, **changes[name])


def endured(server: ComfyServer, queue: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """A row for each prompt, in turn."""
    process = psutil.Process(server.process.pid)
    for i, (name, prompt) in enumerate(queue):
        seconds = server.run(prompt).seconds
        server.post("/history", {"clear": True})
        yield {"prompt": i, "workflow": name, "seconds": round(seconds, 4), **measured(process)}


def measured(process: psutil.Process) -> dict[str, Any]:
    handles = process.num_fds() if hasattr(process, "num_fds") else process.num_handles()
    return {"rss_mb": process.memory_info().rss / 2**20, "handles": handles, "threads": process.num_threads()}


def slopes(rows: list[dict[str, Any]], resamples: int = 1000) -> list[dict[str, Any]]:
    """A row a measure: what one prompt adds to it, with the ends of its 95 % interval."""
    medians = {
        name: statistics.median(row["seconds"] for row in rows if row["workflow"] == name)
        for name in {row["workflow"] for row in rows}
    }
    settled = [
        {**row, "relative_seconds": row["seconds"] / medians[row["workflow"]]}
        for row in rows[int(SETTLING * len(rows)) :]
    ]
    rng, found = np.random.default_rng(0), []
    rounds = np.array_split(np.arange(len(settled)), max(2, len(settled) // len(WORKFLOWS)))
    place = np.array([row["prompt"] for row in settled], dtype=float)
    for measure in MEASURES:
        values = np.array([row[measure] for row in settled], dtype=float)
        slope, level = np.polyfit(place, values, 1)
        # What is left of a line is resampled by rounds: neighbours share what the machine did at that time.
        line, rest = slope * place + level, values - slope * place - level
        drawn = []
        for _ in range(resamples):
            chosen = np.concatenate([rest[rounds[i]] for i in rng.integers(len(rounds), size=len(rounds) + 1)])
            drawn.append(np.polyfit(place, line + chosen[: len(place)], 1)[0])
        low, high = np.percentile(drawn, (2.5, 97.5))
        numbers = {"value": slope, "low": low, "high": high, "mean": values.mean()}
        numbers = {name: round(float(number), 9) for name, number in numbers.items()}  # a constant has a slope of 0
        found.append({"slope": measure, **numbers, "n": len(settled)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 prompts")
    parser.add_argument("--prompts", type=int, help="how many (500)")
    parser.add_argument("--json", type=Path, help="where to write the rows; a plot goes beside it")
    options = parser.parse_args()
    count, side = options.prompts or (20 if options.quick else 500), 128

    from bootstrap import import_host, import_pack

    import_host(cpu=False)
    import_pack()
    from result import Result
    from sphereguide.demo import portraits
    from sphereguide.demo.run import device

    # A server's prompts are one run: an interrupted one begins anew.
    result = Result("endurance", {"prompts": count, "side": side, "steps": 2}, options.json)
    result.rows.clear()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sphereguide-endurance-", ignore_cleanup_errors=True) as base:
        server = ComfyServer(Path(base), device=device())
        Image.fromarray(portraits.render(portraits.TEST_SEEDS[0])).save(server.input / "portrait.png")
        with server:
            for row in endured(server, prompts(count, side)):
                rows.append(row)
                if row["prompt"] % max(1, count // 20) == 0:
                    print(
                        f"{row['prompt'] + 1:4} of {count}  {row['seconds']:6.2f} s  {row['rss_mb']:7.1f} MB  "
                        f"{row['handles']:3} handles  {row['threads']:3} threads",
                        flush=True,
                    )
    found = slopes(rows)
    for row in found:
        print(f"{row['slope']:16} {row['value']:+.4f} a prompt, {row['low']:+.4f} to {row['high']:+.4f}")
    result.rows += [*rows, *found]
    result.finish(draw)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure
    from result import save

    rows = [row for row in rows if "prompt" in row]
    figure = Figure(figsize=(12, 3.6), dpi=110, layout="constrained")
    titles = {"rss_mb": "memory of the server, MB", "seconds": "seconds", "handles": "open handles"}
    for axes, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for workflow in WORKFLOWS if name == "seconds" else (None,):
            of = [row for row in rows if workflow in (None, row["workflow"])]
            axes.plot([row["prompt"] for row in of], [row[name] for row in of], linewidth=1, label=workflow)
        axes.set(title=title, xlabel="prompt", ylim=(0, None))
        if name == "seconds":
            axes.legend(fontsize=6)
    save(figure, path)


if __name__ == "__main__":
    main()
