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

SAMPLERS = [
    name
    for name in comfy.samplers.KSampler.SAMPLERS
    if host.keeps_changes(comfy.samplers.sampler_object(name)) and "cfg_pp" not in name
]
"""Those of *_cfg_pp turn what is asked into what is next by the other prompt."""
REFUSED = {"uni_pc", "uni_pc_bh2", "dpm_fast", "dpm_adaptive", "sa_solver", "sa_solver_pece"}


@pytest.fixture(scope="module")
def model():
    return gaussian_mixture.patcher()


@pytest.fixture(scope="module")
def reference():
    return torch.randn(1, *gaussian_mixture.SHAPE, generator=torch.Generator().manual_seed(5))


def sampler(name, reference, start=0.0, end=1.0):
    (node,) = ILVRReference().refer(comfy.samplers.sampler_object(name), {"samples": reference}, 2, start, end)
    return node


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_result_has_the_low_frequencies_of_the_reference(model, reference, name):
    x = gaussian_mixture.sample(sampler(name, reference), model, batch=2, steps=12)
    plain = gaussian_mixture.sample(comfy.samplers.sampler_object(name), model, batch=2, steps=12)
    wanted = low_pass(reference, 2)
    torch.testing.assert_close(low_pass(x, 2), wanted.expand_as(x), atol=2e-3, rtol=0)
    assert (low_pass(plain, 2) - wanted).abs().max() > 0.1


def test_no_sampler_is_left_out():
    plain = {name for name in comfy.samplers.KSampler.SAMPLERS if "cfg_pp" not in name}
    assert plain - REFUSED == set(SAMPLERS)
    for name in set(comfy.samplers.KSampler.SAMPLERS) - plain:
        assert host.keeps_changes(comfy.samplers.sampler_object(name), at_levels=True) is True


class Threshold:
    """Differential diffusion: the mask opens as the noise falls, and at the end all of it is open."""

    def __call__(self, sigma, mask, extra_options):
        return (mask >= (0.7 if sigma[0] > 1 else 0.3 if sigma[0] > 0 else 0.0)).float()


def test_a_mask_that_changes_with_the_noise_keeps_its_region_to_the_end(model, reference):
    changing, mask = model.clone(), torch.tensor([[0.0, 0.5], [0.0, 0.5]])[None, None]
    changing.model_options = {**model.model_options, "denoise_mask_function": Threshold()}
    latent = torch.full((1, *gaussian_mixture.SHAPE), 0.5)
    kept = gaussian_mixture.sample(sampler("euler", reference), changing, denoise_mask=mask, latent=latent)
    torch.testing.assert_close(kept[..., 0], latent[..., 0], rtol=0, atol=1e-5)
    assert (kept - latent)[..., 1].abs().max() > 0.05


@pytest.mark.parametrize("name", sorted(REFUSED & set(comfy.samplers.KSampler.SAMPLERS)))
def test_a_sampler_that_takes_its_state_from_elsewhere_is_refused(reference, name):
    with pytest.raises(ValueError, match=r"ILVR Reference changes the state.*does not go on from it.*such as euler"):
        sampler(name, reference)


@pytest.mark.parametrize("end", [0.5, 1.0])
def test_a_noise_mask_keeps_its_region(model, reference, end):
    mask = torch.zeros(1, 1, 2, 2)
    mask[..., 0] = 1
    latent = torch.full((1, *gaussian_mixture.SHAPE), 0.5)
    kept = gaussian_mixture.sample(sampler("euler", reference, end=end), model, denoise_mask=mask, latent=latent)
    torch.testing.assert_close(kept[..., 1], latent[..., 1])
    plain = gaussian_mixture.sample(comfy.samplers.ksampler("euler"), model, denoise_mask=mask, latent=latent)
    assert (kept - plain)[..., 0].abs().max() > 0.05


def states(model, sampler, scheduler="normal", **kwargs):
    """Those that the network is asked about with their noise levels, and the schedule."""
    asked, apply_model = [], model.model.apply_model

    def spy(x, t, *args, **kwargs):
        asked.append((x.clone(), float(t[0])))
        return apply_model(x, t, *args, **kwargs)

    model.model.apply_model = spy
    try:
        gaussian_mixture.sample(sampler, model, steps=12, scheduler=scheduler, **kwargs)
    finally:
        del model.model.apply_model
    return asked, comfy.samplers.calculate_sigmas(model.model.model_sampling, scheduler, 12).tolist()


@pytest.mark.parametrize(
    ("name", "prediction", "start"),
    [(name, "EPS", 0.0) for name in SAMPLERS]
    + [(name, prediction, 0.5) for name in ("euler", "dpmpp_2m") for prediction in ("EPS", "FLOW")],
)
def test_the_model_is_asked_about_states_with_the_low_frequencies_of_the_noised_reference(
    reference, name, prediction, start
):
    """q(y_t | y) in the model's own scale, with the noise of the seed and the step; before `start` nothing is done."""
    model = gaussian_mixture.patcher(prediction, comfy.latent_formats.SD15())
    sampling, scheduler = model.model.model_sampling, "simple" if prediction == "FLOW" else "exponential"
    asked, sigmas = states(model, sampler(name, reference, start), scheduler, seed=3)
    plain, _ = states(model, comfy.samplers.sampler_object(name), scheduler, seed=3)
    begun, steps = float(sampling.percent_to_sigma(start)), set()
    for (x, sigma), (without, _) in zip(asked, plain, strict=True):
        step = next((i for i, s in enumerate(sigmas[:-1]) if sigma == pytest.approx(s, rel=1e-4)), None)
        if sigma > begun or step == 0:
            assert torch.equal(x, without)
        elif step is not None:
            noise = noise_of((1, *gaussian_mixture.SHAPE), 3, step, 0, 1)
            noised = sampling.noise_scaling(torch.tensor(sigmas[step]), noise, 0.18215 * reference)
            torch.testing.assert_close(low_pass(x, 2), low_pass(noised, 2), rtol=1e-4, atol=1e-4)
            steps.add(step)
    assert steps == {i for i, s in enumerate(sigmas[:-1]) if i and s <= begun} and len(steps) >= 5


@pytest.mark.parametrize(("start", "end", "inside"), [(0.7, 1.0, False), (0.0, 0.8, True), (0.0, 1.0, True)])
def test_a_part_of_a_schedule_ends_refined_where_its_end_is_in_the_range(model, reference, start, end, inside):
    """The upper one of SplitSigmas."""
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "normal", 10)[:7]
    assert 0.7 < sigmas[-1] < 4
    found = []
    for chosen in (comfy.samplers.ksampler("euler"), sampler("euler", reference, start, end)):
        found.append(gaussian_mixture.sample(chosen, model, sigmas=sigmas, seed=3))
    plain, refined = found
    if not inside:
        assert torch.equal(refined, plain)
        return
    noise = noise_of((1, *gaussian_mixture.SHAPE), 3, 6, 0, 1)
    noised = reference + sigmas[-1] * noise
    torch.testing.assert_close(low_pass(refined, 2), low_pass(noised, 2), rtol=1e-4, atol=1e-4)


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
