"""What Epsilon Scaling gains, where, and whether its calibration knows.

    python quickstart.py bench epsilon_scaling [--quick] [--json FILE] [--models ...] [--samplers ...] [--steps ...]

Fréchet distance of a judge's features, which nothing was trained on, between samples and portraits of the test seeds.
For each model, sampler and number of steps: no correction; what **Calibrate Epsilon Scaling** finds from 128 samples
and 256 portraits of the validation seeds, uniform, linear, measured, or that the correction stays off; and uniform b on
a grid, from there upwards or downwards for as long as the distance falls. All cells share their seeds, and `gain` is
the distance without correction less that with it, with the standard error of the bootstrap over pairs.

ddpm is not among the samplers: its steps are those of euler_ancestral (tests/test_epsilon.py).
The models are the one that ships and the checkpoint half-way through its training, which the repository's history has.
Core's node `Epsilon Scaling` is uniform, and the same as ours for this kind of model (tests/test_epsilon.py).
"""

from __future__ import annotations

import argparse
import functools
import os
import pickle
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "demo"), str(ROOT / "benchmarks")]
from bootstrap import import_host, import_pack  # noqa: E402

import_host(cpu=False, pytorch_attention=True)
import_pack()

import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from judged import features_of, real_features  # noqa: E402
from processes import processes  # noqa: E402
from result import Result, save  # noqa: E402
from sphereguide.demo import judge as judging  # noqa: E402
from sphereguide.demo import portraits, toy_portraits  # noqa: E402
from sphereguide.samplers.calibration import Calibration, calibrate  # noqa: E402
from sphereguide.samplers.epsilon import EpsilonScaling, EpsilonSchedule, with_post_cfg  # noqa: E402
from torch import Tensor  # noqa: E402

HALF_TRAINED = "d5583e8"
"""The commit of the first weights: 48 000 samples, less than half of the training."""
PLAN = (
    *(("shipped", name, 10) for name in ("euler", "euler_ancestral", "heun")),
    ("shipped", "euler", 20),
    *(("half-trained", name, 10) for name in ("euler_ancestral", "euler")),
    *(("shipped", name, 20) for name in ("euler_ancestral", "heun")),
    *(("shipped", name, 50) for name in ("euler", "euler_ancestral", "heun")),
)
GRID = (0.95, 0.98, 1.0, 1.02, 1.05, 1.08, 1.11, 1.14, 1.17, 1.2)
FITTED = ("uniform", "linear", "measured")
DETAILED = (("shipped", "euler", 10), ("shipped", "euler_ancestral", 10))
"""Where all shapes are measured, not only the one that the calibration names, and the paper's λ, the ratio itself."""
FROM_ONE = DETAILED[:1]
"""Where the grid starts at 1, and not at what the calibration found."""
CHUNK = 40
CALIBRATED_WITH = 128


@dataclass(frozen=True)
class Cell:
    model: str
    sampler: str
    steps: int
    correction: str


def weights(model: str) -> Path:
    """The folder of the model's weights; those of an earlier commit are taken out of the history."""
    if model == "shipped":
        return toy_portraits.WEIGHTS
    folder = Path(tempfile.gettempdir()) / f"sphereguide-{HALF_TRAINED}"
    folder.mkdir(exist_ok=True)
    for name in (toy_portraits.UNET_FILE, toy_portraits.CLIP_FILE):
        if not (folder / name).exists():
            command = ["git", "-C", str(ROOT), "show", f"{HALF_TRAINED}:demo/weights/{name}"]
            content = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            part = folder / f"{name}.{os.getpid()}"
            part.write_bytes(content)
            part.replace(folder / name)
    return folder


@functools.cache
def loaded(model: str) -> tuple[Any, Any, Any]:
    """MODEL, the empty prompt, VAE. As a node would do it: in inference mode."""
    with torch.inference_mode():
        clip = toy_portraits.load_clip(weights(model))
        empty = [[clip.encode_from_tokens(clip.tokenize(""), return_pooled=True)[0], {}]]
        return toy_portraits.load_model(weights(model)), empty, toy_portraits.load_vae()


