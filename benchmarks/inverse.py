"""What guidance restores of measured pictures: DSG beside the methods that it grew from, and those that followed it.

    python quickstart.py bench inverse [--open | --many] [--quick] [--json FILE]

Of the pixels 30 to 70 % are missing (`inpainting`), or the picture is four times smaller (`super-resolution x4`), or
blurred (`gaussian deblur`, kernel 61, sigma 3), and has noise of .05 for pixels in -1..1. The papers have these tasks
for models of pixels. A latent of Toy Portraits has 1024 numbers, fewer than each of them measures, so that a decoder is
enough to restore with. `super-resolution x16`, the task of --open, measures 192 and leaves the rest to the model.

What is restored are portraits that chose no setting, with an empty prompt. All cells share measurements
and noise. Rows:

    settings     published: what the method's authors give for this task, unscaled; DPS's are of 1000 steps. tuned: the
                 strength that has the best mean PSNR on four other portraits, found in five tries for each method,
                 steps and task; four do not show every failure. grid: DSG at rates that are the same for all tasks,
                 and with auto_strength 1 (DSG auto)
    nfe          model calls, at most; DiffRGD takes four a step but the last, so it has a quarter of the steps
    psnr, ssim   to the original, with 95 % intervals of the bootstrap; each: the PSNR of each portrait
    frechet      distance of a judge's features, which nothing was trained on, between the restored and 2048 portraits:
                 of few it is larger, so that it compares with rows of the same n only, and with the originals' own
    misfit       RMS of y − A(x), where .025 is that of the noise
    off_shell    share of steps whose ‖x_next − μ‖ is none that Gaussian noise has: off by three of its deviations
    diversity    RMS distance between pictures of one measurement and different noise, and that of unguided ones

Few steps are measured apart (`settings` few), for euler_ancestral and lcm, on the model's own schedule and on the times
that a predictor of AMED learnt: unguided, and DSG with the rate of each step tuned. Without fine-tuning for it, lcm
only draws new noise at each step; off_shell is not known there.

How much of it is the model's doing: `degraded` are the measured pictures, enlarged by bicubic interpolation,
`autoencoder` is what the VAE makes of the originals, and `decoder alone` decodes the latents that Adam finds to agree
with the measurement, from zero, in as many steps, with a tuned rate and no model.

FreeDoM's authors give no setting for these tasks; it runs without its time travel here. 1000 steps (--many, in the open
task) take the strengths tuned at 100, so that their sum stays: a tenth of DPS's and FreeDoM's, and DSG's as rate_steps
turns it; and then those that are tuned anew, from there on. Guidance decodes in bfloat16, which takes half of the time;
the pictures that are measured are decoded in float32.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "demo"), str(ROOT / "benchmarks")]
from bootstrap import import_host, import_pack  # noqa: E402

import_host(cpu=False, pytorch_attention=True)
import_pack()

import comfy.samplers  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from judged import DESCENTS, fast_vae, frechet, originals, originals_row, real_features, steps_of  # noqa: E402
from processes import processes  # noqa: E402
from result import Result, interval, save  # noqa: E402
from shell import Shell  # noqa: E402
from skimage.metrics import structural_similarity  # noqa: E402
from sphereguide import host  # noqa: E402
from sphereguide.demo import portraits, toy_portraits  # noqa: E402
from sphereguide.losses.base import Loss  # noqa: E402
from sphereguide.losses.measurement import (  # noqa: E402
    GaussianDeblur,
    Inpainting,
    SuperResolution,
    downsample,
    gaussian_blur,
)
from sphereguide.models.decoder import Decoder  # noqa: E402
from sphereguide.samplers.amed import predictor as predictors  # noqa: E402
from sphereguide.samplers.amed.sampling import expanded_sigmas  # noqa: E402
from sphereguide.samplers.autograd import differentiable  # noqa: E402
from sphereguide.samplers.diffrgd import Riemannian, riemannian_guided  # noqa: E402
from sphereguide.samplers.dps import Posterior, posterior_guided  # noqa: E402
from sphereguide.samplers.dsg import Guidance, guided  # noqa: E402
from sphereguide.samplers.kernel import noise_of  # noqa: E402
from sphereguide.samplers.tfg import Unified, unified_guided  # noqa: E402
from sphereguide.samplers.trace import GuidanceTrace  # noqa: E402
from torch import Tensor  # noqa: E402

SHAPE, ELEMENTS = (4, 16, 16), 4 * 16 * 16
NOISE = 0.025
KERNEL_SIZE, BLUR = 61, 3.0
FACTORS = {"super-resolution x4": 4, "super-resolution x16": 16}
DETERMINED = ("inpainting", "super-resolution x4", "gaussian deblur")
OPEN = "super-resolution x16"
TASKS = (*DETERMINED, OPEN)
NFE = (100, 50, 20)
MANY, FEW = 1000, 8
"""Steps of the longest run, and how many portraits it restores."""
GRID = (0.1, 0.2, 0.3, 0.4)
GRID_CALLS = 50
"""Of auto strength, and of the rates that it is held against."""
FEW_CALLS = (10, 6)
FEW_CELLS = [(sampler, "normal", nfe) for nfe in FEW_CALLS for sampler in ("euler_ancestral", "lcm")]
FEW_CELLS += [(sampler, "amed", 6) for sampler in ("euler_ancestral", "lcm")]
"""Sampler, schedule and model calls. The predictors that lie here are of 4, 6 and 8."""
CHUNK = 2
DIVERSITY = {"rates": (0.0, 0.05, 0.1, 0.2, 0.4, 0.8), "measurements": 4, "each": 8, "steps": 50}

DSG_PUBLISHED = {
    "inpainting": {100: (1, 0.2), 50: (1, 0.2), 20: (1, 0.2)},
    "super-resolution x4": {100: (2, 0.1), 50: (1, 0.1), 20: (1, 0.2)},
    "gaussian deblur": {100: (1, 0.1), 50: (1, 0.1)},
}
"""Interval and rate, table 7 of the paper. None is given for blur and 20 steps."""
DPS_PUBLISHED = {"inpainting": 0.5, "super-resolution x4": 0.3, "gaussian deblur": 0.3}
"""ζ' of the authors' configurations, for pictures in -1..1: for ours in 0..1 the residual is half of theirs."""
TFG_PUBLISHED = {"super-resolution x4": (4.0, 2.0, 0.01), "gaussian deblur": (1.0, 8.0, 0.01)}
"""ρ, μ, σ̄, at N_iter 4, whose ratios are kept. None is given for the others."""
DEAR = {"TFG": NFE[1:]}
"""What takes thrice the time for a model call is not measured with the most."""
ALONE = "decoder alone"

Steer = Callable[[Any, Loss, Decoder, "Cell", GuidanceTrace], Any]


@dataclass(frozen=True)
class Cell:
    """`strength`: guidance_rate of DSG, κ of DSG auto, ζ of DPS, ρ of FreeDoM, η of DiffRGD; TFG's ρ and μ count it."""

    task: str
    method: str
    nfe: int
    strength: float = 0.0
    interval: int = 1
    sampler: str = "euler_ancestral"
    schedule: str = "normal"

    @property
    def key(self) -> dict[str, Any]:
        names = ("task", "method", "nfe", "sampler", "schedule")
        return {name: getattr(self, name) for name in names}

    @property
    def steps(self) -> int:
        return steps_of(self.method, self.nfe)


