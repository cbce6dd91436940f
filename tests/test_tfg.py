"""TFG and its corners against loops that follow their papers, on a small U-Net and on mixtures of Gaussians."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import comfy.samplers
import gaussian_mixture
import pytest
import torch
from sphereguide.losses.base import Loss
from sphereguide.samplers.dps import Posterior, posterior_guided
from sphereguide.samplers.kernel import GRADIENTS, noise_of
from sphereguide.samplers.tfg import PRESETS, Unified, unified_guided
from sphereguide.samplers.trace import GuidanceTrace
from test_diffrgd import DPS_GRID, KnownHalf, distances
from test_dps import MOVABLE
from test_dsg import TARGET, Distance, Indifferent, unguided
from test_reference import SHAPE, TIMES, Small, World, agree, with_noise
from test_samplers import TYPES
from torch import Tensor

STRONG = {"rho": 0.3, "mu": 0.2, "sigma_bar": 0.1, "samples": 2, "n_iter": 2}


@pytest.fixture(scope="module")
def model():
    return gaussian_mixture.patcher()


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def run(model, name="euler_ancestral", loss=None, settings=None, options=None, **kwargs):
    trace = GuidanceTrace()
    with torch.inference_mode():
        unified = Unified(Distance() if loss is None else loss, **(STRONG if settings is None else settings))
    sampler = unified_guided(comfy.samplers.ksampler(name, dict(options or {})), unified, trace)
    return gaussian_mixture.sample(sampler, model, **kwargs), trace


# -- the papers' loops, in the state √ᾱ·x₀ + √(1−ᾱ)·ε ------------------------------------------------------------------


class Paper:
    """What the papers' algorithms are made of."""

    def __init__(self, world: World) -> None:
        self.world, self.loss = world, Small()
        self.alphas = [float(world.alphas[t]) for t in TIMES] + [1.0]
        self.seed, self.calls = 0, 0

    def clean(self, x: Tensor, i: int) -> Tensor:
        """x̂₀."""
        alpha = self.alphas[i]
        return (x - math.sqrt(1 - alpha) * self.world.epsilon(x, TIMES[i])) / math.sqrt(alpha)

    def gradient(self, value: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
        with torch.enable_grad(), torch.autograd.graph.allow_mutation_on_saved_tensors():
            at = at.clone().requires_grad_()
            return torch.autograd.grad(value(at).sum(), at)[0]

    def ddim(self, x: Tensor, epsilon: Tensor, i: int, noise: Tensor) -> Tensor:
        """Equation 12 of DDIM's paper at η = 1."""
        alpha, alpha_next = self.alphas[i : i + 2]
        sigma = math.sqrt((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next))
        x0 = (x - math.sqrt(1 - alpha) * epsilon) / math.sqrt(alpha)
        ahead = math.sqrt(alpha_next) * x0 + math.sqrt(max(0.0, 1 - alpha_next - sigma**2)) * epsilon
        return ahead + sigma * noise

    def again(self, x_next: Tensor, i: int, noise: Tensor) -> Tensor:
        a = self.alphas[i] / self.alphas[i + 1]
        return math.sqrt(a) * x_next + math.sqrt(1 - a) * noise

    def deltas(self, i: int, sigma_bar: float, samples: int) -> list[Tensor]:
        """σ̄·√(1−ᾱ)·δ, with the noise that ours takes."""
        self.calls += 1
        if not sigma_bar:
            return [torch.zeros(1)]
        noise = noise_of((samples, 1, *SHAPE[1:]), self.seed, self.calls, 1, 1)
        return list(sigma_bar * math.sqrt(1 - self.alphas[i]) * noise)

    def log_mean(self, x0: Tensor, deltas: list[Tensor]) -> Tensor:
        """log f̃."""
        return torch.stack([torch.exp(-self.loss(x0 + delta).double()) for delta in deltas]).mean(0).log()

    def sampled(self, step: Callable[[Tensor, int, Tensor], Tensor], n_recur: int = 1) -> list[Tensor]:
        """The states, with `step(x, i, noise)` for a step of the paper."""
        x, states = self.world.start, []
        for i in range(len(TIMES)):
            for repetition in range(n_recur - 1):
                forth, back = noise_of((2, *SHAPE), self.seed, i, repetition)
                x = self.again(step(x, i, forth), i, back)
            states.append(x)
            x = step(x, i, self.world.noise[i])
        return [*states, x]

    def ours(self, **settings: Any) -> list[Tensor]:
        with torch.inference_mode():
            unified = Unified(Small(), **settings)
        sampler = unified_guided(with_noise("euler_ancestral", self.world.noise), unified, GuidanceTrace())
        return self.world.ours(sampler, [self.world.sigma(alpha) for alpha in self.alphas])


@pytest.mark.parametrize("sigma_bar, samples", [(0.0, 1), (0.5, 3)])
@pytest.mark.parametrize("rho, mu", [(0.7, 0.0), (0.0, 0.5), (0.7, 0.5)])
@pytest.mark.parametrize("n_recur", [1, 3])
def test_it_is_the_papers_algorithm(world, sigma_bar, samples, rho, mu, n_recur):
    """Algorithm 1 of arXiv 2409.15761 with its schedules: ρ_t and μ_t grow like α_t, at a mean of ρ and μ."""
    paper = Paper(world)
    a = [one / other for one, other in itertools.pairwise(paper.alphas)]

    def step(x, i, noise):
        deltas = paper.deltas(i, sigma_bar, samples)
        rho_t, mu_t = (value * a[i] * len(a) / sum(a) for value in (rho, mu))
        outer = rho_t * paper.gradient(lambda x: paper.log_mean(paper.clean(x, i), deltas), x)
        x0, inner = paper.clean(x, i), 0
        for _ in range(2):
            inner = inner + mu_t * paper.gradient(lambda x0: paper.log_mean(x0, deltas), x0 + inner)
        x_next = paper.ddim(x, world.epsilon(x, TIMES[i]), i, noise)
        return x_next + outer / math.sqrt(a[i]) + math.sqrt(paper.alphas[i + 1]) * inner

    settings = {"rho": rho, "mu": mu, "sigma_bar": sigma_bar, "samples": samples, "n_iter": 2, "n_recur": n_recur}
    agree(paper.ours(**settings), paper.sampled(step, n_recur))


@pytest.mark.parametrize("name", ["dpm_2_ancestral", "dpmpp_2s_ancestral"])
def test_ugd_guides_samplers_that_ask_below_where_the_step_ends(model, name):
    settings, schedule = {"preset": "UGD", "rho": 0.3, "mu": 0.2}, {"batch": 16, "steps": 20}
    taken = []
    for one in ("euler_ancestral", name):
        latent, _ = run(model, one, settings=settings, **schedule)
        taken.append(Distance()(unguided(model, one, **schedule)).mean() - Distance()(latent).mean())
    assert taken[1] > 0.7 * taken[0] > 0.1


def test_dps_is_its_corner(world):
    """Algorithm 1 of arXiv 2209.14687."""
    paper = Paper(world)

    def step(x, i, noise):
        g = paper.gradient(lambda x: paper.loss(paper.clean(x, i)), x)
        return paper.ddim(x, world.epsilon(x, TIMES[i]), i, noise) - 0.6 * g

    agree(paper.ours(preset="DPS", rho=0.6, mu=9.0, sigma_bar=9.0, n_recur=9), paper.sampled(step))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", MOVABLE)
def test_the_dps_corner_is_dps_guidance(model, name, gradient):
    schedule = {"batch": 2, "steps": 6, "scheduler": "exponential", "cfg": 2.0}
    latent, trace = run(model, name, settings={"preset": "DPS", "rho": 0.3, "gradient": gradient}, **schedule)
    other = GuidanceTrace()
    sampler = posterior_guided(
        comfy.samplers.ksampler(name), Posterior(Distance(), step_size=0.3, gradient=gradient), other
    )
    torch.testing.assert_close(latent, gaussian_mixture.sample(sampler, model, **schedule), rtol=1e-4, atol=1e-5)
    for found, wanted in zip(trace.steps, other.steps, strict=True):
        assert (found.step, found.sigma) == (wanted.step, wanted.sigma)
        assert found.loss == pytest.approx(wanted.loss, rel=1e-3, abs=1e-4)


def test_lgd_mc_is_its_corner(world):
    """x_next + ρ·∇ₓ log mean exp(−L(x̂₀ + r_t·δ)), r_t = σ/√(1 + σ²) (Song et al., ICML 2023)."""
    paper = Paper(world)

    def step(x, i, noise):
        sigma = world.sigma(paper.alphas[i])
        deltas = [sigma / math.sqrt(1 + sigma**2) * delta for delta in noise_of((4, 1, *SHAPE[1:]), 0, i + 1, 1, 1)]
        g = paper.gradient(lambda x: paper.log_mean(paper.clean(x, i), deltas), x)
        return paper.ddim(x, world.epsilon(x, TIMES[i]), i, noise) + 0.6 * g

    agree(paper.ours(preset="LGD-MC", rho=0.6, mu=9.0, samples=4), paper.sampled(step))


def test_freedom_is_its_corner(world):
    """Algorithm 2 of arXiv 2303.09833: ρ_t = √ᾱ·ρ, each step undone and done again."""
    paper = Paper(world)

    def step(x, i, noise):
        g = paper.gradient(lambda x: paper.loss(paper.clean(x, i)), x)
        return paper.ddim(x, world.epsilon(x, TIMES[i]), i, noise) - 0.6 * math.sqrt(paper.alphas[i]) * g

    agree(paper.ours(preset="FreeDoM", rho=0.6, mu=9.0, sigma_bar=9.0, n_recur=3), paper.sampled(step, 3))


def test_mpgd_is_its_corner(world):
    """Algorithm 1 of arXiv 2311.16424: x̂₀ moves, and the step goes on from it with the same ε̂."""
    paper = Paper(world)

    def step(x, i, noise):
        eps = world.epsilon(x, TIMES[i])
        x0 = paper.clean(x, i)
        x0 = x0 - 0.6 * paper.gradient(paper.loss, x0)
        alpha = paper.alphas[i]
        return paper.ddim(math.sqrt(alpha) * x0 + math.sqrt(1 - alpha) * eps, eps, i, noise)

    agree(paper.ours(preset="MPGD", mu=0.6, rho=9.0, n_iter=7, n_recur=3), paper.sampled(step))


@pytest.mark.parametrize("descents", [0, 1, 4])
def test_ugd_is_its_corner(world, descents):
    """Algorithm 1 of arXiv 2302.07121: both guidances move ε̂, and the step is taken with that."""
    paper, strength = Paper(world), 0.2

    def step(x, i, noise):
        alpha = paper.alphas[i]
        g = paper.gradient(lambda x: paper.loss(paper.clean(x, i)), x)
        eps = world.epsilon(x, TIMES[i]) + strength * math.sqrt(1 - alpha) * g
        x0, delta = paper.clean(x, i), 0
        for _ in range(descents):
            delta = delta - strength * paper.gradient(paper.loss, x0 + delta)
        return paper.ddim(x, eps - math.sqrt(alpha / (1 - alpha)) * delta, i, noise)

    settings = {"rho": strength, "mu": strength, "n_iter": descents, "sigma_bar": 9.0, "n_recur": 2}
    agree(paper.ours(preset="UGD", **settings), paper.sampled(step, 2))


# -- the sampler -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MOVABLE)
@pytest.mark.parametrize(
    "settings", [{"rho": 0.0}, {"rho": 0.0, "mu": 1.0, "n_iter": 0}, {"preset": "DPS", "rho": 0.0}]
)
def test_strength_zero_is_the_unguided_sampler_bit_for_bit(model, name, settings):
    latent, trace = run(model, name, settings={"n_recur": 3, **settings}, batch=2)
    assert torch.equal(latent, unguided(model, name, batch=2))
    assert not trace


@pytest.mark.parametrize("name", MOVABLE)
@pytest.mark.parametrize("n_recur", [1, 2])
def test_the_loss_falls_with_every_sampler(model, name, n_recur):
    schedule = {"batch": 4, "steps": 20, "scheduler": "exponential"}
    latent, trace = run(model, name, settings={**STRONG, "n_recur": n_recur}, **schedule)
    loss = Distance()
    assert (loss(latent) < loss(unguided(model, name, **schedule))).all()
    assert len({step.step for step in trace.steps}) >= 5
    assert not any(any(step.skipped) for step in trace.steps)
    assert torch.equal(latent, run(model, name, settings={**STRONG, "n_recur": n_recur}, **schedule)[0])


@pytest.mark.parametrize("prediction", TYPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_corner_with_every_way_of_predicting(preset, prediction):
    scheduler = "simple" if prediction in ("FLOW", "FLUX") else "exponential"
    schedule = {"batch": 8, "steps": 12, "scheduler": scheduler}
    patcher = gaussian_mixture.patcher(prediction)
    settings = {**STRONG, "preset": preset, "n_recur": 2}
    latent, trace = run(patcher, "ddpm", settings=settings, **schedule)
    assert latent.isfinite().all()
    assert Distance()(latent).mean() < Distance()(unguided(patcher, "ddpm", **schedule)).mean()
    assert trace and not any(any(step.skipped) for step in trace.steps)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_single_step_of_a_flow_model_begins_at_pure_noise(preset):
    settings = {**STRONG, "preset": preset, "n_recur": 2}
    latent, trace = run(gaussian_mixture.patcher("FLOW"), settings=settings, steps=1, scheduler="simple")
    assert latent.isfinite().all() and len(trace.steps) == 1


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_each_gradient_mode_lowers_the_loss_under_cfg(model, gradient):
    latent, _ = run(model, settings={**STRONG, "gradient": gradient}, batch=4, cfg=3.0)
    assert (Distance()(latent) < Distance()(unguided(model, batch=4, cfg=3.0))).all()


def test_a_batch_is_its_samples(model):
    """Their δ is the same for all, so that none depends on its neighbours."""
    targets = torch.stack([TARGET, -TARGET, 2 * TARGET])
    noise = torch.randn(3, *gaussian_mixture.SHAPE, generator=torch.manual_seed(1))
    draws = [torch.randn(3, *gaussian_mixture.SHAPE) for _ in range(20)]

    def sample(which):
        left = iter(draws)
        options = {"noise_sampler": lambda sigma, sigma_next: next(left)[which].clone()}
        latent = torch.zeros_like(noise[which])
        return run(model, loss=Distance(targets[which]), options=options, noise=noise[which], latent=latent)[0]

    together = sample(slice(None))
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], sample(slice(i, i + 1)), rtol=1e-4, atol=1e-5)