def sigmas(model: str, steps: int) -> Tensor:
    return comfy.samplers.calculate_sigmas(loaded(model)[0].model.model_sampling, "normal", steps)


def features(cell: Cell, schedule: EpsilonSchedule | None, start: int) -> Tensor:
    """What the judge sees in the samples `start` to `start + CHUNK`, [CHUNK, 96]."""
    model, empty, _ = loaded(cell.model)
    with torch.inference_mode():
        latent = torch.zeros(CHUNK, 4, 16, 16)
        noise = comfy.sample.prepare_noise(latent, start)
        used = comfy.samplers.sampler_object(cell.sampler)
        if schedule is not None:
            used = with_post_cfg(used, EpsilonScaling(lambda _: schedule))
        at = sigmas(cell.model, cell.steps)
        out = comfy.sample.sample_custom(
            model, noise, 1.0, used, at, empty, empty, latent, disable_pbar=True, seed=start
        )
    return features_of(out)


def calibrated(model: str, name: str, steps: int, samples: int) -> Calibration:
    """What the node finds, from portraits that nothing was trained on."""
    patcher, empty, vae = loaded(model)
    with torch.inference_mode():
        pictures = np.stack([portraits.render(seed) for seed in portraits.VALIDATION_SEEDS[: 2 * samples]])
        latents = vae.encode(torch.from_numpy(pictures).float() / 255)
        guider = comfy.samplers.CFGGuider(patcher)
        guider.set_conds(empty, empty)
        guider.set_cfg(1.0)
        sampler = comfy.samplers.sampler_object(name)
        return calibrate(guider, sampler, sigmas(model, steps), latents, samples, 32)


def kept_calibration(path: Path, *cell: Any) -> Calibration:
    if not path.exists():
        path.write_bytes(pickle.dumps(calibrated(*cell)))
    return pickle.loads(path.read_bytes())


def distances(found: np.ndarray, none: np.ndarray, real: Tensor) -> dict[str, float]:
    """Fréchet distance of `found`, what it is below that of `none`, `[N, 96]` of the same seeds; standard errors."""

    def both(of: np.ndarray) -> tuple[float, float]:
        distance, without = (judging.frechet(torch.from_numpy(group[of]), real) for group in (found, none))
        return distance, without - distance

    rng, everything = np.random.default_rng(0), np.arange(len(found))
    errors = np.std([both(rng.integers(len(found), size=len(found))) for _ in range(50)], 0)
    values = (*both(everything), *errors)
    return {
        name: round(float(v), 4) for name, v in zip(("frechet", "gain", "frechet_se", "gain_se"), values, strict=True)
    }


