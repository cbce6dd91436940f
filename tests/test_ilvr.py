"""ILVR: the reference's low frequencies at every noise level of the schedule, whatever the sampler."""

from __future__ import annotations

import comfy.latent_formats
import comfy.samplers
import gaussian_mixture
import pytest
import torch
from sphereguide import host
from sphereguide.losses.base import Loss
from sphereguide.losses.measurement import low_pass
from sphereguide.nodes.reference import ILVRReference
from sphereguide.samplers.dsg import Guidance, guided
from sphereguide.samplers.ilvr import referenced
from sphereguide.samplers.kernel import noise_of
from sphereguide.samplers.trace import GuidanceTrace

SAMPLERS = ["euler", "heun", "dpmpp_2m", "euler_ancestral", "dpm_2_ancestral", "dpmpp_2m_sde", "lms"]


@pytest.fixture(scope="module")
def model():
    return gaussian_mixture.patcher()


@pytest.fixture(scope="module")
def reference():
    return torch.randn(1, *gaussian_mixture.SHAPE, generator=torch.Generator().manual_seed(5))


def sampler(name, reference, start=0.0, end=1.0):
    (node,) = ILVRReference().refer(comfy.samplers.ksampler(name), {"samples": reference}, 2, start, end)
    return node


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_result_has_the_low_frequencies_of_the_reference(model, reference, name):
    x = gaussian_mixture.sample(sampler(name, reference), model, batch=2, steps=12)
    plain = gaussian_mixture.sample(comfy.samplers.ksampler(name), model, batch=2, steps=12)
    wanted = low_pass(reference, 2)
    torch.testing.assert_close(low_pass(x, 2), wanted.expand_as(x), atol=2e-3, rtol=0)
    assert (low_pass(plain, 2) - wanted).abs().max() > 0.1


def states(model, sampler, **kwargs):
    """Those that the network is asked about, and the noise levels of the schedule."""
    asked, scheduler = [], "simple" if kwargs.pop("flow", False) else "normal"
    apply_model = model.model.apply_model

    def spy(x, *args, **kwargs):
        asked.append(x.clone())
        return apply_model(x, *args, **kwargs)

    model.model.apply_model = spy
    try:
        gaussian_mixture.sample(sampler, model, steps=12, scheduler=scheduler, **kwargs)
    finally:
        del model.model.apply_model
    return asked, comfy.samplers.calculate_sigmas(model.model.model_sampling, scheduler, 12)


@pytest.mark.parametrize("prediction", ["EPS", "FLOW"])
@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "dpmpp_2m"])
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_the_model_is_asked_about_states_with_the_low_frequencies_of_the_noised_reference(
    reference, prediction, name, start
):
    """q(y_t | y) in the model's own scale, with the noise of the seed and the step; before `start` nothing is done."""
    model = gaussian_mixture.patcher(prediction, comfy.latent_formats.SD15())
    sampling, flow = model.model.model_sampling, prediction == "FLOW"
    asked, sigmas = states(model, sampler(name, reference, start), seed=3, flow=flow)
    plain, _ = states(model, comfy.samplers.ksampler(name), seed=3, flow=flow)
    assert len(asked) == 12
    refined = [i for i in range(1, 12) if sigmas[i] <= float(sampling.percent_to_sigma(start))]
    assert refined == list(range(refined[0], 12)) and (refined[0] > 1) == (start > 0)
    for i, (x, without) in enumerate(zip(asked, plain, strict=True)):
        if i < refined[0]:
            assert torch.equal(x, without)
            continue
        noise = noise_of((1, *gaussian_mixture.SHAPE), 3, i)
        noised = sampling.noise_scaling(sigmas[i], noise, 0.18215 * reference)
        torch.testing.assert_close(low_pass(x, 2), low_pass(noised, 2))


def test_a_range_without_a_step_and_the_last_step_out_of_it(model, reference):
    plain = gaussian_mixture.sample(comfy.samplers.ksampler("euler"), model)
    assert torch.equal(gaussian_mixture.sample(sampler("euler", reference, 0.0, 1e-4), model), plain)
    early = gaussian_mixture.sample(sampler("euler", reference, 0.0, 0.5), model)
    assert not torch.equal(early, plain)
    assert (low_pass(early, 2) - low_pass(reference, 2)).abs().max() > 1e-2


def test_the_seed_reproduces_it_and_the_random_numbers_of_the_sampler_stay_its_own(model, reference):
    noise = torch.randn(1, *gaussian_mixture.SHAPE)
    runs = [gaussian_mixture.sample(sampler("euler", reference), model, seed=seed, noise=noise) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    gaussian_mixture.sample(sampler("euler", reference), model)
    after = torch.rand(1)
    gaussian_mixture.sample(comfy.samplers.ksampler("euler"), model)
    assert torch.equal(after, torch.rand(1))


def test_each_sample_has_its_reference_resized_to_the_latent(model):
    references = torch.stack([torch.full(gaussian_mixture.SHAPE, value) for value in (1.0, -1.0)])
    large = torch.nn.functional.interpolate(references, scale_factor=4.0)
    x = gaussian_mixture.sample(sampler("euler", large), model, batch=3, steps=12)
    assert [round(float(v), 2) for v in low_pass(x, 2).mean((1, 2, 3))] == [1.0, -1.0, 1.0]


class Distance(Loss):
    space = "latent"

    def forward(self, latents, step=None):
        return torch.linalg.vector_norm((latents - 2.0).flatten(1), dim=1)


def test_with_guidance_behind_it(model, reference):
    trace = GuidanceTrace()
    both = guided(sampler("euler_ancestral", reference), Guidance(Distance(), guidance_rate=0.3), trace)
    x = gaussian_mixture.sample(both, model, steps=12)
    assert len(trace.steps) == 11
    torch.testing.assert_close(low_pass(x, 2), low_pass(reference, 2), atol=2e-3, rtol=0)
    assert not torch.equal(x, gaussian_mixture.sample(sampler("euler_ancestral", reference), model, steps=12))
    assert host.adds_noise(sampler("euler_ancestral", reference)) is True
    assert host.adds_noise(sampler("euler", reference)) is False


def test_behind_guidance_it_says_which_way_round(model, reference):
    inner = guided(comfy.samplers.ksampler("euler_ancestral"), Guidance(Distance()), GuidanceTrace())
    with pytest.raises(ValueError, match="Connect the sampler to ILVR Reference, and that to DSG"):
        gaussian_mixture.sample(referenced(inner, reference, 2, 0.0, 1.0), model)


def test_a_sampler_that_hides_how_it_samples_is_refused(reference):
    with pytest.raises(ValueError, match=r"\(Sampler\) does not show how it samples\. Connect one of KSamplerSelect\."):
        ILVRReference().refer(comfy.samplers.Sampler(), {"samples": reference}, 2, 0.0, 1.0)


def test_what_can_not_be_a_reference_is_refused(model, reference):
    with pytest.raises(ValueError, match=r"\[1, 16, 2, 2\].*Encode the reference with this model's VAE"):
        gaussian_mixture.sample(sampler("euler", torch.zeros(1, 16, 2, 2)), model)
    with pytest.raises(ValueError, match=r"start_percent \(0.9\) is not before end_percent \(0.1\)"):
        sampler("euler", reference, 0.9, 0.1)
