"""Finds the Epsilon Scaling that a model, its prompts, a sampler and a schedule need, from latents of real images.

Two things are measured.

    length   mean ‖ε̂‖/√n at each step: of ε̂(α·x₀ + σ·ε, σ) with real x₀, the training curve, and along the sampler's own
             trajectories, the sampling curve. Their ratio is λ(t) in the paper that this goes back to (Ning et al.,
             ICLR 2024, arXiv 2308.15321, section 4): it says at which steps the error is.
    power    of finished latents over channel and spatial frequency, beside that of the real ones: too little is a
             picture without detail, too much is grain. It says how much of a correction is needed, and which way.

The ratio alone can't say the latter. Where a sampler loses power since its steps are long, the model meets latents that
are too smooth, and a correction that mends them makes the sampling curve rise; where the prediction is too long by a
factor, the curve sinks below the training curve. So the strength of each schedule is fitted to the power (Gauss-Newton
on the logarithms, with the measured response of a small correction), and the best one is tried on other noise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import numpy as np
import torch
from torch import Tensor

from .. import host
from .epsilon import EpsilonScaling, EpsilonSchedule, with_post_cfg
from .kernel import levels, noise_of

__all__ = ["RUNS", "Calibration", "Curve", "calibrate", "log_power", "power"]

TRIES = 2
RUNS = 7 + 3 * TRIES
"""Passes over all samples: the training curve; then with the same noise no correction, a small one of each of the three
kinds, and what that suggests, again and again; and on other noise none and the best."""

BANDS = 8
PROBE = 0.01
FEWEST = 8
"""Real images: of fewer the bootstrap can't tell how they vary."""
FIRST, FURTHER = 0.1, 1.5
"""How far the first try goes at most, and each next one beyond what was tried: λ stays within 1 ± 0.1·1.5^TRIES."""


@dataclass(frozen=True)
class Curve:
    """A length over √n of each sample at each step, `[samples, steps]`, from noise to image; NaN where the model wasn't
    asked.
    """

    norms: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        return self.norms.mean(0)

    @property
    def error(self) -> np.ndarray:
        """The standard error of the mean."""
        return self.norms.std(0, ddof=1) / math.sqrt(len(self.norms))


@dataclass(frozen=True)
class Run:
    """What some samples were like.

    curve   ‖ε̂‖/√n
    state   ‖x‖/√n of what the model was shown
    power   of the finished latents, `[samples, C, bands]`; None of real latents with noise
    """

    curve: Curve
    state: Curve
    power: np.ndarray | None = None