def _dsg(sampler: Any, loss: Loss, decode: Decoder, cell: Cell, trace: GuidanceTrace) -> Any:
    return guided(sampler, Guidance(loss, decode, interval=cell.interval, guidance_rate=cell.strength), trace)


def _auto(sampler: Any, loss: Loss, decode: Decoder, cell: Cell, trace: GuidanceTrace) -> Any:
    return guided(sampler, Guidance(loss, decode, auto_strength=cell.strength), trace)


def _dps(sampler: Any, loss: Loss, decode: Decoder, cell: Cell, trace: GuidanceTrace) -> Any:
    return posterior_guided(sampler, Posterior(loss, decode, step_size=cell.strength), trace)


def _freedom(sampler: Any, loss: Loss, decode: Decoder, cell: Cell, trace: GuidanceTrace) -> Any:
    return unified_guided(sampler, Unified(loss, decode, preset="FreeDoM", rho=cell.strength), trace)


def _tfg(sampler: Any, loss: Loss, decode: Decoder, cell: Cell, trace: GuidanceTrace) -> Any:
    rho, mu, sigma_bar = TFG_PUBLISHED.get(cell.task, (1.0, 1.0, 0.01))
    rho, mu = cell.strength * rho, cell.strength * mu
    return unified_guided(sampler, Unified(loss, decode, rho=rho, mu=mu, sigma_bar=sigma_bar), trace)