def test_interval_and_range_choose_the_steps(model):
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "normal", 8)
    percent = {"start_percent": 0.3, "end_percent": 0.9}
    start, end = (float(model.model.model_sampling.percent_to_sigma(p)) for p in percent.values())
    _, trace = run(model, settings={**STRONG, "interval": 2, **percent}, steps=8)
    wanted = [i for i, sigma in enumerate(sigmas[:-1].tolist()) if end <= sigma <= start and i % 2 == 0]
    assert wanted and [step.step for step in trace.steps] == wanted


def test_a_denoise_mask_keeps_its_region(model):
    mask = torch.zeros(2, 1, 2, 2)
    mask[..., 0] = 1
    kwargs = {"batch": 2, "latent": torch.randn(2, *gaussian_mixture.SHAPE), "denoise_mask": mask}
    result, trace = run(model, settings={**STRONG, "n_recur": 2}, **kwargs)
    torch.testing.assert_close(result[..., 1], kwargs["latent"][..., 1], rtol=1e-4, atol=1e-4)
    assert trace and (Distance()(result) < Distance()(unguided(model, **kwargs))).all()


class Broken(Distance):
    """NaN for the second sample, from its given call on."""

    def __init__(self, first: int = 0) -> None:
        super().__init__()
        self.first, self.asked = first, 0

    def forward(self, latents, step=None):
        self.asked += 1
        return super().forward(latents) * torch.tensor([1.0, torch.nan if self.asked > self.first else 1.0])


