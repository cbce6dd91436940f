"""Recurrence against a loop that follows the formulas, on a mixture of Gaussians whose denoiser is exact."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import comfy.samplers
import gaussian_mixture
import pytest
import torch
from comfy.k_diffusion import sampling as k_diffusion
from sphereguide import host
from sphereguide.samplers.dsg import Guidance, _Spherical, on_sphere
from sphereguide.samplers.kernel import steered
from sphereguide.samplers.trace import GuidanceTrace
from test_dps import MOVABLE
from test_dsg import Distance, Indifferent, run, unguided

#: The ancestral samplers of 2024 step wrongly in flow models, without guidance too.
TYPES = ["EPS", "V_PREDICTION", *(["FLOW"] if hasattr(k_diffusion, "sample_euler_ancestral_RF") else [])]


@pytest.fixture(scope="module")
def model():
    return gaussian_mixture.patcher()


@pytest.mark.parametrize("model_type", TYPES)
def test_repetitions_alone_leave_the_distribution_as_it_is(model_type):
    """A loss without a gradient: what goes forth and back again stays a sample of the model, at every noise level."""
    patcher = gaussian_mixture.patcher(model_type)
    schedule = {"batch": 4000, "steps": 150, "scheduler": "sgm_uniform" if model_type == "FLOW" else "exponential"}
    latent, trace = run(patcher, loss=Indifferent(), settings={"recurrence": 1, "gradient": "fast"}, **schedule)
    assert len(trace.steps) > 1.9 * schedule["steps"]
    mixture = patcher.model.diffusion_model
    means, weights = mixture.means.detach() + 0.3, mixture.log_weights.exp().reshape(-1, 1, 1, 1)
    mean = (weights * means).sum(0)
    variance = (weights * (means - mean) ** 2).sum(0) + gaussian_mixture.STD**2
    assert (latent.mean(0) - mean).abs().max() < 0.08
    assert (latent.var(0) / variance - 1).abs().max() < 0.12


def test_it_is_the_formula(model):
    """euler_ancestral with two repetitions of every guided step, written out."""
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "normal", 5)
    settings = {"guidance_rate": 0.3, "recurrence": 2, "recurrence_start": 0.2}
    calls = []

    class Spy(Distance):
        def forward(self, latents, step=None):
            calls.append(step.index)
            return super().forward(latents)

    latent, trace = run(model, loss=Spy(), settings=settings, steps=5)
    start = float(model.model.model_sampling.percent_to_sigma(0.2))
    travelled = [float(sigma) <= start for sigma in sigmas[:-2]]
    assert 0 < sum(travelled) < len(travelled)
    assert calls == [step for step, again in enumerate(travelled) for _ in range(3 if again else 1)]
    assert [step.step for step in trace.steps] == calls

    # The same by hand: the model's x̂₀ of each state, gradients from autograd.
    mixture = gaussian_mixture.Denoiser()  # the same, made outside of inference mode

    def denoise(x, sigma):
        return mixture(x, sigma[None], torch.tensor([0.3]), torch.ones(1))

    def direction(x, sigma):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(Distance()(denoise(x, sigma)).sum(), x)[0]

    noise = torch.randn(1, *gaussian_mixture.SHAPE, generator=torch.manual_seed(1))
    x = model.model.model_sampling.noise_scaling(sigmas[:1], noise, torch.zeros_like(noise), True)
    torch.manual_seed(1)
    source = host.noise_source(comfy.samplers.sampler_object("euler_ancestral").sampler_function, x, sigmas, 1)
    for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
        if t == 0:
            x = denoise(x, s)
            break
        for repetition in range(2 if travelled[i] else 0):
            forth, back = _Spherical._noise(SimpleNamespace(seed=1, step=i), x, repetition)
            up = (t**2 * (s**2 - t**2) / s**2).sqrt()
            x0 = denoise(x, s)
            down = x0 + (x - x0) * (t**2 - up**2).sqrt() / s
            x = down + up * on_sphere(forth, direction(x, s), 0.3) + (s**2 - t**2).sqrt() * back
        up = (t**2 * (s**2 - t**2) / s**2).sqrt()
        x0, g = denoise(x, s), direction(x, s)
        x = x0 + (x - x0) * (t**2 - up**2).sqrt() / s + up * on_sphere(source(s, t), g, 0.3)
    torch.testing.assert_close(latent, x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MOVABLE)
def test_every_sampler_goes_on_from_the_repeated_state(model, name):
    schedule = {"batch": 16, "steps": 10, "scheduler": "exponential"}
    settings, loss = {"guidance_rate": 0.3, "recurrence": 1}, Distance()
    latent, trace = run(model, name, settings=settings, **schedule)
    assert len(trace.steps) > len(run(model, name, settings={"guidance_rate": 0.3}, **schedule)[1].steps)
    assert loss(latent).mean() < loss(unguided(model, name, **schedule)).mean()
    assert torch.equal(latent, run(model, name, settings=settings, **schedule)[0])


#: Model calls of a step.
CALLS = {"euler_ancestral": 1, "dpm_2_ancestral": 2, "dpmpp_sde": 2, "exp_heun_2_x0_sde": 2, "seeds_2": 2, "seeds_3": 3}


@pytest.mark.parametrize("name", CALLS)
def test_a_rehearsal_tells_which_call_begins_a_step(model, name):
    """The second of exp_heun_2_x0_sde comes after the draw that leads to the next level, and at that level."""
    if name not in comfy.samplers.KSampler.SAMPLERS:
        pytest.skip("this ComfyUI has no such sampler")
    found, asked = [], []

    class Spy(_Spherical):
        def __call__(self, x, sigma, **extra_args):
            before = float(sigma.max())
            denoised = super().__call__(x, sigma, **extra_args)
            asked.append(before)
            found.append((self.step, self.begins_step))
            return denoised

    sampler = steered(comfy.samplers.sampler_object(name), Guidance(Distance()), GuidanceTrace(), Spy)
    gaussian_mixture.sample(sampler, model, steps=6)
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "normal", 6).tolist()
    assert found[: 5 * CALLS[name]] == [(i, call == 0) for i in range(5) for call in range(CALLS[name])]
    assert [asked[i * CALLS[name]] for i in range(5)] == pytest.approx(sigmas[:5])


def test_steps_that_are_not_guided_ask_the_model_once(model):
    apply_model = model.model.apply_model
    for settings, most in (({"interval": 5}, 20 + 4), ({"end_percent": 0.5}, 20 + 10)):
        asked = []
        model.model.apply_model = lambda *args, asked=asked, **kwargs: asked.append(1) or apply_model(*args, **kwargs)
        try:
            _, trace = run(model, settings={"guidance_rate": 0.3, "recurrence": 1, **settings}, steps=20)
        finally:
            del model.model.apply_model
        assert len(asked) == 20 + len(trace.steps) // 2 <= most


def test_auto_strength_begins_alike_in_the_step_and_its_repetitions(model):
    _, trace = run(model, settings={"auto_strength": 1.0, "recurrence": 2}, steps=10)
    rates = [step.rate[0] for step in trace.steps]
    tangent = 0.5 * 5**0.5 * math.exp(-0.625)
    assert rates[:3] == pytest.approx([tangent / (1 + tangent)] * 3, rel=1e-3)
    assert len({*rates}) > 3


def test_many_steps_of_strong_guidance_gain_by_it(model):
    schedule = {"batch": 256, "steps": 40, "scheduler": "exponential"}
    once, again = (run(model, settings={"guidance_rate": 0.3, "recurrence": r}, **schedule)[0] for r in (0, 3))
    assert Distance()(again).mean() < 0.95 * Distance()(once).mean()


def test_it_takes_no_noise_from_the_sampler(model):
    """A range without a step is no recurrence at all, to the bit; so is a strength of 0."""
    plain, _ = run(model)
    assert torch.equal(run(model, settings={"recurrence": 2, "recurrence_start": 0.9999})[0], plain)
    assert torch.equal(run(model, settings={"recurrence": 2, "guidance_rate": 0.0})[0], unguided(model))


def test_a_denoise_mask_keeps_its_region(model):
    mask = torch.zeros(1, 1, 2, 2)
    mask[..., 0] = 1
    latent = torch.full((1, *gaussian_mixture.SHAPE), 0.5)
    result, trace = run(model, settings={"recurrence": 2}, denoise_mask=mask, latent=latent)
    torch.testing.assert_close(result[..., 1], latent[..., 1])
    assert trace.steps