@dataclass(frozen=True)
class Calibration:
    """What was found.

    sigmas      where the steps begin, from noise to image
    training    of real latents with noise
    before, after   what is sampled without correction and with the best, on the same noise
    real        power of the real latents, `[images, C, bands]`
    scales      λ at each step, fitted, for "uniform", "linear" and "measured"
    expected    how far from the real power each is expected to be
    b_errors    standard error of the uniform b: what the samples make of it, and what the real images do
    """

    sigmas: tuple[float, ...]
    training: Run
    before: Run
    after: Run
    real: np.ndarray
    scales: dict[str, np.ndarray]
    expected: dict[str, float]
    b_errors: tuple[float, float]

    @property
    def ratio(self) -> tuple[np.ndarray, np.ndarray]:
        """Sampling over training curve at each step, and its standard error."""
        return _ratio(self.before.curve, self.training.curve)

    @property
    def papers(self) -> EpsilonSchedule:
        """λ as the paper has it: the ratio itself, 1 where the model wasn't asked."""
        ratio, _ = self.ratio
        return _schedule(self.sigmas, np.where(np.isfinite(ratio), ratio, 1))

    def delta(self, run: Run) -> np.ndarray:
        """δ_t, the squared error of the standard deviation of x at each step (section 3 of the paper)."""
        return (run.state.mean - self.training.state.mean) ** 2

    @property
    def nearest(self) -> str:
        """The schedule that `after` was sampled with."""
        return min(self.expected, key=self.expected.__getitem__)

    @functools.cached_property
    def gain(self) -> tuple[float, float, float, float]:
        """Distance of the power from the real without correction and with the best; what that gains, its error."""
        rng, gains = np.random.default_rng(0), []
        off, on = (distance(run.power, self.real) for run in (self.before, self.after))
        for _ in range(200):  # the bootstrap: the same samples of both, since they share their noise
            of = rng.integers(len(self.before.power), size=len(self.before.power))
            real = self.real[rng.integers(len(self.real), size=len(self.real))]
            gains.append(distance(self.before.power[of], real) - distance(self.after.power[of], real))
        return off, on, off - on, float(np.std(gains))

    @property
    def pays(self) -> bool:
        """Whether the best is nearer to the real images than none, and a uniform b off 1, by twice their errors.

        The second since the gain is measured with the real images that were fitted to, and these are few.
        """
        _, _, gain, error = self.gain
        return gain > 2 * error and abs(self.scales["uniform"][0] - 1) > 2 * math.hypot(*self.b_errors)

    @property
    def schedule(self) -> EpsilonSchedule:
        """The best, or λ = 1."""
        scales = self.scales[self.nearest] if self.pays else np.ones(len(self.sigmas))
        return _schedule(self.sigmas, scales)

    @property
    def linear(self) -> tuple[float, float]:
        """(k, b) of the better of uniform and linear, or (0, 1)."""
        if not self.pays:
            return 0.0, 1.0
        scales = self.scales[min(("uniform", "linear"), key=lambda name: self.expected.get(name, math.inf))]
        return float(scales[0] - scales[-1]) / max(1, len(scales) - 1), float(scales[-1])


def power(latents: Tensor) -> np.ndarray:
    """Power of latents `[B, C, …, h, w]` by channel and spatial frequency, `[B, C, bands]`; the mean is left out."""
    spectrum = torch.fft.fft2(latents.cpu().float(), norm="ortho").abs().square()
    while spectrum.ndim > 4:
        spectrum = spectrum.mean(2)  # frames of a video
    rows, columns = (torch.fft.fftfreq(n) for n in spectrum.shape[-2:])
    frequency = (rows[:, None] ** 2 + columns**2).sqrt()  # cycles a latent pixel: 0.5 is the finest along an axis
    band = (frequency * 2 * BANDS).ceil().clamp(0, BANDS).long()
    bands = [spectrum[..., band == i].mean(-1) for i in range(1, BANDS + 1) if (band == i).any()]
    return torch.stack(bands, -1).double().numpy()