def _diffrgd(sampler: Any, loss: Loss, decode: Decoder, cell: Cell, trace: GuidanceTrace) -> Any:
    descent = Riemannian(loss, decode, step_size=cell.strength, iterations=DESCENTS)
    return riemannian_guided(sampler, descent, trace)


METHODS: dict[str, tuple[Steer, float]] = {
    "DPS": (_dps, 2.0),
    "FreeDoM": (_freedom, 2.0),
    "DSG": (_dsg, 0.4),
    "TFG": (_tfg, 1.0),
    "DiffRGD": (_diffrgd, 5.0),
    "DSG auto": (_auto, 1.0),
}
"""How to guide, and the strength that tuning tries first; that of auto is its default, and stays."""
LONGER = 8.0
"""For strengths that count the length of the gradient, which in the open task passes through means of 256 pixels."""
FIRST_RATE = 0.1
"""Of Adam, where the decoder is alone."""


def published(task: str, method: str, nfe: int) -> tuple[float, int] | None:
    """Strength and interval that the authors give, if they give any."""
    if method == "DSG" and nfe in DSG_PUBLISHED.get(task, {}):
        interval, rate = DSG_PUBLISHED[task][nfe]
        return rate, interval
    if method == "DPS" and task in DPS_PUBLISHED:
        return 2 * DPS_PUBLISHED[task], 1
    return None


@functools.cache
def loaded() -> tuple[Any, Any, Any, Any]:
    """MODEL, the empty prompt, a VAE in float32, and one in bfloat16. As nodes would do it: in inference mode."""
    with torch.inference_mode():
        model, clip = toy_portraits.load_model(), toy_portraits.load_clip()
        return model, host.encoded(clip, ""), toy_portraits.load_vae(), fast_vae()


def sigmas_of(cell: Cell) -> Tensor:
    """`[steps + 1]`, to 0."""
    if cell.schedule == "amed":
        file = toy_portraits.WEIGHTS / "amed" / f"toy_portraits_ipndm_{cell.nfe}.safetensors"
        predictor = predictors.load(file, "bench inverse")
        return expanded_sigmas(predictor, predictor.settings.midpoints)
    sampling = loaded()[0].model.model_sampling
    return comfy.samplers.calculate_sigmas(sampling, cell.schedule, cell.steps)


def measurement(task: str, seeds: list[int]) -> Loss:
    """‖y − A(x̂₀)‖₂ of degraded portraits, each with noise of its own."""
    degraded, masks = [], []
    for seed, picture in zip(seeds, originals(seeds), strict=True):
        generator = torch.Generator().manual_seed(seed)
        y = picture[None]
        missing = 0.3 + 0.4 * torch.rand((), generator=generator)
        masks.append((torch.rand(1, 1, *y.shape[-2:], generator=generator) < missing).float())
        if task in FACTORS:
            y = downsample(y, FACTORS[task])
        elif task == "gaussian deblur":
            y = gaussian_blur(y, KERNEL_SIZE, BLUR)
        degraded.append(y + NOISE * torch.randn(y.shape, generator=generator))
    y = torch.cat(degraded)
    if task == "inpainting":
        return Inpainting(y, torch.cat(masks))
    return SuperResolution(y, FACTORS[task]) if task in FACTORS else GaussianDeblur(y, KERNEL_SIZE, BLUR)


@dataclass
class Restored:
    """pictures `[B, 3, 128, 128]` in 0..1; psnr, ssim, misfit `[B]`; off `[steps − 1, B]`, NaN where not known."""

    pictures: Tensor
    psnr: Tensor
    ssim: Tensor
    misfit: Tensor
    off: Tensor

    @classmethod
    def joined(cls, parts: list[Restored]) -> Restored:
        first = [torch.cat([getattr(part, name) for part in parts]) for name in ("pictures", "psnr", "ssim", "misfit")]
        return cls(*first, torch.cat([part.off for part in parts], 1))


