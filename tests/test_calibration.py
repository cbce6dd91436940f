"""The calibration of Epsilon Scaling, on a model whose noise is known exactly and can be made too long or too short."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.samplers
import gaussian_mixture
import numpy as np
import pytest
import torch
from sphereguide.losses.base import Loss
from sphereguide.nodes import epsilon as nodes
from sphereguide.nodes.epsilon import EpsilonScalingCalibrate, EpsilonScalingModel, EpsilonScalingSampler
from sphereguide.nodes.guidance import DSGGuidanceModel
from sphereguide.samplers import calibration
from sphereguide.samplers.calibration import RUNS, Calibration, calibrate, distance, log_power, power
from sphereguide.samplers.dsg import Guidance, guided
from sphereguide.samplers.kernel import levels
from sphereguide.samplers.trace import GuidanceTrace
from torch import Tensor

STEPS, IMAGES = 8, 128
LARGEST = 0.1 * calibration.FURTHER**calibration.TRIES
"""λ is off 1 by at most this."""


@pytest.fixture(scope="module")
def model() -> Any:
    return gaussian_mixture.patcher()


@pytest.fixture(scope="module")
def real(model: Any) -> Tensor:
    """What the mixture draws with small steps."""
    with torch.inference_mode():
        return gaussian_mixture.sample(comfy.samplers.sampler_object("heun"), model, batch=IMAGES, steps=40)


@contextmanager
def noise_times(factor: float, model: Any) -> Iterator[None]:
    """The model predicts noise that is too long by that factor."""
    apply = model.model.apply_model

    def wrong(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        alpha, _ = levels(model.model.model_sampling, t.max())
        return (x - (x - alpha * apply(x, t, **kwargs)) * factor) / alpha

    model.model.apply_model = wrong
    try:
        yield
    finally:
        del model.model.apply_model


def recipe(model: Any, sampler: str = "euler", cfg: float = 1.0, steps: int = STEPS) -> tuple[Any, Any, Tensor]:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(gaussian_mixture.conditioning(0.0), gaussian_mixture.conditioning(-0.2))
    guider.set_cfg(cfg)
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "normal", steps)
    return guider, comfy.samplers.sampler_object(sampler), sigmas


def found(model: Any, latents: Tensor, samples: int = IMAGES, seed: int = 3, **settings: Any) -> Calibration:
    with torch.inference_mode():
        return calibrate(*recipe(model, **settings), latents, samples, 64, seed)


def node(model: Any, latents: Tensor, **settings: Any) -> dict[str, Any]:
    with torch.inference_mode():
        widgets = {
            "cfg": 1.0,
            "samples": IMAGES,
            "batch_size": 64,
            "calibration_seed": 3,
            "from_images": False,
        } | settings
        _, sampler, sigmas = recipe(model)
        conds = {name: gaussian_mixture.conditioning(0.0) for name in ("positive", "negative")}
        wires = {"model": model, "sampler": sampler, "sigmas": sigmas, "latents": {"samples": latents}}
        return EpsilonScalingCalibrate().calibrate(**wires, **conds, **widgets)


# -- what is measured --------------------------------------------------------------------------------------------------


def test_white_noise_has_power_1_at_every_frequency() -> None:
    noise = torch.randn(400, 3, 12, 20, generator=torch.Generator().manual_seed(0))
    spectrum = power(noise)
    assert spectrum.shape[:2] == (400, 3)
    np.testing.assert_allclose(spectrum.mean(0), 1, atol=0.15)
    np.testing.assert_allclose(power(2 * noise + 5), 4 * spectrum, rtol=1e-3)  # the mean does not count


def test_a_wave_has_its_power_in_the_band_of_its_frequency() -> None:
    x = torch.arange(32)
    for cycles, band in ((1, 0), (4, 1), (7, 3), (16, 7)):
        wave = torch.cos(2 * torch.pi * cycles * x / 32).expand(1, 1, 32, 32)
        assert power(wave)[0, 0].argmax() == band


def test_frames_of_a_video_are_averaged() -> None:
    frames = torch.randn(2, 3, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = np.mean([power(frames[:, :, i]) for i in range(5)], 0)
    np.testing.assert_allclose(power(frames), expected, rtol=1e-5)


def test_log_power_and_distance() -> None:
    real, half = np.full((4, 2, 3), 2.0), np.full((5, 2, 3), 1.0)
    np.testing.assert_allclose(log_power(half, real), -np.log(2))
    assert distance(half, real) == pytest.approx(np.log(2)) and distance(real, real) == 0


@pytest.mark.parametrize("factor", [0.97, 1.0, 1.05])
def test_the_training_curve_is_that_of_the_models_noise(model: Any, real: Tensor, factor: float) -> None:
    """By hand: the length of ε̂ of real latents with noise of that level, in the mean over much noise."""
    with noise_times(factor, model):
        curve = found(model, real).training.curve
    _, _, sigmas = recipe(model)
    generator = torch.Generator().manual_seed(8)
    for step in (1, STEPS - 2):
        sigma = sigmas[step]
        x0 = real.repeat(40, 1, 1, 1)
        x = x0 + sigma * torch.randn(x0.shape, generator=generator)
        with torch.inference_mode():
            shift = torch.zeros(len(x), 1, 1)
            denoised = model.model.apply_model(x, sigma.expand(len(x)), c_crossattn=shift)
        expected = factor * ((x - denoised) / sigma).flatten(1).square().mean(1).sqrt()
        assert abs(curve.mean[step] - float(expected.mean())) < 4 * curve.error[step] + 0.005


def test_the_first_step_sees_what_training_shows(model: Any, real: Tensor) -> None:
    """At the greatest noise there is no error to find yet, so that ratio and δ are 1 and 0."""
    result = found(model, real, samples=512)
    ratio, error = result.ratio
    assert abs(ratio[0] - 1) < 4 * error[0] + 0.01
    assert result.delta(result.before)[0] < 0.1  # of σ = 14.6


# -- what is fitted ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["EPS", "V_PREDICTION", "EDM"])
@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_noise_that_is_too_long_or_too_short_is_found_and_put_right(prediction: str, factor: float) -> None:
    if prediction not in comfy.model_base.ModelType.__members__:
        pytest.skip(f"this host has no {prediction}")
    model = gaussian_mixture.patcher(prediction)
    with torch.inference_mode():
        latents = gaussian_mixture.sample(comfy.samplers.sampler_object("heun"), model, batch=IMAGES, steps=40)
    right = found(model, latents, sampler="heun", steps=16)
    with noise_times(factor, model):
        result = found(model, latents, sampler="heun", steps=16)
    assert result.scales["uniform"][0] - right.scales["uniform"][0] == pytest.approx(factor - 1, abs=0.03)
    off, on, *_ = result.gain
    assert on < off


def test_a_right_model_with_small_steps_needs_nothing(model: Any, real: Tensor) -> None:
    result = found(model, real, sampler="heun", steps=16)
    assert not result.pays
    assert result.linear == (0.0, 1.0) and set(result.schedule.scales) == {1.0}


def test_the_schedules_are_what_they_are_called(model: Any, real: Tensor) -> None:
    with noise_times(1.1, model):
        result = found(model, real)
    assert np.ptp(result.scales["uniform"]) == pytest.approx(0, abs=1e-12)
    assert np.ptp(np.diff(result.scales["linear"])) == pytest.approx(0, abs=1e-12)
    assert all(abs(scales - 1).max() <= LARGEST + 1e-9 for scales in result.scales.values())
    assert result.pays
    best = result.scales[result.nearest]
    assert [result.schedule(sigma) for sigma in result.sigmas] == pytest.approx(best.tolist())
    k, b = result.linear
    assert 1.02 < b <= 1 + LARGEST and abs(k) < 0.02


def test_the_error_of_b_is_that_of_many_calibrations(model: Any, real: Tensor) -> None:
    """From the spread over seeds, with the real images all the same."""
    results = [found(model, real, seed=seed, sampler="heun") for seed in range(12)]
    expected = np.std([result.scales["uniform"][0] for result in results], ddof=1)
    told = np.mean([result.b_errors[0] for result in results])
    assert 0.5 * expected < told < 2 * expected


def test_what_it_returns_does_what_it_says(model: Any, real: Tensor) -> None:
    """With its schedule in the sampler's node, or the model's, the latents come as near as it says."""
    with noise_times(1.1, model), torch.inference_mode():
        result = found(model, real)
        guider, sampler, sigmas = recipe(model)
        settings = {"b": 1.0, "k": 0.0, "start_percent": 0.0, "end_percent": 1.0, "epsilon_schedule": result.schedule}
        (scaled,) = EpsilonScalingSampler().scale(sampler, schedule="measured", **settings)
        noise = torch.randn(512, *gaussian_mixture.SHAPE, generator=torch.Generator().manual_seed(5))
        plain, corrected = (
            guider.sample(noise, torch.zeros_like(noise), one, sigmas, disable_pbar=True, seed=5)
            for one in (sampler, scaled)
        )
        (patched,) = EpsilonScalingModel().scale(model, schedule="measured", **settings)
        other, *_ = recipe(patched)
        same = other.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=5)
    assert distance(power(corrected), power(real)) < 0.6 * distance(power(plain), power(real))
    torch.testing.assert_close(same, corrected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "ddpm", "dpmpp_2m", "heun", "uni_pc"])
def test_any_sampler_is_measured_at_each_of_its_steps(model: Any, real: Tensor, sampler: str) -> None:
    result = found(model, real, sampler=sampler, samples=32)
    asked = np.isfinite(result.before.curve.norms).all(0)
    assert asked[:-1].all()  # uni_pc leaves the last level out
    assert np.isfinite(result.ratio[0][asked]).all()


def test_the_same_seed_finds_the_same_and_another_something_else(model: Any, real: Tensor) -> None:
    first, again, other = (found(model, real, sampler="euler_ancestral", samples=16, seed=s) for s in (3, 3, 4))
    assert first.schedule == again.schedule and first.gain == again.gain
    np.testing.assert_array_equal(first.before.curve.norms, again.before.curve.norms)
    assert not np.array_equal(first.before.curve.norms, other.before.curve.norms)


def test_image_to_image_starts_from_the_images(model: Any, real: Tensor) -> None:
    guider, sampler, sigmas = recipe(model, steps=16)
    with torch.inference_mode():
        result = calibrate(guider, sampler, sigmas[10:], real, IMAGES, 64, 3, from_images=True)
    assert result.sigmas[0] == pytest.approx(float(sigmas[10]))
    assert abs(result.ratio[0][0] - 1) < 0.05
    assert result.delta(result.before)[0] < 0.01


def test_where_every_step_is_at_pure_noise_there_is_nothing_to_correct() -> None:
    if "FLOW" not in comfy.model_base.ModelType.__members__:
        pytest.skip("this host has no flow models")
    model = gaussian_mixture.patcher("FLOW")
    guider, sampler, _ = recipe(model)
    with pytest.raises(ValueError, match="no step of this schedule can be corrected"), torch.inference_mode():
        calibrate(guider, sampler, torch.tensor([1.0, 0.0]), torch.randn(16, *gaussian_mixture.SHAPE), 8)


def test_flow_models_are_calibrated() -> None:
    if "FLOW" not in comfy.model_base.ModelType.__members__:
        pytest.skip("this host has no flow models")
    model = gaussian_mixture.patcher("FLOW")
    with torch.inference_mode():
        latents = gaussian_mixture.sample(comfy.samplers.sampler_object("heun"), model, batch=IMAGES, steps=40)
    result = found(model, latents, steps=6)
    off, on, *_ = result.gain
    assert on < 0.7 * off and result.scales["uniform"][0] > 1  # long Euler steps lose power


class Brightness(Loss):
    space = "latent"

    def forward(self, latents: Tensor, step: Any = None) -> Tensor:
        return (latents - 1).flatten(1).norm(dim=1)


@pytest.mark.parametrize("gradient", ["full", "cond only", "fast"])
def test_a_guided_recipe_is_measured_as_it_is(model: Any, real: Tensor, gradient: str) -> None:
    guider, sampler, sigmas = recipe(model, "euler_ancestral", cfg=2.0)
    guidance = Guidance(Brightness(), guidance_rate=0.5, gradient=gradient)
    with torch.inference_mode():
        steered = calibrate(guider, guided(sampler, guidance, GuidanceTrace()), sigmas, real, 32, 32)
        plain = calibrate(guider, sampler, sigmas, real, 32, 32)
    assert np.isfinite(steered.ratio[0]).all()
    assert not np.allclose(steered.before.power, plain.before.power, rtol=0.05)
    np.testing.assert_allclose(steered.training.curve.norms, plain.training.curve.norms, rtol=1e-5)


def test_a_model_that_carries_guidance_is_measured(model: Any, real: Tensor) -> None:
    if importlib.util.find_spec("comfy.patcher_extension") is None:
        pytest.skip("this host has no comfy.patcher_extension")
    settings = {
        name: spec[1]["default"]
        for name, spec in DSGGuidanceModel.INPUT_TYPES()["required"].items()
        if len(spec) > 1 and "default" in spec[1]
    }
    with torch.inference_mode():
        patched = DSGGuidanceModel().guide(model=model, loss=Brightness(), **settings)[0]
        result = calibrate(*recipe(patched, "euler_ancestral"), real, 16, 16)
    assert np.isfinite(result.ratio[0]).all()


# -- the node ----------------------------------------------------------------------------------------------------------


def test_the_node_returns_what_plugs_into_the_others_and_says_what_it_found(model: Any, real: Tensor) -> None:
    with noise_times(1.1, model):
        out = node(model, real)
        result = found(model, real)
    b, k, schedule, picture, verdict, ratio = out["result"]
    assert ratio.scales == pytest.approx(result.ratio[0][::-1].tolist()) and ratio.sigmas == schedule.sigmas
    assert out["ui"]["text"] == [verdict]
    assert schedule == result.schedule and (k, b) == result.linear
    assert picture.shape == (1, 400, 1200, 3) and 0 <= picture.min() < picture.max() <= 1
    assert verdict.startswith(f"Use the schedule ({result.nearest})")
    off, on, *_ = result.gain
    assert f"{off:.3f} off" in verdict and f"{on:.3f} with it" in verdict
    for kind, error in zip(("samples", "real images"), result.b_errors, strict=True):
        assert f"{IMAGES} {kind} leave b uncertain by ± {error:.4f}: about " in verdict


def test_the_node_measures_what_its_widgets_say(model: Any, real: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {}

    def spy(guider: Any, sampler: Any, sigmas: Any, latents: Any, *settings: Any) -> Calibration:
        told.update(cfg=guider.cfg, settings=settings[:4])
        return calibrate(guider, sampler, sigmas, latents, *settings)

    monkeypatch.setattr(nodes, "calibrate", spy)
    node(model, real, cfg=3.0, samples=32, batch_size=16, calibration_seed=9, from_images=True)
    assert told == {"cfg": 3.0, "settings": (32, 16, 9, True)}


def test_the_node_says_when_the_correction_should_stay_off(model: Any, real: Tensor) -> None:
    out = node(model, real[:8], samples=8)
    b, k, schedule, _, verdict, _ = out["result"]
    assert (b, k, set(schedule.scales)) == (1.0, 0.0, {1.0})
    assert verdict.startswith("Leave the correction off") and "no evidence" in verdict
    assert re.search(r"8 samples leave b.*\n8 real images leave b", verdict)


def test_progress_is_told_to_the_end(model: Any, real: Tensor) -> None:
    told = []
    with torch.inference_mode():
        calibrate(*recipe(model), real, 10, 4, progress=lambda done, of: told.append((done, of)))
    assert told[-1] == (10 * RUNS, 10 * RUNS) and [done for done, _ in told] == sorted(done for done, _ in told)


def test_what_cannot_be_calibrated(model: Any, real: Tensor) -> None:
    with pytest.raises(ValueError, match="the latent is empty"):
        found(model, torch.zeros_like(real))
    with pytest.raises(ValueError, match="7 real images can't say"):
        found(model, real[:7])
    with pytest.raises(ValueError, match="A video VAE made one clip"):
        found(model, real.movedim(0, 1)[None])
    with pytest.raises(ValueError, match="no pictures"):
        found(model, real[..., 0])
    for wrong in (torch.full_like(real, torch.nan), torch.full_like(real, 0.06)):
        with pytest.raises(ValueError, match="not finite, or the same everywhere"):
            found(model, wrong)
    guider, sampler, sigmas = recipe(model)
    with pytest.raises(ValueError, match="hold no step"), torch.inference_mode():
        calibrate(guider, sampler, sigmas[:1], real)
    with pytest.raises(ValueError, match="end at noise"), torch.inference_mode():
        calibrate(guider, sampler, sigmas[:5], real)
    with noise_times(float("nan"), model), pytest.raises(RuntimeError, match="not finite"):
        found(model, real, samples=4)


def test_measured_without_a_schedule_is_refused(model: Any) -> None:
    settings = {"schedule": "measured", "b": 1.0, "k": 0.0, "start_percent": 0.0, "end_percent": 1.0}
    for one, given in ((EpsilonScalingSampler, comfy.samplers.sampler_object("euler")), (EpsilonScalingModel, model)):
        with pytest.raises(ValueError, match="'measured' takes an epsilon_schedule, and none is connected"):
            one().scale(given, **settings)
