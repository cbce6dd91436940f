"""The update rules of DSG, ADM-ES and AMED as their papers write them, against ours in ComfyUI's samplers.

Plain loops over ᾱ, with the state √ᾱ·x₀ + √(1−ᾱ)·ε and a network that gives ε, on the same small U-Net and noise.

What the official code does otherwise, and what SphereGuide does instead:

    DSG         norms over the whole batch; a full-radius step at the end. Here: per sample; no noise, no guidance there
    AMED        predictors as pickled programs, a bottleneck of both halves under CFG. Here: the conditional half
    DPM-Solver++ multistep, third order: half of the second derivative. Here: all of it (tests/test_amed.py)
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from sphereguide.losses.base import Loss
from sphereguide.samplers import epsilon
from sphereguide.samplers.amed.predictor import AMEDPredictor, AMEDSettings
from sphereguide.samplers.amed.sampling import amed_sampler
from sphereguide.samplers.dsg import Guidance, guided
from sphereguide.samplers.epsilon import EpsilonScaling, with_post_cfg
from sphereguide.samplers.trace import GuidanceTrace
from torch import Tensor

SHAPE = (2, 4, 16, 16)
TIMES = (999, 800, 600, 400, 200, 20)


class Small(Loss):
    """‖y − A(x̂₀)‖ of each sample, with A the mean of blocks of four."""

    space = "latent"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("y", torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9)))

    def forward(self, latents: Tensor, step: Any = None) -> Tensor:
        return torch.linalg.vector_norm((F.avg_pool2d(latents, 2) - self.y.to(latents)).flatten(1), dim=1)


class World:
    """The MODEL as a node gets it, and its network with weights that autograd takes."""

    def __init__(self) -> None:
        self.patcher = tiny_models.sd15()
        self.conditioning = tiny_models.conditioning()
        self.network = copy.deepcopy(self.patcher.model.diffusion_model).requires_grad_(False)
        self.context = self.conditioning[0][0].clone().expand(SHAPE[0], -1, -1)
        self.alphas = 1 / (1 + self.patcher.model.model_sampling.sigmas.double().clone() ** 2)
        self.noise = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in range(len(TIMES))]

    def epsilon(self, x: Tensor, time: float) -> Tensor:
        """ε_θ(x_t, t)."""
        return self.network(x, torch.full((len(x),), float(time)), context=self.context)

    def sigma(self, alpha: float) -> float:
        return math.sqrt((1 - alpha) / alpha)

    def ours(self, sampler: comfy.samplers.KSAMPLER, sigmas: list[float]) -> list[Tensor]:
        """The states that ComfyUI's sampler passes through, as √ᾱ·x₀ + √(1−ᾱ)·ε, and its result."""
        states = []

        def note(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
            states.append(x.clone() / math.sqrt(1 + sigmas[step] ** 2))

        with torch.inference_mode():
            latent = torch.zeros(SHAPE)
            last = comfy.sample.sample_custom(
                self.patcher, self.start / self.scale(sigmas), 1.0, sampler, torch.tensor(sigmas), self.conditioning,
                self.conditioning, latent, callback=note, disable_pbar=True, seed=0,
            )  # fmt: skip
            last = self.patcher.model.process_latent_in(last) / math.sqrt(1 + sigmas[-1] ** 2)
        return [state.clone() for state in (*states, last)]

    @property
    def start(self) -> Tensor:
        return torch.randn(SHAPE, generator=torch.Generator().manual_seed(77))

    def scale(self, sigmas: list[float]) -> float:
        """ComfyUI begins at sigma·noise, or √(1 + sigma²)·noise at the largest sigma: the state is `start` in both."""
        sampling = self.patcher.model.model_sampling
        one = torch.ones(1)
        begun = sampling.noise_scaling(
            torch.tensor(sigmas[:1]), one, torch.zeros(1), sigmas[0] > sampling.sigma_max - 1e-3
        )
        return float(begun) / math.sqrt(1 + sigmas[0] ** 2)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def with_noise(name: str, noise: list[Tensor]) -> comfy.samplers.KSAMPLER:
    left = iter(noise)
    return comfy.samplers.ksampler(name, {"noise_sampler": lambda *_: next(left).clone()})


def agree(found: list[Tensor], wanted: list[Tensor]) -> None:
    """To 1e-5 of their range, after each step."""
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_dsg_is_the_papers_ddim_step(world: World) -> None:
    """Equations 2 and 12 to 14 of arXiv 2402.03201, with DDIM at η = 1."""
    rate, loss, n = 0.2, Small(), math.prod(SHAPE[1:])
    x, states = world.start, []
    alphas = [float(world.alphas[t]) for t in TIMES] + [1.0]
    for i, (time, (alpha, alpha_next)) in enumerate(zip(TIMES, itertools.pairwise(alphas), strict=True)):
        states.append(x)
        with torch.enable_grad(), torch.autograd.graph.allow_mutation_on_saved_tensors():
            x_t = x.clone().requires_grad_()
            eps = world.epsilon(x_t, time)
            x0 = (x_t - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
            (g,) = torch.autograd.grad(loss(x0).sum(), x_t)
        eps, x0 = eps.detach(), x0.detach()
        sigma = math.sqrt((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next))
        mean = math.sqrt(alpha_next) * x0 + math.sqrt(max(0.0, 1 - alpha_next - sigma**2)) * eps
        if sigma == 0:
            x = mean
            continue
        radius = math.sqrt(n) * sigma
        steepest = -radius * g / g.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        sampled = sigma * world.noise[i]
        mixed = sampled + rate * (steepest - sampled)
        x = mean + radius * mixed / mixed.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    states.append(x)

    with torch.inference_mode():
        guidance = Guidance(Small(), guidance_rate=rate, rate_steps=0)
    sampler = guided(with_noise("euler_ancestral", world.noise), guidance, GuidanceTrace())
    agree(world.ours(sampler, [world.sigma(alpha) for alpha in alphas]), states)


@pytest.mark.parametrize("k", [0.0, 0.003])
def test_epsilon_scaling_is_adm_es(world: World, k: float) -> None:
    """DDPM's posterior with ε/λ(t), λ = k·t + b over the respaced steps (arXiv 2308.15321, equation 12)."""
    b, x, states = 1.02, world.start, []
    alphas = [float(world.alphas[t]) for t in TIMES] + [1.0]
    for i, (time, (alpha, alpha_next)) in enumerate(zip(TIMES, itertools.pairwise(alphas), strict=True)):
        states.append(x)
        eps = world.epsilon(x, time) / (k * (len(TIMES) - 1 - i) + b)
        x0 = x / math.sqrt(alpha) - math.sqrt(1 / alpha - 1) * eps
        beta = 1 - alpha / alpha_next
        mean = (
            math.sqrt(alpha_next) * beta / (1 - alpha) * x0 + math.sqrt(1 - beta) * (1 - alpha_next) / (1 - alpha) * x
        )
        variance = beta * (1 - alpha_next) / (1 - alpha)
        x = mean + math.sqrt(variance) * world.noise[i]
    states.append(x)

    def schedule(sigmas: list[float]) -> epsilon.EpsilonSchedule:
        return epsilon.linear(k, b, sigmas)

    sampler = with_post_cfg(with_noise("ddpm", world.noise), EpsilonScaling(schedule))
    agree(world.ours(sampler, [world.sigma(alpha) for alpha in alphas]), states)


@pytest.mark.parametrize("student", ["amed", "dpm2", "euler", "ipndm"])
@pytest.mark.parametrize("afs", [False, True])
def test_amed_is_the_papers_algorithm(world: World, student: str, afs: bool) -> None:
    """Algorithm 2 of arXiv 2312.00094, its directions being ε_θ and its times √((1−ᾱ)/ᾱ)."""
    times = (14.6, 4.0, 1.0, 0.2)
    settings = AMEDSettings(
        student, "polynomial", 7.0, times, afs, 4 if student == "ipndm" else 1, scale_dir=0.1, scale_time=0.3
    )
    predictor = AMEDPredictor.untrained(settings)
    sampling = world.patcher.model.model_sampling
    seen: list[Tensor] = []

    def state(x: Tensor, t: Tensor) -> Tensor:
        return x / (1 + t**2).sqrt()

    def direction(x: Tensor, t: Tensor) -> Tensor:
        """ε_θ at time t of √(1 + t²)·x_t."""
        with torch.inference_mode():
            index = sampling.timestep(t[:, 0, 0, 0]).float().clone()
        return world.network(state(x, t), index.clone(), context=world.context)

    def asked(x: Tensor, t: Tensor, factor: Tensor) -> Tensor:
        """(x − D(x, factor·t))/t: the network is told factor·t, and the quotient is by t."""
        return factor * direction(x, factor * t)

    adams = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
    hook = world.network.middle_block[-1].register_forward_hook(lambda module, given, output: seen.append(output))
    x = world.start * math.sqrt(1 + times[0] ** 2)
    states, history = [state(x, torch.tensor(times[0]))], []
    one = torch.ones(SHAPE[0], 1, 1, 1)
    try:
        for i, (now, after) in enumerate(itertools.pairwise(times)):
            t, t_next = now * one, after * one
            if afs and i == 0:
                d, features = x / (1 + t**2).sqrt(), torch.zeros(SHAPE[0], 64)
            else:
                seen.clear()
                d = direction(x, t)
                features = F.adaptive_avg_pool2d(seen[0].mean(1, keepdim=True), 8).flatten(1)
            chosen = predictor.network(features, t[:, 0, 0, 0], t_next[:, 0, 0, 0])
            r, scale_dir, scale_time = (value.reshape(-1, 1, 1, 1) for value in chosen)
            t_mid = t_next**r * t ** (1 - r)
            if student == "ipndm":
                history.insert(0, d)
                d_used = sum(c * h for c, h in zip(adams[min(4, len(history))], history, strict=False))
                x_mid = x + (t_mid - t) * d_used
                history.insert(0, asked(x_mid, t_mid, scale_time))
                d_used = sum(c * h for c, h in zip(adams[min(4, len(history))], history, strict=False))
                x = x_mid + scale_dir * (t_next - t_mid) * d_used
            else:
                x_mid = x + (t_mid - t) * d
                d_mid = asked(x_mid, t_mid, scale_time)
                if student == "amed":
                    x = x + scale_dir * (t_next - t) * d_mid
                elif student == "dpm2":
                    x = x + scale_dir * (t_next - t) * (d_mid / (2 * r) + (1 - 1 / (2 * r)) * d)
                else:
                    x = x_mid + scale_dir * (t_next - t_mid) * d_mid
            states.append(state(x, t_next))
    finally:
        hook.remove()
    found = world.ours(amed_sampler(predictor), list(times))
    agree(found, states)