def fitted(loss: Loss, vae: Any, count: int, steps: int, rate: float) -> Tensor:
    """Latents `[count, 4, 16, 16]` that decode to what was measured."""
    decode = Decoder(vae)
    with differentiable(decode.module, loss) as recording, recording(), torch.enable_grad():
        latents = torch.zeros(count, *SHAPE, requires_grad=True)
        adam = torch.optim.Adam([latents], rate)
        for _ in range(steps):
            adam.zero_grad()
            loss(decode(latents)).sum().backward()
            adam.step()
    return latents.detach()


def restored(cell: Cell, seeds: list[int], draws: list[int]) -> Restored:
    """Of the portraits `seeds`, each from the noise with its number in `draws`."""
    model, empty, exact, fast = loaded()
    with torch.inference_mode():
        loss = measurement(cell.task, seeds)
        sampler, shell, sigmas = comfy.samplers.sampler_object(cell.sampler), Shell(), sigmas_of(cell)
        if cell.method in METHODS:
            sampler = METHODS[cell.method][0](sampler, loss, Decoder(fast), cell, GuidanceTrace())
        if cell.method == ALONE:
            out = fitted(loss, fast, len(seeds), cell.nfe, cell.strength)
        else:
            guider = comfy.samplers.CFGGuider(model)
            guider.set_conds(empty, empty)
            guider.set_cfg(1.0)
            noise = torch.stack([noise_of(SHAPE, 0, draw) for draw in draws])
            torch.manual_seed(draws[0])  # hosts of 2024 draw a sampler's noise from the global generator
            watched = shell.watched(sampler)
            out = guider.sample(noise, torch.zeros_like(noise), watched, sigmas, disable_pbar=True, seed=draws[0])
        pictures = exact.decode(out).movedim(-1, 1).clamp(0, 1)
        truth = originals(seeds)
        misfit = loss(pictures) / loss.measurement[0].numel() ** 0.5
        if cell.task == "inpainting":
            misfit = misfit / loss.known.mean((1, 2, 3)).sqrt()
        off = torch.full((1, len(seeds)), torch.nan)
        if cell.sampler == "euler_ancestral" and cell.method != ALONE:
            off = Shell.off(shell.radii(), ELEMENTS).float()
        return Restored(
            pictures.clone(),
            ratio(pictures, truth),
            torch.tensor([similarity(a, b) for a, b in zip(pictures, truth, strict=True)]),
            misfit.clone(),
            off,
        )


def ratio(pictures: Tensor, truth: Tensor) -> Tensor:
    """PSNR, `[B]`, in dB."""
    return -10 * (pictures - truth).square().mean((1, 2, 3)).log10()


def similarity(a: Tensor, b: Tensor) -> float:
    """SSIM with the Gaussian window of its authors."""
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(a.numpy(), b.numpy(), channel_axis=0, data_range=1.0, **options))


