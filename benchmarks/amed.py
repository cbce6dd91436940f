"""How near learned solvers come to where many steps lead, and how good their pictures are, beside all stock samplers.

    python quickstart.py bench amed [--quick] [--json FILE]

Each trajectory has noise and a caption of its own, which nothing was trained on; cfg is 1. `rmse` is the distance of
the latents, at sigma 0, to those of 200 steps of Heun's method on 256 trajectories, with the standard error of the
bootstrap, and `median` that of what each trajectory is off by itself (`each`, of the solvers that are compared).
`over_student` is `rmse` over that of iPNDM alone, `mean_over_student` the same of the mean of what each is off, which
is what a training lowers, and `nearer_than_student` the share of the trajectories that come nearer; `…_stock` are those
over the nearest stock sampler. Every sampler and scheduler of the host is tried with as many steps as make
`nfe` model calls (or fewer, if none makes so many): on 32 trajectories (`n`), and the best eight on all. `frechet` is
the distance of a judge's features, which nothing was trained on, between 2000 samples and portraits of the test seeds,
for the three nearest stock samplers with their best schedulers too.

Predictors for iPNDM are those that ship; the others are trained here, in the same way. `train_seconds` is on one core.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "demo"), str(ROOT / "benchmarks")]
from bootstrap import import_host, import_pack  # noqa: E402

import_host(cpu=False, pytorch_attention=True)
import_pack()

import comfy.samplers  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from judged import features_of, real_features  # noqa: E402
from processes import processes  # noqa: E402
from result import Result, save  # noqa: E402
from sphereguide import host  # noqa: E402
from sphereguide.demo import judge as judging  # noqa: E402
from sphereguide.demo import portraits, toy_portraits, train_amed  # noqa: E402
from sphereguide.samplers.amed import predictor as files  # noqa: E402
from sphereguide.samplers.amed.bottleneck import Bottleneck  # noqa: E402
from sphereguide.samplers.amed.sampling import amed_sampler, base_sigmas  # noqa: E402
from sphereguide.samplers.amed.schedules import time_points  # noqa: E402
from sphereguide.samplers.amed.students import STUDENTS, AdamsBashforth, direction  # noqa: E402
from sphereguide.samplers.kernel import noise_of  # noqa: E402
from torch import Tensor  # noqa: E402

REFERENCE, ALONE = "reference", "ipndm alone"
NFE, WITH_AFS = (4, 6, 8), (3, 5, 7)
SHAPE = (4, 16, 16)
CHUNK = 32
TRAJECTORIES, SCREENED, FINALISTS = 256, 32, 8
SAMPLES, BEST_STOCK = 2000, 3
FINE = 200
NOISE = 77
"""Key of the noise: not one that training draws from."""


@dataclass(frozen=True)
class Cell:
    """`solver` stock, "ipndm alone" or a student; `schedule` a scheduler, or a predictor's."""

    solver: str
    schedule: str
    learned: bool
    nfe: int
    steps: int

    @property
    def key(self) -> dict[str, Any]:
        return {"solver": self.solver, "schedule": self.schedule, "learned": self.learned, "nfe": self.nfe}

    @property
    def name(self) -> str:
        return f"{self.solver}_{self.schedule}_{self.nfe}_{self.learned}".replace(" ", "-")


@functools.cache
def loaded() -> tuple[Any, Any, Any]:
    """MODEL, a prompt for each trajectory, the empty one. As nodes would do it: in inference mode."""
    with torch.inference_mode():
        model, clip = toy_portraits.load_model(), toy_portraits.load_clip()
        texts = (portraits.caption(portraits.sample(seed)) for seed in portraits.TEST_SEEDS[:SAMPLES])
        captions = [entry for text in texts for entry in host.encoded(clip, text)]
        return model, captions, host.encoded(clip, "")


def predictor_file(student: str, nfe: int, folder: Path) -> Path:
    """The one that ships, or else where this benchmark keeps its own."""
    shipped = train_amed.FOLDER / f"toy_portraits_{student}_{nfe}.safetensors"
    return shipped if shipped.exists() else folder / shipped.name


def learn(student: str, nfe: int, folder: Path) -> None:
    path = predictor_file(student, nfe, folder)
    if not path.exists():
        train_amed.trained(student, nfe, path)


def prepared(cell: Cell, folder: Path) -> tuple[comfy.samplers.KSAMPLER, Tensor]:
    """Sampler and sigmas of a cell."""
    sampling = loaded()[0].model.model_sampling
    if cell.learned:
        predictor = files.load(predictor_file(cell.solver, cell.nfe, folder))
        return amed_sampler(predictor), base_sigmas(predictor)
    if cell.solver == ALONE:
        return comfy.samplers.KSAMPLER(alone, {}, {}), _polynomial(sampling, cell.steps)
    if cell.solver == REFERENCE:
        return comfy.samplers.sampler_object("heun"), torch.cat([_polynomial(sampling, cell.steps), torch.zeros(1)])
    sigmas = comfy.samplers.calculate_sigmas(sampling, cell.schedule, cell.steps)
    return comfy.samplers.sampler_object(cell.solver), sigmas


