"""DPS against a loop that follows the paper, on a mixture of Gaussians whose denoiser is exact."""

from __future__ import annotations

import itertools

import comfy.samplers
import gaussian_mixture
import pytest
import torch
from sphereguide import host
from sphereguide.nodes.guidance import DPSGuidance
from sphereguide.samplers.diffrgd import Riemannian, riemannian_guided
from sphereguide.samplers.dps import Posterior, posterior_guided
from sphereguide.samplers.dsg import Guidance, guided
from sphereguide.samplers.tfg import Unified, unified_guided
from sphereguide.samplers.trace import GuidanceTrace
from test_dsg import Distance, unguided

MOVABLE = [name for name in host.stochastic_samplers() if host.keeps_changes(comfy.samplers.sampler_object(name))]
"""Those that go on from a state that was moved."""


@pytest.fixture(scope="module")
def model():
    return gaussian_mixture.patcher()


def run(model, name="euler_ancestral", loss=None, settings=None, **kwargs):
    trace = GuidanceTrace()
    with torch.inference_mode():
        posterior = Posterior(Distance() if loss is None else loss, **(settings or {}))
    sampler = posterior_guided(comfy.samplers.ksampler(name), posterior, trace)
    return gaussian_mixture.sample(sampler, model, **kwargs), trace


def test_it_is_the_paper_in_the_state_of_unit_variance(model):
    """Ancestral (DDPM) steps of x̄ = x/√(1 + σ²), each followed by x̄ ← x̄ − ζ·∇_x̄ L, the last one too."""
    zeta, steps = 0.4, 6
    latent, trace = run(model, settings={"step_size": zeta}, steps=steps)
    assert [step.step for step in trace.steps] == list(range(steps))

    sampling = model.model.model_sampling
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    noise = torch.randn(1, *gaussian_mixture.SHAPE, generator=torch.manual_seed(1))
    x = sampling.noise_scaling(sigmas[:1], noise, torch.zeros_like(noise), True)
    torch.manual_seed(1)
    source = host.noise_source(comfy.samplers.sampler_object("euler_ancestral").sampler_function, x, sigmas, 1)
    denoise = gaussian_mixture.Denoiser()  # the same, made outside of inference mode
    for s, t in itertools.pairwise(sigmas):
        unit = (x / (1 + s**2).sqrt()).requires_grad_()
        x0 = denoise(unit * (1 + s**2).sqrt(), s[None], torch.tensor([0.3]), torch.ones(1))
        (g,) = torch.autograd.grad(Distance()(x0).sum(), unit)
        up = (t**2 * (s**2 - t**2) / s**2).sqrt()
        x0 = x0.detach()
        x = x0 + (x - x0) * (t**2 - up**2).sqrt() / s
        if t > 0:
            x = x + up * source(s, t)
        x = (x / (1 + t**2).sqrt() - zeta * g) * (1 + t**2).sqrt()
    torch.testing.assert_close(latent, x, rtol=1e-4, atol=1e-5)


def test_step_size_zero_is_the_unguided_sampler_bit_for_bit(model):
    latent, trace = run(model, settings={"step_size": 0.0}, batch=2)
    assert torch.equal(latent, unguided(model, batch=2))
    assert not trace


@pytest.mark.parametrize("name", MOVABLE)
def test_the_loss_falls_with_every_sampler(model, name):
    schedule = {"batch": 4, "steps": 20, "scheduler": "exponential"}
    latent, trace = run(model, name, settings={"step_size": 0.3}, **schedule)
    loss = Distance()
    assert (loss(latent) < loss(unguided(model, name, **schedule))).all()
    assert len({step.step for step in trace.steps}) >= 5


def test_each_sample_of_a_batch_is_guided_by_its_own_loss_alone(model):
    targets = torch.stack([torch.full(gaussian_mixture.SHAPE, value) for value in (-1.0, 0.5, 2.0)])
    noise = torch.randn(3, *gaussian_mixture.SHAPE, generator=torch.manual_seed(1))
    together, _ = run(model, "euler_ancestral", Distance(targets), noise=noise, latent=torch.zeros_like(noise))
    others = targets.clone()
    others[1] += 3
    changed, _ = run(model, "euler_ancestral", Distance(others), noise=noise, latent=torch.zeros_like(noise))
    torch.testing.assert_close(changed[[0, 2]], together[[0, 2]])
    assert not torch.allclose(changed[1], together[1], atol=0.1)