def log_power(sampled: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Logarithm of mean power over that of the real latents, `[C, bands]`: 0 is right."""
    return np.log(sampled.mean(0) / real.mean(0))


def distance(sampled: np.ndarray, real: np.ndarray) -> float:
    return float(np.sqrt(np.mean(log_power(sampled, real) ** 2)))


def calibrate(
    guider: Any,
    sampler: comfy.samplers.KSAMPLER,
    sigmas: Tensor,
    latents: Tensor,
    samples: int = 64,
    batch_size: int = 8,
    seed: int = 0,
    from_images: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Calibration:
    """The correction that this guider (a model, its prompts and cfg), sampler and schedule need.

    latents      `[R, C, …, h, w]` of real images, as ComfyUI passes them between nodes; R at least 8
    samples      of each of the `RUNS` runs
    from_images  whether sampling starts from the real latents with noise (image to image), or from noise alone
    progress     is told after each batch how many are done, of how many

    Raises ValueError for fewer than 8 images, for latents that hold none, are of another model or without detail, and
    for a schedule that has no step, does not end in an image, or has no step that can be corrected; RuntimeError where
    a run gives no finite picture, or does not ask the model at the steps' noise levels.
    """
    steps = tuple(sorted({sigma for sigma in sigmas[:-1].tolist() if sigma > 0}, reverse=True))
    if not steps:
        raise ValueError(
            "Calibrate Epsilon Scaling: the sigmas hold no step. Connect a schedule with a denoise above 0."
        )
    if sigmas[-1] > 0:
        raise ValueError(
            f"Calibrate Epsilon Scaling: the sigmas end at noise ({float(sigmas[-1]):g}), and only finished images can "
            "be compared with real ones. Connect the whole schedule, not the upper part of SplitSigmas."
        )
    real = _power_of_images(latents)
    _check_kind(latents, guider.model_patcher)
    runs = _Runs(guider, sampler, sigmas, steps, latents, samples, batch_size, seed, from_images, progress)
    training, before = runs.training(), runs.sampled(None)
    response, kinds = log_power(before.power, real), _kinds(len(steps), _ratio(before.curve, training.curve)[0])
    slopes = {}
    for name, (unit, _) in kinds.items():
        slopes[name] = log_power(runs.sampled(1 + unit).power, real) - response
    if not any(np.abs(slope).max() > 1e-6 for slope in slopes.values()):
        raise ValueError(
            "Calibrate Epsilon Scaling: no step of this schedule can be corrected. It has none but at pure noise: take "
            "more steps, or leave Epsilon Scaling out."
        )
    scales, expected = {}, {}
    for name, (_, of) in kinds.items():
        columns = np.stack([slopes[other].ravel() for other in of], 1)
        parts, *_ = np.linalg.lstsq(columns, -response.ravel(), rcond=1e-3)
        change = sum(part * kinds[other][0] for part, other in zip(parts, of, strict=True))
        inside = min(1.0, FIRST / max(np.abs(change).max(), 1e-9))
        change *= inside
        # Along this change the response is way·slope + way²·curvature: fitted to the small change and what was tried.
        small = PROBE / max(np.abs(change).max(), 1e-9)
        ways, found = [small], [small * inside * (columns @ parts).reshape(response.shape)]
        way = 1.0
        for _ in range(TRIES):
            ways.append(way)
            found.append(log_power(runs.sampled(1 + way * change).power, real) - response)
            slope, curvature = _parabola(ways, found)
            nexts = np.linspace(0, FURTHER * max(ways), 301)
            distances = [np.sqrt(np.mean((response + w * slope + w**2 * curvature) ** 2)) for w in nexts]
            way = float(nexts[np.argmin(distances)])
        scales[name] = 1 + way * change
        if name == "uniform":
            b_errors = _errors(before.power, real, (slope + 2 * way * curvature) / change[0])
        expected[name] = float(min(distances))
    best = scales[min(expected, key=expected.__getitem__)]
    before, after = (runs.sampled(one, stage=1) for one in (None, best))
    return Calibration(steps, training, before, after, real, scales, expected, b_errors)


def _parabola(ways: list[float], found: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Slope and curvature of the parabolas through 0 that come nearest to `found` at `ways`."""
    columns = np.stack([np.array(ways), np.array(ways) ** 2], 1)
    flat = np.stack([values.ravel() for values in found])
    (slope, curvature), *_ = np.linalg.lstsq(columns, flat, rcond=None)
    return slope.reshape(found[0].shape), curvature.reshape(found[0].shape)


def _power_of_images(latents: Tensor) -> np.ndarray:
    """Raises ValueError for latents that are none of several images."""
    title = "Calibrate Epsilon Scaling"
    if latents.is_nested or latents.ndim < 4:
        raise ValueError(
            f"{title}: these latents are no pictures ({latents.ndim} dimensions), so they have no detail. Connect "
            "those of an image model."
        )
    if torch.count_nonzero(latents) == 0:
        raise ValueError(f"{title}: the latent is empty. It needs real images: load some, and VAE Encode them.")
    if len(latents) < FEWEST:
        video = " A video VAE made one clip of them: encode them one by one, and join them with Latent Batch."
        raise ValueError(
            f"{title}: {len(latents)} real images can't say how such images vary. VAE Encode a batch of at least "
            f"{FEWEST}, better 32 or more.{video if latents.ndim == 5 and latents.shape[2] > 1 else ''}"
        )
    if max(latents.shape[-2:]) < 2:
        raise ValueError(f"{title}: the latents are of one pixel, and have no detail. VAE Encode larger images.")
    real = power(latents)
    if not np.isfinite(real).all() or not (real.mean(0) > 0).all():
        raise ValueError(
            f"{title}: the latents are not finite, or the same everywhere. VAE Encode real images, with a VAE in fp32 "
            "if they come out black."
        )
    return real


def _check_kind(latents: Tensor, patcher: Any) -> None:
    channels = patcher.model.latent_format.latent_channels
    if latents.shape[1] != channels:
        raise ValueError(
            f"Calibrate Epsilon Scaling: the latents have {latents.shape[1]} channels, and the model's have "
            f"{channels}. VAE Encode the images with this model's VAE."
        )
    if latents.ndim - 2 > host.latent_dimensions(patcher):
        raise ValueError(
            "Calibrate Epsilon Scaling: the latents are of a video, and the model draws images. VAE Encode images with "
            "this model's VAE."
        )


def _errors(sampled: np.ndarray, real: np.ndarray, slope: np.ndarray) -> tuple[float, float]:
    """Standard error of the uniform b by the bootstrap, over the samples and over the real images.

    `slope` is how the power answers to b where it is right.
    """
    rng = np.random.default_rng(0)

    def again(powers: np.ndarray) -> np.ndarray:
        return powers[rng.integers(len(powers), size=len(powers))]

    def b(response: np.ndarray) -> float:
        return -float((slope * response).sum() / (slope**2).sum())

    samples = [b(log_power(again(sampled), real)) for _ in range(200)]
    images = [b(log_power(sampled, again(real))) for _ in range(200)]
    return float(np.std(samples)), float(np.std(images))


def _kinds(steps: int, ratio: np.ndarray) -> dict[str, tuple[np.ndarray, tuple[str, ...]]]:
    """For each schedule a small change of λ, from noise to image, and which of them it is made of."""
    flat, tilt = np.full(steps, PROBE), PROBE * np.linspace(1, 0, steps)
    measured = np.where(np.isfinite(ratio), ratio, 1) - 1
    measured *= PROBE / max(np.sqrt(np.mean(measured**2)), 1e-9)
    limited = np.clip(measured, -3 * PROBE, 3 * PROBE)
    return {
        "uniform": (flat, ("uniform",)),
        "linear": (tilt, ("uniform", "linear")),
        "measured": (limited, ("measured",)),
    }


def _ratio(sampling: Curve, training: Curve) -> tuple[np.ndarray, np.ndarray]:
    value = sampling.mean / training.mean
    return value, value * np.hypot(sampling.error / sampling.mean, training.error / training.mean)


def _schedule(sigmas: tuple[float, ...], scales: np.ndarray) -> EpsilonSchedule:
    return EpsilonSchedule(sigmas[::-1], tuple(scales[::-1].tolist()))


def _length(noise: Tensor) -> Tensor:
    """‖ε̂‖/√n of each sample, `[B]`."""
    return noise.float().flatten(1).square().mean(1).sqrt()


@dataclass
class _Runs:
    """Draws what is compared: the arguments of `calibrate`."""

    guider: Any
    sampler: comfy.samplers.KSAMPLER
    sigmas: Tensor
    steps: tuple[float, ...]
    latents: Tensor
    samples: int
    batch_size: int
    seed: int
    from_images: bool
    progress: Callable[[int, int], None]
    done: int = 0

    def __post_init__(self) -> None:
        self.batches = [
            range(i, min(i + self.batch_size, self.samples)) for i in range(0, self.samples, self.batch_size)
        ]

    def training(self) -> Run:
        """What the model is shown in training, real latents with noise of each level, and what it predicts of them."""
        norms = []
        for batch in self.batches:
            noted = np.full((2, len(batch), len(self.steps)), np.nan)
            probe = host.Probe(functools.partial(_ask, self.steps, noted, (self.seed, 0, batch.start)))
            self._sample(batch, probe, self._real(batch), 0)
            norms.append(noted)
        return Run(*map(Curve, np.concatenate(norms, 1)))

    def sampled(self, scales: np.ndarray | None, stage: int = 0) -> Run:
        """Samples with λ = `scales` at the steps; those of a stage share their noise."""
        sampler = self.sampler
        if scales is not None:
            schedule = _schedule(self.steps, scales)
            sampler = with_post_cfg(sampler, EpsilonScaling(lambda _: schedule))
        norms, powers = [], []
        for batch in self.batches:
            noted = np.full((2, len(batch), len(self.steps)), np.nan)
            latent = self._real(batch)
            latent = latent if self.from_images else torch.zeros_like(latent)
            watched = with_post_cfg(sampler, functools.partial(_note, self.steps, noted))
            powers.append(power(self._sample(batch, watched, latent, 1 + stage)))
            norms.append(noted)
        run = Run(*map(Curve, np.concatenate(norms, 1)), np.concatenate(powers))
        if not np.isfinite(run.power).all() or not (run.power.mean(0) > 0).all():
            raise RuntimeError(
                "Calibrate Epsilon Scaling: the sampler gave latents that are not finite, or flat. Look at what the "
                "same sampler, steps and cfg give without calibration."
            )
        if not np.isfinite(run.curve.norms).any():
            raise RuntimeError(
                "Calibrate Epsilon Scaling: the sampler asked the model at none of the noise levels of the schedule, "
                "so there is nothing to compare. Take another sampler, such as euler."
            )
        return run

    def _real(self, batch: range) -> Tensor:
        return self.latents[[i % len(self.latents) for i in batch]]

    def _sample(self, batch: range, sampler: comfy.samplers.KSAMPLER, latent: Tensor, stage: int) -> Tensor:
        key = np.random.SeedSequence((self.seed, stage, batch.start)).generate_state(1, np.uint64)[0]
        seed = int(key) % 2**63
        # As ComfyUI's own nodes do: it seeds the generator that samplers of older hosts draw from.
        noise = comfy.sample.prepare_noise(latent, seed)
        latent = self.guider.sample(noise, latent, sampler, self.sigmas, disable_pbar=True, seed=seed)
        self.done += len(batch)
        self.progress(self.done, RUNS * self.samples)
        return latent


def _note(steps: tuple[float, ...], noted: np.ndarray, args: dict[str, Any], sigmas: list[float]) -> Tensor:
    """Notes ‖ε̂‖/√n and ‖x‖/√n of a model call. The last at a level stays: Heun's first is of the step before."""
    x, denoised, sigma = args["input"].detach(), args["denoised"].detach(), float(args["sigma"].max())
    step = min(range(len(steps)), key=lambda i: abs(sigma - steps[i]))
    if math.isclose(sigma, steps[step], rel_tol=1e-4):
        alpha, level = levels(args["model"].model_sampling, args["sigma"].max())
        noted[0, :, step] = _length((x - alpha * denoised) / level).cpu().numpy()
        noted[1, :, step] = _length(x).cpu().numpy()
    return args["denoised"]


def _ask(
    steps: tuple[float, ...],
    noted: np.ndarray,
    key: tuple[int, ...],
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any],
    callback: Any = None,
    disable: bool | None = None,
) -> Tensor:
    """A sampler function that asks the model about real latents with noise of each level, and leaves it at that."""
    sampling = host.base_model(model).model_sampling
    latent = next(link.latent_image for link in host.chain(model) if "latent_image" in vars(link))
    expected = 1 - 1 / (4 * x[0].numel())  # E‖ε‖/√n
    for i, step in enumerate(steps):
        sigma = sigmas.new_tensor(step)
        noise = noise_of(x.shape, *key, i).to(x)
        noised = sampling.noise_scaling(sigma, noise, latent)
        denoised = model(noised, sigma.expand(len(x)), **extra_args)
        alpha, level = levels(sampling, sigma)
        # ‖ε‖ is known in the mean, and what ‖ε̂‖ shares with it in each sample need not be measured.
        noted[0, :, i] = (_length((noised - alpha * denoised) / level) - _length(noise) + expected).cpu().numpy()
        noted[1, :, i] = _length(noised).cpu().numpy()
    return x