def _polynomial(sampling: Any, steps: int) -> Tensor:
    return torch.tensor(
        time_points(sampling, "polynomial", steps, 7.0, float(sampling.sigma_min), float(sampling.sigma_max))
    )


def alone(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None
) -> Tensor:
    """iPNDM on its own, with a model call a step, and its last direction on to sigma 0."""
    solver = AdamsBashforth(4)
    for sigma, sigma_next in itertools.pairwise(sigmas.tolist()):
        t, t_next = (x.new_full((len(x),), value) for value in (sigma, sigma_next))
        denoised = model(x, t, **extra_args)
        d = direction(x, t, denoised)
        x = solver.advance(x, t, t_next, denoised)
    return x - sigma_next * d


def latents(cell: Cell, start: int, count: int, folder: Path) -> Tensor:
    """Of the trajectories from `start` on, `[count, 4, 16, 16]`."""
    model, captions, empty = loaded()
    with torch.inference_mode():
        sampler, sigmas = prepared(cell, folder)
        prompt = torch.cat([tokens for tokens, _ in captions[start : start + count]])
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds([[prompt, {}]], empty)
        guider.set_cfg(1.0)
        noise = torch.stack([noise_of(SHAPE, NOISE, i) for i in range(start, start + count)])
        found = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=start)
        return torch.as_tensor(found.numpy().copy())


def features(cell: Cell, start: int, count: int, folder: Path) -> Tensor:
    """What the judge sees in them, `[count, 96]`."""
    return features_of(latents(cell, start, count, folder))


@functools.cache
def calls(sampler: str, scheduler: str, steps: int) -> int:
    """How often a stock sampler calls the model, which answers nothing here."""
    model, made = loaded()[0].clone(), []

    def count(apply_model: Any, parameters: dict[str, Any]) -> Tensor:
        made.append(1)
        return torch.zeros_like(parameters["input"])

    model.set_model_unet_function_wrapper(count)
    with torch.inference_mode():
        sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, scheduler, steps)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(loaded()[2], loaded()[2])
        guider.set_cfg(1.0)
        latent = torch.zeros(1, *SHAPE)
        guider.sample(latent + 1, latent, comfy.samplers.sampler_object(sampler), sigmas, disable_pbar=True, seed=0)
    return len(made)


def stock(nfe: int, samplers: int | None) -> list[Cell]:
    """Every scheduler with every sampler, or the first few, with the most steps of no more than `nfe` model calls."""
    found = []
    for sampler in comfy.samplers.KSampler.SAMPLERS[:samplers]:
        if sampler == "dpm_adaptive":  # takes as many as it likes
            continue
        for scheduler in comfy.samplers.KSampler.SCHEDULERS:
            fitting = [steps for steps in range(2, nfe + 2) if calls(sampler, scheduler, steps) <= nfe]
            if fitting:
                found.append(Cell(sampler, scheduler, False, nfe, max(fitting)))
    return found