class Bench:
    def __init__(
        self,
        result: Result,
        pool: ProcessPoolExecutor,
        count: int,
        values: Sequence[float],
        quick: bool = False,
    ) -> None:
        self.result, self.pool, self.count, self.values = result, pool, count, sorted(values)
        self.real = real_features(1000, quick)

    def features(self, cell: Cell, schedule: EpsilonSchedule | None) -> np.ndarray:
        """Of all samples of a cell, `[N, 96]`: from the disk, where an interrupted run left them."""
        factors = zlib.crc32(repr(schedule).encode())  # those that are fitted may change with the code
        path = self.result.folder / ("_".join(map(str, [*asdict(cell).values(), self.count, factors])) + ".npy")
        if not path.exists():
            starts = range(0, self.count, CHUNK)
            jobs = [self.pool.submit(features, cell, schedule, start) for start in starts]
            np.save(path, torch.cat([job.result() for job in jobs]).numpy()[: self.count])
        return np.load(path)

    def row(self, cell: Cell, factors: np.ndarray | None = None, **more: Any) -> float:
        """The distance with λ = `factors` at the steps, or without a correction."""
        row = self.result.find(asdict(cell))
        if row is None:
            steps = sigmas(cell.model, cell.steps)[:-1].tolist()
            schedule = None
            if factors is not None:
                schedule = EpsilonSchedule(tuple(steps[::-1]), tuple(factors[::-1].tolist()))
            found = self.features(cell, schedule)
            none = self.features(Cell(cell.model, cell.sampler, cell.steps, "none"), None)
            k = None if factors is None else float(factors[0] - factors[-1]) / (len(factors) - 1)
            row = {
                **asdict(cell),
                "b": None if factors is None else round(float(factors[-1]), 5),
                "k": None if k is None else round(k, 6),
                **distances(found, none, self.real),
                "n": self.count,
                **more,
            }
            self.result.add(row)
        name = f"{cell.model:13}{cell.sampler:16}{cell.steps:4}  {cell.correction:12}"
        print(f"{name}{row['b'] or 1:8.4f}{row['frechet']:9.4f}{row['gain']:+9.4f} ±{row['gain_se']:7.4f}", flush=True)
        return float(row["frechet"])

    def grid(self, model: str, name: str, steps: int, start: float) -> None:
        """Uniform b from the value of the grid next to `start`, upwards or else downwards while the distance falls."""
        begin = min(range(len(self.values)), key=lambda i: abs(self.values[i] - start))
        first = self.uniform(model, name, steps, self.values[begin])
        for neighbours in (self.values[begin + 1 :], self.values[:begin][::-1]):
            best = first
            for b in neighbours:
                found = self.uniform(model, name, steps, b)
                if found >= best:
                    break
                best = found
            if best < first:
                break

    def uniform(self, model: str, name: str, steps: int, b: float) -> float:
        if b == 1:
            return self.row(Cell(model, name, steps, "none"))
        return self.row(Cell(model, name, steps, f"b {b:g}"), np.full(steps, b))

    def calibration(self, model: str, name: str, steps: int) -> Future[Calibration]:
        """What the node finds: in the background, and from the disk, where an interrupted run left it."""
        path = self.result.folder / f"calibration_{model}_{name}_{steps}.pickle"
        return self.pool.submit(kept_calibration, path, model, name, steps, min(CALIBRATED_WITH, self.count // 4))

    def cell(self, model: str, name: str, steps: int, found: Calibration) -> None:
        """Without correction; with the schedules of the calibration, all three or the one it names; the grid."""
        detailed = (model, name, steps) in DETAILED
        off, on, gain, error = found.gain
        training = found.training.curve.mean
        tried = {"none": found.before, found.nearest: found.after}
        measured = {
            "verdict": found.nearest if found.pays else "none",
            "b_errors": [round(error, 4) for error in found.b_errors],
            "power": [round(value, 4) for value in (off, on, gain, error)],
            "ratio": {name: np.round(run.curve.mean / training, 4).tolist() for name, run in tried.items()},
            "delta": {name: np.round(found.delta(run), 6).tolist() for name, run in tried.items()},
            "sigmas": [round(sigma, 4) for sigma in found.sigmas],
        }
        self.row(Cell(model, name, steps, "none"))
        for shape in dict.fromkeys((found.nearest, *(FITTED if detailed else FITTED[:1]))):
            factors = found.scales[shape]
            self.row(Cell(model, name, steps, shape), factors, scales=np.round(factors, 5).tolist(), **measured)
        if detailed:
            self.row(Cell(model, name, steps, "ratio"), np.array(found.papers.scales[::-1]))
        start = 1.0 if (model, name, steps) in FROM_ONE else float(found.scales["uniform"][0])
        self.grid(model, name, steps, start)


def verdicts(rows: list[dict[str, Any]]) -> None:
    """For each model, sampler and number of steps: the choice of the calibration beside the best there is."""
    print(f"\n{'':35}{'chosen':>12}{'frechet':>9}{'gain':>7}{'best':>12}{'frechet':>9}{'chosen over best':>18}")
    for key in dict.fromkeys((row["model"], row["sampler"], row["steps"]) for row in rows):
        cell = {row["correction"]: row for row in rows if (row["model"], row["sampler"], row["steps"]) == key}
        if FITTED[0] not in cell or cell[FITTED[0]]["verdict"] not in cell:
            continue  # of an earlier, interrupted run
        chosen = cell[cell[FITTED[0]]["verdict"]]
        best = min(cell.values(), key=lambda row: row["frechet"])
        gain = 1 - chosen["frechet"] / cell["none"]["frechet"]
        over = chosen["frechet"] / best["frechet"] - 1
        print(
            f"{key[0]:15}{key[1]:16}{key[2]:4}{chosen['correction']:>12}{chosen['frechet']:9.3f}{gain:7.0%}"
            f"{best['correction']:>12}{best['frechet']:9.3f}{over:18.1%}"
        )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """For each model and sampler the distance over b; then both curves of the calibration, without and with it."""
    from matplotlib.figure import Figure

    keys = list(dict.fromkeys((row["model"], row["sampler"]) for row in rows))
    size = (-(-(len(keys) + 2) // 3), 3)
    figure = Figure(figsize=(3.6 * size[1], 3.2 * size[0]), dpi=80, layout="constrained")
    places = iter(range(1, len(keys) + 3))
    for key in keys:
        axes = figure.add_subplot(*size, next(places))
        for color, steps in enumerate(sorted({row["steps"] for row in rows})):
            cell = [row for row in rows if (row["model"], row["sampler"], row["steps"]) == (*key, steps)]
            if not any(row["correction"] == FITTED[0] for row in cell):
                continue
            grid = sorted((row["b"] or 1.0, row["frechet"]) for row in cell if row["k"] in (None, 0))
            axes.plot(*zip(*grid, strict=True), marker="o", color=f"C{color}", label=f"{steps} steps", markersize=3)
            verdict = next(row["verdict"] for row in cell if row["correction"] == FITTED[0])
            chosen = next(row["frechet"] for row in cell if row["correction"] == verdict)
            axes.axhline(chosen, color=f"C{color}", linestyle=":", label=f"calibrated: {verdict}")
        axes.set(title=f"{key[0]}, {key[1]}", xlabel="b", ylabel="Fréchet distance", ylim=(0, None))
        axes.legend(fontsize=7)
    for curve, title in (("ratio", "‖ε̂‖, sampling over training"), ("delta", "δ: variance error of x")):
        axes = figure.add_subplot(*size, next(places))
        for color, at in enumerate(DETAILED):
            for row in rows:
                if (row["model"], row["sampler"], row["steps"], row["correction"]) == (*at, FITTED[0]):
                    for name, values in row[curve].items():
                        style = "--" if name == "none" else "-"
                        axes.plot(row["sigmas"], values, style, color=f"C{color}", label=f"{at[1]}, {name}")
        axes.set(title=f"{title}, {DETAILED[0][2]} steps", xlabel="sigma", xscale="log")
        axes.invert_xaxis()
        axes.legend(fontsize=7)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="euler at 10 steps, 40 samples: shows that it runs")
    parser.add_argument("--json", type=Path, help="where to write the rows; a plot goes beside it")
    parser.add_argument("--models", nargs="+", choices=("shipped", "half-trained"), help="of the plan")
    parser.add_argument("--samplers", nargs="+", help="of the plan")
    parser.add_argument("--steps", nargs="+", type=int, help="of the plan")
    parser.add_argument("--grid", nargs="+", type=float, default=list(GRID), help="values of b to try")
    parser.add_argument("--samples", type=int, default=1000)
    options = parser.parse_args()
    chosen = (options.models, options.samplers, options.steps)
    plan = [
        cell for cell in PLAN if all(some is None or value in some for value, some in zip(cell, chosen, strict=True))
    ]
    if options.quick:
        plan, options.grid, options.samples = plan[:1], [1.0, 1.05], 40
    settings = {"scheduler": "normal", "cfg": 1.0, "prompt": "", "n": options.samples}
    result = Result("epsilon_scaling", settings, options.json, options.quick)
    with processes(options.quick) as pool:
        bench = Bench(result, pool, options.samples, options.grid, options.quick)
        calibrations = [bench.calibration(*cell) for cell in plan]
        for cell, found in zip(plan, calibrations, strict=True):
            bench.cell(*cell, found.result())
    verdicts(result.rows)
    result.finish(draw, len(plan) == len(PLAN))


if __name__ == "__main__":
    main()