class Bench:
    def __init__(self, result: Result, pool: Any, count: int, quick: bool) -> None:
        self.result, self.pool, self.count, self.quick = result, pool, count, quick
        self.tuned_on, self.tries = (2, 2) if quick else (4, 5)

    @functools.cached_property
    def real(self) -> Tensor:
        return real_features(1000, self.quick)

    def of(self, cell: Cell, seeds: list[int], draws: list[int]) -> Restored:
        chunks = [slice(start, start + CHUNK) for start in range(0, len(seeds), CHUNK)]
        jobs = [self.pool.submit(restored, cell, seeds[chunk], draws[chunk]) for chunk in chunks]
        return Restored.joined([job.result() for job in jobs])

    @staticmethod
    def first(cell: Cell) -> float:
        if cell.method == ALONE:
            return FIRST_RATE
        return METHODS[cell.method][1] * (LONGER if cell.task == OPEN and cell.method != "DSG" else 1)

    def tuned(self, cell: Cell) -> Cell:
        """With the best strength of those that a climb by factors of 2 meets, on portraits that are not measured.

        It begins with the cell's own strength, if that has one.
        """
        key = {**cell.key, "settings": "tries"}
        row = self.result.find(key)
        if row is None:
            seeds = list(portraits.TUNING_SEEDS[: self.tuned_on])
            tried: dict[float, float] = {}

            def mean(strength: float) -> float:
                if strength not in tried and len(tried) < self.tries:
                    found = self.of(replace(cell, strength=strength), seeds, list(range(self.tuned_on)))
                    tried[strength] = float(found.psnr.nan_to_num(0.0).mean())
                return tried.get(strength, -np.inf)

            best = cell.strength or self.first(cell)
            most = 1.0 if cell.method == "DSG" else np.inf
            while len(tried) < self.tries:
                around = [value for value in (best, 2 * best, best / 2) if value <= most]
                found = max(around, key=mean)
                if found == best:
                    # Between its neighbours: half of a step to either side, with what tries are left.
                    best = max((value for value in (best, best * 2**0.5, best / 2**0.5) if value <= most), key=mean)
                    break
                best = found
            row = {**key, "tried": {f"{value:g}": round(psnr, 3) for value, psnr in tried.items()}}
            row["strength"] = max(tried, key=tried.__getitem__)
            self.result.add(row)
        return replace(cell, strength=float(row["strength"]))

    def row(self, cell: Cell, settings: str, count: int) -> dict[str, Any]:
        key = {**cell.key, "settings": settings, "strength": cell.strength}
        row = self.result.find(key)
        same = self.result.find({**cell.key, "strength": cell.strength, "interval": cell.interval, "n": count})
        if row is None and same is not None:
            row = {**same, "settings": settings}
            self.result.add(row)
        elif row is None:
            seeds = list(portraits.TEST_SEEDS[:count])
            found = self.of(cell, seeds, list(range(count)))
            psnr = found.psnr.double().numpy()
            row = {
                **key,
                "steps": cell.steps,
                "interval": cell.interval,
                "psnr": round(float(psnr.mean()), 3),
                "psnr_interval": interval(psnr),
                "ssim": round(float(found.ssim.mean()), 4),
                "ssim_interval": interval(found.ssim.double().numpy()),
                "frechet": frechet(found.pictures, self.real),
                "misfit": round(float(found.misfit.mean()), 4),
                "off_shell": None if found.off.isnan().any() else round(float(found.off.mean()), 4),
                "success": None,
                "each": np.round(psnr, 2).tolist(),
                "n": count,
            }
            self.result.add(row)
        how = settings if settings != "few" else f"{cell.sampler}, {cell.schedule}"
        off = "" if row["off_shell"] is None else f"{row['off_shell']:7.0%}"
        print(
            f"{cell.task:20}{cell.nfe:5}  {cell.method:14}{how:23}{row['strength']:9.4g}{row['psnr']:8.2f} dB "
            f"{row['psnr_interval'][0]:7.2f} {row['psnr_interval'][1]:5.2f}{row['ssim']:7.3f}{row['frechet']:8.3f}"
            f"{row['misfit']:8.4f}{off}",
            flush=True,
        )
        return row

    def references(self) -> None:
        """Of the originals themselves, and of what the autoencoder makes of them."""
        seeds = portraits.TEST_SEEDS[: self.count]
        print(f"originals: Fréchet distance {originals_row(self.result, seeds, self.real)['frechet']}", flush=True)
        key = {"method": "autoencoder", "settings": "reference", "n": self.count}
        row = self.result.find(key)
        if row is None:
            truth = originals(seeds)
            with torch.inference_mode():
                vae = loaded()[2]
                decoded = vae.decode(vae.encode(truth.movedim(1, -1))).movedim(-1, 1).clamp(0, 1).clone()
            psnr = round(float(ratio(decoded, truth).mean()), 3)
            row = {**key, "frechet": frechet(decoded, self.real), "psnr": psnr}
            self.result.add(row)
        print(f"autoencoder: Fréchet distance {row['frechet']}, PSNR {row['psnr']}", flush=True)

    def degraded(self, task: str) -> None:
        """Of the measured pictures themselves, enlarged: what is to be had without a model and a decoder."""
        key = {"task": task, "method": "degraded", "settings": "reference", "n": self.count}
        row = self.result.find(key)
        if row is None:
            seeds = list(portraits.TEST_SEEDS[: self.count])
            truth, y = originals(seeds), measurement(task, seeds).measurement
            enlarged = torch.nn.functional.interpolate(y, truth.shape[-2:], mode="bicubic").clamp(0, 1)
            psnr = round(float(ratio(enlarged, truth).mean()), 3)
            row = {**key, "frechet": frechet(enlarged, self.real), "psnr": psnr}
            self.result.add(row)
        print(f"{task}, degraded: Fréchet distance {row['frechet']}, PSNR {row['psnr']}", flush=True)

    def methods(self, task: str, nfe: int, names: list[str]) -> None:
        """All rows of a task and number of model calls."""
        self.row(Cell(task, "unguided", nfe), "none", self.count)
        if nfe == NFE[0]:
            self.row(self.tuned(Cell(task, ALONE, nfe)), "tuned", self.count)
        for method in names:
            if method == "DSG auto":
                if nfe == GRID_CALLS:
                    self.row(Cell(task, method, nfe, METHODS[method][1]), "grid", self.count)
                    for rate in GRID:
                        self.row(Cell(task, "DSG", nfe, rate), "grid", self.count)
                continue
            if nfe not in DEAR.get(method, (nfe,)):
                continue
            given = published(task, method, nfe)
            if given is not None:
                self.row(Cell(task, method, nfe, *given), "published", self.count)
            self.row(self.tuned(Cell(task, method, nfe)), "tuned", self.count)

    def few_steps(self, task: str) -> None:
        for sampler, schedule, nfe in FEW_CELLS:
            cell = Cell(task, "unguided", nfe, sampler=sampler, schedule=schedule)
            self.row(cell, "few", self.count)
            self.row(self.tuned(replace(cell, method="DSG")), "few", self.count)

    def many_steps(self) -> None:
        self.row(Cell(OPEN, "unguided", MANY), "none", FEW)
        share = NFE[0] / MANY
        for method in ("DPS", "FreeDoM", "DSG"):
            strength = self.tuned(Cell(OPEN, method, NFE[0])).strength
            if method == "DSG":
                strength = share**0.5 * strength / (1 - strength + share**0.5 * strength)
            else:
                strength *= share
            cell = Cell(OPEN, method, MANY, strength)
            self.row(cell, f"tuned at {NFE[0]}", FEW)
            self.row(self.tuned(cell), "tuned", FEW)

    def diversity(self, task: str) -> None:
        """How far apart pictures of one measurement are, and whether they are as far as they should be."""
        rates, count, each = DIVERSITY["rates"], DIVERSITY["measurements"], DIVERSITY["each"]
        for rate in rates:
            key = {"task": task, "method": "DSG", "nfe": DIVERSITY["steps"], "settings": "diversity", "strength": rate}
            row = self.result.find(key)
            if row is None:
                seeds = [seed for seed in portraits.TEST_SEEDS[:count] for _ in range(each)]
                found = self.of(Cell(task, "DSG", DIVERSITY["steps"], rate), seeds, list(range(count * each)))
                own = found.pictures.unflatten(0, (count, each))
                apart = torch.stack([torch.pdist(some.flatten(1)) for some in own]) / own[0, 0].numel() ** 0.5
                row = {
                    **key,
                    "diversity": round(float(apart.square().mean().sqrt()), 4),
                    "psnr": round(float(found.psnr.mean()), 3),
                    "n": count * each,
                }
                self.result.add(row)
            print(f"{task:20} guidance_rate {rate:g}: {row['diversity']:.4f} apart, {row['psnr']:.2f} dB", flush=True)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """PSNR over model calls of each task, what it is over that of DSG, and what variety is left."""
    from matplotlib.figure import Figure

    names = [*METHODS, ALONE]
    tasks = [task for task in TASKS if any(row.get("task") == task for row in rows)]
    varied = sorted((row["strength"], row["diversity"], row["psnr"]) for row in rows if row["settings"] == "diversity")
    count = len(tasks) + 1 + 2 * bool(varied)
    figure = Figure(figsize=(3.5 * count, 3.6), dpi=80, layout="constrained")
    panels = iter(figure.subplots(1, count))

    def over_calls(axes: Any, title: str) -> None:
        axes.set(title=title, xlabel="model calls", ylabel="PSNR, dB", xscale="log")
        axes.set_xticks(NFE, [str(nfe) for nfe in NFE], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)

    for task in tasks:
        axes = next(panels)
        for color, method in enumerate(names):
            for settings, style in (("tuned", "-"), ("published", "--")):
                of = [
                    (row["nfe"], row["psnr"], *row["psnr_interval"])
                    for row in sorted(rows, key=lambda row: row.get("nfe", 0))
                    if (row.get("task"), row["method"], row["settings"]) == (task, method, settings)
                ]
                if of:
                    x, y, low, high = zip(*of, strict=True)
                    label = method if settings == "tuned" else None
                    axes.plot(x, y, style, marker="o", markersize=3, color=f"C{color}", label=label)
                    axes.fill_between(x, low, high, color=f"C{color}", alpha=0.1)
        unguided = [row["psnr"] for row in rows if (row.get("task"), row["settings"]) == (task, "none")]
        over_calls(axes, f"{task}, unguided {np.mean(unguided):.1f} dB")
        if task == tasks[0]:
            axes.legend(fontsize=7)
    axes = next(panels)
    of = [row for row in rows if row["settings"] == "tuned"]
    tuned = {(row["method"], row["nfe"], row["task"]): np.array(row["each"]) for row in of}
    for color, method in enumerate(names):
        # Of a portrait, the mean over the tasks: its measurements are not independent.
        over = {
            nfe: np.mean([tuned[method, nfe, task] - tuned["DSG", nfe, task] for task in tasks], 0)
            for nfe in NFE
            if all({(method, nfe, task), ("DSG", nfe, task)} <= tuned.keys() for task in tasks)
        }
        if over:
            low, high = np.transpose([interval(values) for values in over.values()])
            means = [values.mean() for values in over.values()]
            axes.plot(list(over), means, marker="o", markersize=3, color=f"C{color}")
            axes.fill_between(list(over), low, high, color=f"C{color}", alpha=0.1)
    over_calls(axes, "over DSG, both tuned")
    if varied:
        x, apart, psnr = zip(*varied, strict=True)
        for y, label in ((apart, "distance of pictures, RMS"), (psnr, "PSNR, dB")):
            axes = next(panels)
            axes.plot(x, y, marker="o", markersize=3)
            axes.set(title=f"DSG, {DIVERSITY['steps']} calls", xlabel="guidance_rate", ylabel=label)
            axes.grid(alpha=0.3)
    figure.suptitle("solid: tuned; dashed: published settings; bands: 95 %", fontsize=9)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two portraits, 10 calls, one task: shows that it runs")
    parser.add_argument("--open", action="store_true", help=f"{OPEN}, in place of the other three tasks")
    parser.add_argument("--many", action="store_true", help=f"that task with {MANY} steps, and {FEW} portraits")
    parser.add_argument("--json", type=Path, help="where to write the rows; a plot goes beside it")
    parser.add_argument("--tasks", nargs="+", choices=DETERMINED, default=list(DETERMINED), help="of the three")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--nfe", nargs="+", type=int, default=list(NFE))
    parser.add_argument("--portraits", type=int, default=32)
    options = parser.parse_args()
    tasks, whole = ([OPEN], [OPEN]) if options.open else (options.tasks, list(DETERMINED))
    if options.quick:
        tasks, options.methods, options.nfe, options.portraits = tasks[:1], ["DPS", "DSG"], [10], 2
    settings = {"sampler": "euler_ancestral", "scheduler": "normal", "cfg": 1.0, "noise": NOISE, "n": options.portraits}
    name = "inverse_many" if options.many else "inverse_open" if options.open else "inverse"
    result = Result(name, settings, options.json, options.quick)
    with processes(options.quick) as pool:
        bench = Bench(result, pool, options.portraits, options.quick)
        if options.many:
            bench.many_steps()
            result.finish()
            return
        bench.references()
        for task in tasks:
            bench.degraded(task)
            for nfe in options.nfe:
                bench.methods(task, nfe, options.methods)
            if "DSG" in options.methods and not options.quick:
                bench.few_steps(task)
        if options.open and "DSG" in options.methods and not options.quick:
            bench.diversity(OPEN)
    result.finish(draw, (tasks, options.methods, options.nfe) == (whole, list(METHODS), list(NFE)))


if __name__ == "__main__":
    main()