@pytest.mark.parametrize("first", [0, 1])
def test_nan_moves_nothing_and_is_said(model, caplog, first):
    settings = {"rho": 0.3, "mu": 0.2, "n_iter": 3}
    latent, trace = run(model, loss=Broken(first), settings=settings, batch=2)
    assert torch.equal(latent[1], unguided(model, batch=2)[1])
    torch.testing.assert_close(latent[0], run(model, settings=settings, batch=2)[0][0], rtol=1e-4, atol=1e-5)
    assert all(step.skipped == [False, True] for step in trace.steps)
    assert "TFG Guidance: in 8 of 8 guided steps" in caplog.text


def test_a_zero_gradient_moves_nothing(model):
    latent, trace = run(model, loss=Indifferent(), batch=2)
    assert torch.equal(latent, unguided(model, batch=2))
    assert all(step.skipped == [True, True] for step in trace.steps)


@pytest.mark.parametrize("n_recur", [1, 3])
@pytest.mark.parametrize("settings", [STRONG, {"preset": "MPGD", "mu": 0.2}, {"preset": "DPS"}])
def test_a_guided_step_takes_as_many_model_calls_as_it_is_done_times(model, settings, n_recur):
    """N_iter and the samples of δ ask the loss, not the model."""
    before = model.model.calls
    run(model, settings={**settings, "n_recur": n_recur}, steps=8)
    times = n_recur if "preset" not in settings else 1
    assert model.model.calls - before == 8 * times


