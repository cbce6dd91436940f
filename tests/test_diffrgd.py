"""DiffRGD against a loop that follows the paper and an exact posterior, on mixtures of Gaussians and a U-Net."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import comfy.samplers
import gaussian_mixture
import pytest
import torch
from sphereguide import host
from sphereguide.losses.base import Loss, Step
from sphereguide.samplers.diffrgd import Riemannian, descended, riemannian_guided
from sphereguide.samplers.dps import Posterior, posterior_guided
from sphereguide.samplers.kernel import GRADIENTS
from sphereguide.samplers.trace import GuidanceTrace
from test_dps import MOVABLE
from test_dsg import TARGET, Distance, Indifferent, unguided
from test_reference import SHAPE, TIMES, Small, World, agree, with_noise
from test_samplers import TYPES, OnePrompt
from torch import Tensor

SAMPLERS = [name for name in MOVABLE if name != "exp_heun_2_x0_sde"]
"""Those whose steps show their mean."""


@pytest.fixture(scope="module")
def model():
    return gaussian_mixture.patcher()


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def run(model, name="euler_ancestral", loss=None, settings=None, options=None, **kwargs):
    trace = GuidanceTrace()
    with torch.inference_mode():
        riemannian = Riemannian(Distance() if loss is None else loss, **{"step_size": 0.5, **(settings or {})})
    sampler = riemannian_guided(comfy.samplers.ksampler(name, dict(options or {})), riemannian, trace)
    return gaussian_mixture.sample(sampler, model, **kwargs), trace


# -- the formula -------------------------------------------------------------------------------------------------------


def test_a_step_stays_on_the_sphere_and_moves_along_its_tangent():
    u, g = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    moved = descended(u, g, 0.4)
    for i in range(3):  # one sample at a time, vector by vector
        a, b = u[i].flatten(), g[i].flatten()
        tangent = b - (b @ a) * a / (a @ a)
        assert abs(tangent @ a) < 1e-12
        expected = a.norm() * (a - 0.4 * tangent) / (a - 0.4 * tangent).norm()
        torch.testing.assert_close(moved[i].flatten(), expected)
        torch.testing.assert_close(moved[i].norm(), u[i].norm())


@pytest.mark.parametrize("steps", [1, 3])
def test_it_is_the_papers_algorithm(world: World, steps: int) -> None:
    """Algorithm 1 of arXiv 2606.28417 in its state √ᾱ·x₀ + √(1−ᾱ)·ε, with DDIM at η = 1 and a network that gives ε."""
    eta, loss = 2.0, Small()
    x, states = world.start, []
    alphas = [float(world.alphas[t]) for t in TIMES] + [1.0]

    def clean(x, time, alpha):
        return (x - math.sqrt(1 - alpha) * world.epsilon(x, time)) / math.sqrt(alpha)

    for i, (time, (alpha, alpha_next)) in enumerate(zip(TIMES, itertools.pairwise(alphas), strict=True)):
        states.append(x)
        eps, x0 = world.epsilon(x, time), clean(x, time, alpha)
        sigma = math.sqrt((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next))
        mean = math.sqrt(alpha_next) * x0 + math.sqrt(max(0.0, 1 - alpha_next - sigma**2)) * eps
        if sigma == 0:
            x = mean
            continue
        x = mean + sigma * world.noise[i]
        for j in range(SHAPE[0]):
            one = slice(j, j + 1)
            radius = (x[one] - mean[one]).norm()
            for _ in range(steps):
                with torch.enable_grad(), torch.autograd.graph.allow_mutation_on_saved_tensors():
                    free = x.clone().requires_grad_()
                    (g,) = torch.autograd.grad(loss(clean(free, TIMES[i + 1], alpha_next))[j], free)
                u, g = (x - mean)[one], g[one]
                u = u - eta * (g - (g * u).sum() / (u * u).sum() * u)
                x = x.clone()
                x[one] = mean[one] + radius * u / u.norm()
    states.append(x)

    with torch.inference_mode():
        riemannian = Riemannian(Small(), step_size=eta, iterations=steps)
    sampler = riemannian_guided(with_noise("euler_ancestral", world.noise), riemannian, GuidanceTrace())
    agree(world.ours(sampler, [world.sigma(alpha) for alpha in alphas]), states)


# -- what the sampler adds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", TYPES)
@pytest.mark.parametrize("name", host.stochastic_samplers())
def test_the_mean_is_that_of_the_samplers_own_step(name, prediction):
    """x less c·ε does not depend on ε, with any sampler and any way of predicting."""
    patcher = gaussian_mixture.patcher(prediction)
    seen = {}

    def means(number, loud):
        """Those of the first draws up to that one, in which ε is `loud` and another."""

        def spying(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None, **options):
            found, draws = [], []
            shares = host.rehearsed(function, model, sigmas, options).shares

            class Spy:
                def __getattr__(self, attribute):
                    return getattr(model, attribute)

                def __call__(self, x, sigma, **extra_args):
                    if draws and len(found) < len(draws):
                        found.append(x.clone() - shares[len(draws) - 1] * draws[-1])
                    return model(x, sigma, **extra_args)

            def draw(sigma, sigma_next):
                generator = torch.Generator().manual_seed(len(draws) + (100 if len(draws) == number and loud else 0))
                noise = torch.randn(x.shape, generator=generator)
                draws.append(noise.clone())
                return noise

            x = function(Spy(), x, sigmas, extra_args=extra_args, callback=callback, disable=True, noise_sampler=draw)
            seen["draws"] = len(draws)
            return x, found[: number + 1]

        function = comfy.samplers.sampler_object(name).sampler_function
        caught = []

        def sampler(*args, **kwargs):
            x, found = spying(*args, **kwargs)
            caught.extend(found)
            return x

        scheduler = "simple" if prediction in ("FLOW", "FLUX") else "exponential"
        gaussian_mixture.sample(
            comfy.samplers.KSAMPLER(sampler), patcher, steps=6, scheduler=scheduler, guider=OnePrompt
        )
        return caught

    for number in (0, 2):
        one, other = means(number, False), means(number, True)
        if len(one) <= number:
            pytest.skip("draws less")
        scale = max(1.0, float(one[number].abs().max()))
        assert (one[number] - other[number]).abs().max() < 2e-4 * scale


# -- the sampler -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("off", ["step_size", "iterations"])
def test_strength_zero_is_the_unguided_sampler_bit_for_bit(model, name, off):
    latent, trace = run(model, name, settings={off: 0}, batch=2)
    assert torch.equal(latent, unguided(model, name, batch=2))
    assert not trace


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_loss_falls_with_every_sampler_and_the_radius_stays(model, name):
    schedule = {"batch": 4, "steps": 20, "scheduler": "exponential"}
    latent, trace = run(model, name, **schedule)
    loss = Distance()
    assert (loss(latent) < loss(unguided(model, name, **schedule))).all()
    assert len({step.step for step in trace.steps}) >= 5
    assert (torch.tensor([step.radius for step in trace.steps]) - 1).abs().max() < 1e-3
    assert not any(any(step.skipped) for step in trace.steps)
    assert torch.equal(latent, run(model, name, **schedule)[0])


@pytest.mark.parametrize("prediction", TYPES)
@pytest.mark.parametrize("name", ["ddpm", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "lcm"])
def test_every_way_of_predicting(name, prediction):
    scheduler = "simple" if prediction in ("FLOW", "FLUX") else "exponential"
    schedule = {"batch": 8, "steps": 12, "scheduler": scheduler}
    patcher = gaussian_mixture.patcher(prediction)
    latent, trace = run(patcher, name, settings={"step_size": 0.3}, **schedule)
    assert Distance()(latent).mean() < Distance()(unguided(patcher, name, **schedule)).mean()
    assert trace and not any(any(step.skipped) for step in trace.steps)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_each_gradient_mode_lowers_the_loss_under_cfg(model, gradient):
    latent, _ = run(model, settings={"gradient": gradient}, batch=4, cfg=3.0)
    assert (Distance()(latent) < Distance()(unguided(model, batch=4, cfg=3.0))).all()


def test_a_batch_is_its_samples(model):
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


def test_interval_and_range_choose_the_steps_of_dsg(model):
    for settings, expected in (({}, range(7)), ({"interval": 3}, (0, 3, 6))):
        _, trace = run(model, settings=settings, steps=8)
        assert [step.step for step in trace.steps] == [step for step in expected for _ in range(3)]
    percent = {"start_percent": 0.3, "end_percent": 0.8}
    _, trace = run(model, settings=percent, steps=8)
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "normal", 8).tolist()
    start, end = (float(model.model.model_sampling.percent_to_sigma(p)) for p in percent.values())
    wanted = [i for i, sigma in enumerate(sigmas[:-1]) if end <= sigma <= start]
    assert wanted and sorted({step.step for step in trace.steps}) == wanted


def test_a_schedule_that_ends_early_is_guided_to_its_end(model, monkeypatch):
    whole = comfy.samplers.calculate_sigmas(model.model.model_sampling, "normal", 8)
    monkeypatch.setattr(comfy.samplers, "calculate_sigmas", lambda *args: whole[:5])
    latent, trace = run(model, batch=2)
    assert sorted({step.step for step in trace.steps}) == [0, 1, 2, 3]
    assert trace.steps[-1].sigma == pytest.approx(float(whole[4]))
    assert (latent != unguided(model, batch=2)).all()


# -- masks, NaN, memory ------------------------------------------------------------------------------------------------


def test_a_denoise_mask_keeps_its_region_and_guides_the_rest(model):
    mask = torch.zeros(2, 1, 2, 2)
    mask[..., 0] = 1
    kwargs = {"batch": 2, "latent": torch.randn(2, *gaussian_mixture.SHAPE), "denoise_mask": mask}
    result, trace = run(model, **kwargs)
    torch.testing.assert_close(result[..., 1], kwargs["latent"][..., 1], rtol=1e-4, atol=1e-4)
    assert (torch.tensor([step.radius for step in trace.steps]) - 1).abs().max() < 1e-4
    assert (Distance()(result) < Distance()(unguided(model, **kwargs))).all()


def test_a_mask_that_leaves_nothing_free_leaves_the_latent_alone(model):
    latent = torch.randn(1, *gaussian_mixture.SHAPE)
    result, trace = run(model, latent=latent, denoise_mask=torch.zeros(1, 1, 2, 2))
    torch.testing.assert_close(result, latent, rtol=1e-4, atol=1e-4)
    assert all(step.skipped == [True] for step in trace.steps)


class Broken(Distance):
    """NaN for the second sample."""

    def forward(self, latents, step=None):
        return super().forward(latents) * torch.tensor([1.0, torch.nan])


def test_nan_moves_nothing_and_is_said(model, caplog):
    latent, trace = run(model, loss=Broken(), batch=2)
    assert torch.equal(latent[1], unguided(model, batch=2)[1])
    torch.testing.assert_close(latent[0], run(model, batch=2)[0][0], rtol=1e-4, atol=1e-5)
    assert all(step.skipped == [False, True] for step in trace.steps)
    assert "DiffRGD Guidance: in 21 of 21 guided steps" in caplog.text


@pytest.mark.parametrize("iterations", [1, 3])
def test_a_guided_step_takes_k_model_calls_and_the_samplers_own(model, iterations):
    before = model.model.calls
    run(model, settings={"iterations": iterations}, steps=8)
    assert model.model.calls - before == 8 + 7 * iterations


@pytest.mark.parametrize("name", SAMPLERS)
def test_where_nothing_moves_the_sampler_is_answered_from_the_call_before(model, name):
    """As many calls as unguided, and its bits: each step after a guided one takes what was asked at its state."""
    plain = unguided(model, name, batch=2)
    before = model.model.calls
    unguided(model, name, batch=2)
    own, before = model.model.calls - before, model.model.calls
    latent, trace = run(model, name, Indifferent(), batch=2)
    assert model.model.calls - before == own
    assert torch.equal(latent, plain)
    assert trace and all(all(step.skipped) for step in trace.steps)


def test_a_call_at_another_state_or_level_is_not_answered_from_memory(model):
    def thrice(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
        for sigma, sigma_next in itertools.pairwise(sigmas):
            sigma = sigma.expand(len(x))
            levels = (x, sigma), (x, 0.9 * sigma), (x + 0.1, sigma)
            x = sum(model(*at, **extra_args) for at in levels) / 3
            x = x + sigma_next * noise_sampler(sigma, sigma_next)
        return x

    generator = torch.Generator()
    options = {"noise_sampler": lambda *_: torch.randn(1, *gaussian_mixture.SHAPE, generator=generator)}
    sampler, calls = comfy.samplers.KSAMPLER(thrice, options), []
    latents = []
    for sampled in (sampler, riemannian_guided(sampler, Riemannian(Indifferent()), GuidanceTrace())):
        generator.manual_seed(3)
        before = model.model.calls
        latents.append(gaussian_mixture.sample(sampled, model))
        calls.append(model.model.calls - before)
    assert torch.equal(*latents)
    assert calls == [24, 24]  # the first call of a step is at the state that was asked about, the others are not


def test_a_sampler_that_hides_its_noise_is_refused(model):
    def hides(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
        for sigma, sigma_next in itertools.pairwise(sigmas):
            denoised = model(x, sigma.expand(len(x)), **extra_args)
            x = denoised + noise_sampler(sigma, sigma_next) * sigma_next / denoised.abs().mean()
        return x

    samplers = [comfy.samplers.KSAMPLER(hides)]
    if "exp_heun_2_x0_sde" in comfy.samplers.KSampler.SAMPLERS:
        samplers.append(comfy.samplers.sampler_object("exp_heun_2_x0_sde"))
    for sampler in samplers:
        guided = riemannian_guided(sampler, Riemannian(Distance()), GuidanceTrace())
        with pytest.raises(ValueError, match="does not show the mean of its step"):
            gaussian_mixture.sample(guided, model)


# -- what it achieves --------------------------------------------------------------------------------------------------


class KnownHalf(Loss):
    """‖A·x̂₀ − y‖ of a measurement y of half of the coordinates, that leaves one mode of the mixture."""

    space = "latent"
    noise = 0.05

    def __init__(self, modes: Tensor) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        truth, noise = (torch.randn(1, *gaussian_mixture.SHAPE, generator=generator) for _ in range(2))
        known = torch.zeros(gaussian_mixture.SHAPE)
        known[..., 0] = 1
        self.register_buffer("known", known)
        self.register_buffer("y", known * (modes[1] + gaussian_mixture.STD * truth + self.noise * noise))
        prior = gaussian_mixture.STD**2
        share = known * prior / (prior + self.noise**2)
        self.register_buffer("mean", modes[1] + share * (self.y - modes[1]))  # of the posterior, a Gaussian
        self.register_buffer("std", (prior * (1 - share)).sqrt())

    def forward(self, latents: Tensor, step: Step | None = None) -> Tensor:
        return torch.linalg.vector_norm((self.known * (latents - self.y)).flatten(1), dim=1)

    def distance(self, latents: Tensor) -> float:
        """Root mean square over the coordinates of the Wasserstein-2 distance to the posterior, of Gaussians."""
        square = (latents.mean(0) - self.mean) ** 2 + (latents.std(0) - self.std) ** 2
        return float(square.mean().sqrt())


@pytest.fixture(scope="module")
def measured(model) -> KnownHalf:
    return KnownHalf(model.model.diffusion_model.means.detach().clone() + 0.3)


def distances(model, measured: KnownHalf, steps: int, guide: Callable[..., Any] | None, kind: Any, *settings) -> float:
    """That of 256 samples by ddpm, at the best of the settings."""
    found = []
    for chosen in settings or ({},):
        sampler = comfy.samplers.ksampler("ddpm")
        if guide is not None:
            sampler = guide(sampler, kind(measured, **chosen), GuidanceTrace())
        found.append(
            measured.distance(gaussian_mixture.sample(sampler, model, batch=256, steps=steps, scheduler="karras"))
        )
    return min(found)


DPS_GRID = [{"step_size": size} for size in (0.1, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0)]


def test_samples_are_nearer_to_the_posterior_than_unguided_ones_and_those_of_dps(model, measured):
    plain = distances(model, measured, 20, None, None)
    dps = distances(model, measured, 20, posterior_guided, Posterior, *DPS_GRID)
    ours = distances(model, measured, 20, riemannian_guided, Riemannian, {"step_size": 1.0})
    assert ours < 0.5 * dps < 0.25 * plain