class Bench:
    def __init__(self, result: Result, pool: ProcessPoolExecutor, options: argparse.Namespace) -> None:
        self.result, self.pool, self.options = result, pool, options

    @functools.cached_property
    def reference(self) -> Tensor:
        """The latents that all trajectories lead to."""
        fine = self.options.fine
        return self.gathered(latents, Cell(REFERENCE, "polynomial", False, 2 * fine, fine), self.options.trajectories)

    def gathered(self, function: Any, cell: Cell, count: int) -> Tensor:
        """`function` of the first `count` trajectories: from the disk, where an interrupted run left it."""
        kept = self.result.folder
        path = kept / f"{function.__name__}_{cell.name}_{count}.npy"
        if not path.exists():
            starts = range(0, count, CHUNK)
            jobs = [self.pool.submit(function, cell, start, min(CHUNK, count - start), kept) for start in starts]
            np.save(path, torch.cat([job.result() for job in jobs]).numpy())
        return torch.from_numpy(np.load(path))

    def distances(self, cell: Cell, count: int) -> np.ndarray:
        """How far the latents of each trajectory are off the reference, `[count]`."""
        off = self.gathered(latents, cell, count) - self.reference[:count]
        return off.square().flatten(1).mean(1).sqrt().numpy()

    def measured(self, cell: Cell, count: int) -> dict[str, Any]:
        """The row of a cell, with the RMSE of at least so many trajectories."""
        row = self.result.find(cell.key)
        if row is None or row["n"] < count:
            each = self.distances(cell, count)
            rng = np.random.default_rng(0)
            again = [rms(each[rng.integers(len(each), size=len(each))]) for _ in range(200)]
            found = {"rmse": rms(each), "rmse_se": float(np.std(again)), "median": float(np.median(each))}
            if cell.learned:
                learnt = predictor_file(cell.solver, cell.nfe, self.result.folder)
                found["train_seconds"] = files.load(learnt).settings.seconds
            found = {key: round(value, 5) for key, value in found.items()} | {"n": len(each)}
            if row is None:
                row = dict(cell.key)
                self.result.rows.append(row)
            row.update(found)
            self.result.keep()
        return row

    def row(self, cell: Cell) -> dict[str, Any]:
        row = self.measured(cell, self.options.trajectories)
        print(
            f"{cell.solver:20}{cell.schedule:14}{'learned' if cell.learned else '':9}{cell.nfe:4} calls   "
            f"RMSE {row['rmse']:.4f} ± {row['rmse_se']:.4f}   median {row['median']:.4f}",
            flush=True,
        )
        return row

    def best_stock(self, nfe: int) -> list[Cell]:
        """All of the host on a few trajectories, the best on all; of these each sampler once, the nearest first."""
        listed = self.result.folder / f"stock_{nfe}.json"
        if not listed.exists():
            every = self.pool.submit(stock, nfe, self.options.stock).result()
            listed.write_text(json.dumps([asdict(cell) for cell in every]))
        cells = [Cell(**cell) for cell in json.loads(listed.read_text())]
        few = min(SCREENED, self.options.trajectories)
        for cell in cells:
            self.measured(cell, few)
        screened = {cell: rms(self.distances(cell, few)) for cell in cells}  # the row may have more by now
        finalists = sorted(cells, key=screened.__getitem__)[:FINALISTS]
        print(f"{len(cells)} stock combinations with {nfe} calls", flush=True)
        nearest: dict[str, Cell] = {}  # the same sampler with a like schedule says nothing new
        for cell in sorted(finalists, key=lambda cell: self.row(cell)["rmse"]):
            nearest.setdefault(cell.solver, cell)
        return list(nearest.values())

    def over(self, cell: Cell, other: Cell, name: str) -> None:
        """What it is off over what the other is, with 95 % intervals: trajectories are drawn in pairs."""
        count = self.options.trajectories
        rows, pair = zip(
            *((self.result.find(one.key), self.distances(one, count)) for one in (cell, other)), strict=True
        )
        for row, each in zip(rows, pair, strict=True):
            row["each"] = np.round(each, 4).tolist()
        draws = np.random.default_rng(0).integers(count, size=(2000, count))
        for what, of in ((f"over_{name}", rms), (f"mean_over_{name}", np.mean)):
            ratios = [of(pair[0][drawn]) / of(pair[1][drawn]) for drawn in draws]
            rows[0][what] = round(float(of(pair[0]) / of(pair[1])), 3)
            rows[0][f"{what}_interval"] = [round(float(end), 3) for end in np.quantile(ratios, (0.025, 0.975))]
        rows[0][f"nearer_than_{name}"] = round(float((pair[0] < pair[1]).mean()), 3)
        self.result.keep()

    def frechet(self, cell: Cell, real: Tensor) -> None:
        row = self.result.find(cell.key)
        assert row is not None
        if "frechet" not in row:
            found = self.gathered(features, cell, self.options.samples)
            rng = np.random.default_rng(0)
            again = [judging.frechet(found[rng.integers(len(found), size=len(found))], real) for _ in range(30)]
            row["frechet"], row["frechet_se"] = round(judging.frechet(found, real), 4), round(float(np.std(again)), 4)
            self.result.keep()
        name = f"{cell.solver:20}{cell.schedule:14}{cell.nfe:4} calls"
        print(f"{name}   Fréchet {row['frechet']:.3f} ± {row['frechet_se']:.3f}", flush=True)


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def overhead(predictor: Any) -> dict[str, float]:
    """Shares of the time of a model's calls, for one picture: what the predictor and its look at the bottleneck take,
    and all that the run takes outside of the calls beyond what euler does.

    Medians: from run to run the calls differ more in time than a predictor takes.
    """
    spent: dict[str, float] = {}

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            output = function(*args, **options)
            spent[name] += time.perf_counter() - started
            return output

        return call

    def wrapper(apply_model: Any, parameters: dict[str, Any]) -> Tensor:
        return counted("model", apply_model)(parameters["input"], parameters["timestep"], **parameters["c"])

    model, captions, empty = loaded()
    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds([captions[0]], empty)
    guider.set_cfg(1.0)
    latent = torch.zeros(1, *SHAPE)

    def shares(sampler: comfy.samplers.KSAMPLER, sigmas: Tensor, seed: int) -> tuple[float, float]:
        spent.update(model=0.0, predictor=0.0, run=0.0)

        def timed(model: Any, x: Tensor, sigmas: Tensor, callback: Any = None, **options: Any) -> Tensor:
            return counted("run", sampler.sampler_function)(model, x, sigmas, **options)

        run = comfy.samplers.KSAMPLER(timed, {}, {})
        guider.sample(latent + 1, latent, run, sigmas, disable_pbar=True, seed=seed)
        return spent["predictor"] / spent["model"], (spent["run"] - spent["model"]) / spent["model"]

    learned = amed_sampler(predictor), base_sigmas(predictor)
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "normal", predictor.settings.nfe)
    euler = comfy.samplers.sampler_object("euler"), sigmas
    own = [(files.AMEDPredictor, "__call__"), *((Bottleneck, name) for name in ("note", "sort", "features"))]
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        for of, name in own:
            stack.enter_context(mock.patch.object(of, name, counted("predictor", getattr(of, name))))
        pairs = [(shares(*learned, seed), shares(*euler, seed)) for seed in range(60)]
    own_share, outside = np.median([(ours[0], ours[1] - theirs[1]) for ours, theirs in pairs], 0)
    return {"predictor": float(own_share), "over_euler": float(outside)}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    most = max(row.get("n", 0) for row in rows)
    figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
    for axes, value, title in zip(
        figure.subplots(1, 2), ("rmse", "frechet"), ("RMSE to 200 Heun steps", "Fréchet distance"), strict=True
    ):
        known = [row for row in rows if row.get("n") == most and value in row]
        for solver, parities, label in (
            ("ipndm", (0,), "AMED, iPNDM"),
            ("ipndm", (1,), "AMED, iPNDM, AFS"),
            (ALONE, (0, 1), "iPNDM alone"),
        ):
            points = [
                (row["nfe"], row[value])
                for row in known
                if row["solver"] == solver and row["learned"] == (solver != ALONE) and row["nfe"] % 2 in parities
            ]
            if points:
                axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=label)
        best = {}
        for row in known:
            if not row["learned"] and row["solver"] != ALONE:
                best[row["nfe"]] = min(best.get(row["nfe"], np.inf), row[value])
        axes.plot(
            *zip(*sorted(best.items()), strict=True), marker="s", markersize=4, color="#666666", label="best stock"
        )
        axes.set(title=title, xlabel="model calls", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 calls, few trajectories: shows that it runs")
    parser.add_argument("--json", type=Path, help="where to write the rows; a plot goes beside it")
    parser.add_argument("--trajectories", type=int, default=TRAJECTORIES)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--fine", type=int, default=FINE, help="steps of the reference")
    options = parser.parse_args()
    options.stock = 3 if options.quick else None  # how many of the host's samplers
    learned = [("ipndm", nfe) for nfe in (*NFE, *WITH_AFS)] + [(name, 6) for name in STUDENTS if name != "ipndm"]
    calls_of = NFE
    if options.quick:
        learned, calls_of = [("ipndm", 4)], NFE[:1]
        options.trajectories, options.samples, options.fine = 16, 64, 40
    settings = {"cfg": 1.0, "trajectories": options.trajectories, "samples": options.samples, "fine": options.fine}
    result = Result("amed", settings, options.json, options.quick)
    with processes(options.quick) as pool:
        bench = Bench(result, pool, options)
        real = real_features(SAMPLES, options.quick)
        compared = [Cell(name, "polynomial", True, nfe, train_amed.recipe(name, nfe)["steps"]) for name, nfe in learned]
        for nfe in calls_of:
            cells = [cell for cell in compared if (cell.solver, cell.nfe) == ("ipndm", nfe)]
            cells.append(Cell(ALONE, "polynomial", False, nfe, nfe))
            for cell in cells:
                bench.row(cell)
            nearest = bench.best_stock(nfe)
            for other, name in ((cells[1], "student"), (nearest[0], "stock")):
                bench.over(cells[0], other, name)
            for cell in (*cells, *nearest[:BEST_STOCK]):
                bench.frechet(cell, real)
        for nfe in WITH_AFS if not options.quick else ():
            bench.row(Cell(ALONE, "polynomial", False, nfe, nfe))
        # What takes a training comes last.
        for job in [pool.submit(learn, *one, result.folder) for one in learned]:
            job.result()
        for cell in compared:
            bench.row(cell)
            if cell.solver == "ipndm":
                bench.frechet(cell, real)
    shares = overhead(files.load(predictor_file("ipndm", learned[0][1], result.folder)))
    print(f"Of a model call: the predictor {shares['predictor']:.2%}, a run beyond euler {shares['over_euler']:.2%}")
    result.add({"solver": "overhead", **{name: round(share, 5) for name, share in shares.items()}})
    result.finish(draw)


if __name__ == "__main__":
    main()