def test_the_loss_is_asked_as_often_as_the_formula_needs_it(model):
    """Once for each δ: at x̂₀, which serves Δ_t and the first ascent, and for each further ascent."""
    for settings, times in ((STRONG, 2 * 2), ({"preset": "MPGD", "mu": 0.2}, 1), ({"preset": "DPS"}, 1)):
        loss = Broken(10**6)
        run(model, loss=loss, settings=settings, batch=2, steps=8)
        assert loss.asked == 8 * times


def test_without_rho_there_is_no_backward_pass_through_the_model(model):
    recorded = []
    patcher = gaussian_mixture.patcher()
    apply_model = patcher.model.apply_model

    def spy(x, t, c_crossattn=None, **kwargs):
        recorded.append(torch.is_grad_enabled() and x.requires_grad)
        return apply_model(x, t, c_crossattn=c_crossattn, **kwargs)

    patcher.model.apply_model = spy
    run(patcher, settings={"preset": "MPGD", "mu": 0.2, "gradient": "full"})
    assert recorded and not any(recorded)
    run(patcher, settings={"preset": "DPS", "mu": 0.2, "gradient": "full"})
    assert any(recorded)


class Noisy(Loss):
    """A loss on the noisy latent, as of a noise-aware classifier."""

    space = "noisy"

    def forward(self, latents, step=None):
        return (latents - 1).flatten(1).square().sum(1)


def test_a_loss_on_noisy_latents_moves_by_rho_alone(model):
    latent, trace = run(model, loss=Noisy(), settings={"rho": 0.05, "mu": 5.0}, batch=2)
    assert trace and torch.equal(latent, run(model, loss=Noisy(), settings={"rho": 0.05}, batch=2)[0])
    assert Unified(Noisy(), rho=0.0, mu=1.0).off


# -- what it achieves --------------------------------------------------------------------------------------------------


def test_samples_are_nearer_to_the_posterior_than_unguided_ones_and_those_of_dps(model):
    measured = KnownHalf(model.model.diffusion_model.means.detach().clone() + 0.3)
    plain = distances(model, measured, 20, None, None)
    dps = distances(model, measured, 20, posterior_guided, Posterior, *DPS_GRID)
    ours = distances(model, measured, 20, unified_guided, Unified, {"rho": 0.2, "mu": 0.5})
    assert ours < 0.5 * dps < 0.25 * plain