def test_a_schedule_that_ends_early_and_a_range(model):
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "normal", 8)
    percent = {"start_percent": 0.3, "end_percent": 0.9}
    start, end = (float(model.model.model_sampling.percent_to_sigma(p)) for p in percent.values())
    _, trace = run(model, settings={"interval": 2, **percent}, steps=8)
    wanted = [i for i, sigma in enumerate(sigmas[:-1].tolist()) if end <= sigma <= start and i % 2 == 0]
    assert wanted and [step.step for step in trace.steps] == wanted


def test_nan_moves_nothing_and_is_said(model, caplog):
    class Broken(Distance):
        def forward(self, latents, step=None):
            return super().forward(latents) * torch.tensor([1.0, torch.nan])

    latent, trace = run(model, "euler_ancestral", Broken(), batch=2)
    assert torch.equal(latent[1], unguided(model, batch=2)[1])
    assert all(step.skipped == [False, True] for step in trace.steps)
    assert "DPS Guidance: in 8 of 8 guided steps" in caplog.text


def test_a_denoise_mask_keeps_its_region(model):
    mask = torch.zeros(1, 1, 2, 2)
    mask[..., 0] = 1
    latent = torch.full((1, *gaussian_mixture.SHAPE), 0.5)
    result, trace = run(model, denoise_mask=mask, latent=latent)
    torch.testing.assert_close(result[..., 1], latent[..., 1])
    assert trace


def own_noise(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for i, sigma_next in enumerate(sigmas[1:]):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
        callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = denoised + sigma_next * torch.randn_like(x)
    return x


def silent(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for sigma in sigmas[:-1]:
        x = model(x, sigma * x.new_ones(len(x)), **extra_args)
    return x


def in_the_end(churn):
    """Two calls a step, the first above its level with churn; the callback comes after both, and counts from 1."""

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
        for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
            for level in (s * (1 + churn), (s * t) ** 0.5 if t > 0 else 0.9 * s):
                denoised = model(x, level * x.new_ones(len(x)), **extra_args)
            x = denoised + (x - denoised) * t / s
            callback({"x": x, "i": i + 1, "sigma": s, "sigma_hat": s, "denoised": denoised})
        return x

    return sample


@pytest.mark.parametrize(
    ("function", "keeps", "at_levels"),
    [(own_noise, None, None), (silent, None, None), (in_the_end(0.0), True, True), (in_the_end(0.02), True, False)],
)
def test_samplers_of_other_packs_are_told_from_those_that_take_no_notice(function, keeps, at_levels):
    sampler = comfy.samplers.KSAMPLER(function)
    assert [host.keeps_changes(sampler, at) for at in (False, True)] == [keeps, at_levels]


@pytest.mark.parametrize("churn", [0.0, 0.02])
def test_a_rehearsal_of_a_sampler_that_calls_back_in_the_end(model, churn):
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "normal", 5)
    assert host.rehearsed(in_the_end(churn), None, sigmas, {}).begins == {2 * i: i for i in range(5)}


def test_samplers_that_take_their_state_from_elsewhere_are_refused():
    refused = {"sa_solver", "sa_solver_pece"} & set(comfy.samplers.KSampler.SAMPLERS)
    assert set(MOVABLE) == set(host.stochastic_samplers()) - refused
    moving = [
        (posterior_guided, Posterior(Distance())),
        (unified_guided, Unified(Distance())),
        (riemannian_guided, Riemannian(Distance())),
        (guided, Guidance(Distance(), recurrence=1)),
    ]
    for name in refused:
        sampler = comfy.samplers.sampler_object(name)
        for steer, objective in moving:
            with pytest.raises(
                ValueError, match=rf"changes the state.*\({name}\) does not go on from it.*such as euler_ancestral\."
            ):
                steer(sampler, objective, GuidanceTrace())
        assert guided(sampler, Guidance(Distance()), GuidanceTrace())


def test_the_node_refuses_what_adds_no_noise():
    settings = {
        "step_size": 1.0,
        "interval": 1,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "gradient": "full",
        "checkpointing": False,
    }
    with pytest.raises(ValueError, match=r"DPS Guidance steers samplers that add noise.*\(euler\) adds none"):
        DPSGuidance().guide(comfy.samplers.sampler_object("euler"), Distance(), **settings)
    sampler, trace = DPSGuidance().guide(comfy.samplers.sampler_object("euler_ancestral"), Distance(), **settings)
    gaussian_mixture.sample(sampler, gaussian_mixture.patcher(), steps=4)
    assert len(trace.steps) == 4
