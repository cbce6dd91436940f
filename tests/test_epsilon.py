"""Epsilon Scaling: λ for each step, ε̂ of each kind of prediction, every call of every sampler."""

from __future__ import annotations

import copy
import importlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import comfy.model_sampling
import comfy.samplers
import gaussian_mixture
import pytest
import torch
from sphereguide.losses.base import Loss
from sphereguide.nodes.epsilon import SCHEDULES, EpsilonScalingModel, EpsilonScalingSampler
from sphereguide.samplers import epsilon
from sphereguide.samplers.dsg import Guidance, guided
from sphereguide.samplers.epsilon import EpsilonSchedule, linear, uniform
from sphereguide.samplers.trace import GuidanceTrace
from torch import Tensor

PREDICTIONS = [
    name
    for name in ("EPS", "V_PREDICTION", "EDM", "V_PREDICTION_EDM", "FLOW", "FLUX")
    if name in comfy.model_base.ModelType.__members__
]
OFF = {"schedule": "uniform", "b": 1.0, "k": 0.0, "start_percent": 0.0, "end_percent": 1.0}


def scale(sampler: comfy.samplers.KSAMPLER | str, **settings: Any) -> comfy.samplers.KSAMPLER:
    sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    return EpsilonScalingSampler().scale(sampler, **OFF | settings)[0]


@pytest.fixture(scope="module")
def model() -> Any:
    return gaussian_mixture.patcher()


def run(sampler: Any, model: Any, **settings: Any) -> Tensor:
    return gaussian_mixture.sample(sampler, model, **{"batch": 2, "steps": 6, **settings})


class Distance(Loss):
    space = "latent"

    def forward(self, latents: Tensor, step: Any = None) -> Tensor:
        return (latents - 1).flatten(1).norm(dim=1)


# -- λ -----------------------------------------------------------------------------------------------------------------


def test_linear_counts_from_the_last_step() -> None:
    schedule = linear(0.01, 1.002, [8.0, 4.0, 2.0, 1.0, 0.0])
    assert [round(schedule(sigma), 6) for sigma in (8.0, 4.0, 2.0, 1.0)] == [1.032, 1.022, 1.012, 1.002]
    assert schedule(2.0**1.5) == pytest.approx(1.017)  # a call between two steps
    assert schedule(100.0) == pytest.approx(1.032) and schedule(0.1) == pytest.approx(1.002)


def test_where_a_run_ends_is_no_step_of_it() -> None:
    schedule = linear(0.01, 1.0, [8.0, 4.0, 2.0])
    assert schedule(8.0) == pytest.approx(1.01) and schedule(4.0) == schedule(2.0) == 1.0


def test_the_last_part_of_a_schedule_has_the_scales_that_it_has_in_the_whole() -> None:
    whole, part = linear(0.01, 1.0, [8.0, 4.0, 2.0, 1.0, 0.0]), linear(0.01, 1.0, [2.0, 1.0, 0.0])
    assert whole(2.0) == part(2.0) and whole(1.0) == part(1.0)


@pytest.mark.parametrize(
    ("sigmas", "scales", "message"),
    [
        ((1.0, 2.0), (1.0,), "1 scales for 2 noise levels"),
        ((), (), "0 scales"),
        ((2.0, 1.0), (1.0, 1.0), "must rise"),
        ((0.0, 1.0), (1.0, 1.0), "above 0"),
        ((1.0, 2.0), (1.0, 0.0), "divided by 0"),
        ((1.0, 2.0), (1.0, float("nan")), "divided by nan"),
    ],
)
def test_impossible_schedules_are_refused(sigmas: tuple[float, ...], scales: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpsilonSchedule(sigmas, scales)


# -- ε̂ of each kind of prediction --------------------------------------------------------------------------------------


def by_hand(prediction: str, x: Tensor, sigma: float, output: Tensor, scale: float, data: float) -> Tensor:
    """x̂₀ of what a network gave, from the definition of its kind of prediction: find ε, divide it, go back."""
    if prediction == "EPS":
        return x - sigma * output / scale
    if prediction in ("V_PREDICTION", "V_PREDICTION_EDM"):  # of z = cos·x₀ + sin·ε: v = cos·ε − sin·x₀
        total = (sigma**2 + data**2) ** 0.5
        cos, sin, z = data / total, sigma / total, x / total
        noise = (cos * output + sin * z) / scale
        return data * (z - sin * noise) / cos
    if prediction == "EDM":
        denoised = x * data**2 / (sigma**2 + data**2) + output * sigma * data / (sigma**2 + data**2) ** 0.5
        noise = (x - denoised) / sigma / scale
        return x - sigma * noise
    noise = (x + (1 - sigma) * output) / scale  # flow: x = (1 − σ)·x₀ + σ·ε, v = ε − x₀
    return (x - sigma * noise) / (1 - sigma)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_noise_of_each_kind_of_prediction_is_divided(prediction: str) -> None:
    patcher = gaussian_mixture.patcher(prediction)
    sampling = patcher.model.model_sampling
    output = torch.randn(2, *gaussian_mixture.SHAPE, generator=torch.Generator().manual_seed(2))
    patcher.model.apply_model = lambda x, t, **_: sampling.calculate_denoised(t, output, x)
    seen = []

    def one_call(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for sigma in sigmas[1:-1]:  # a flow model's first is 1, where nothing is predicted
            seen.append((x, float(sigma), model(x, sigma.expand(len(x)), **extra_args)))
        return x

    run(scale(comfy.samplers.KSAMPLER(one_call), b=1.25), patcher)
    assert len(seen) == 5
    data = float(getattr(sampling, "sigma_data", 1.0))
    for x, sigma, denoised in seen:
        wanted, raw = (by_hand(prediction, x, sigma, output, scale, data) for scale in (1.25, 1.0))
        torch.testing.assert_close(denoised, wanted, rtol=1e-4, atol=1e-4)
        assert (wanted - raw).abs().max() > 0.1 * sigma


@pytest.mark.parametrize("name", ["euler", "heun", "euler_ancestral", "dpmpp_2m"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_that_is_too_long_by_a_factor_is_put_right_by_it(prediction: str, name: str) -> None:
    exact, biased = gaussian_mixture.patcher(prediction), gaussian_mixture.patcher(prediction)
    apply_model, sampling = biased.model.apply_model, biased.model.model_sampling

    def too_long(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        zero, one = torch.zeros(1), torch.ones(1)
        alpha, sigma = (float(sampling.noise_scaling(t[:1], *pair)) for pair in ((zero, one), (one, zero)))
        denoised = apply_model(x, t, **kwargs)
        if alpha == 0:
            return denoised
        noise = (x - alpha * denoised) / sigma
        return (x - sigma * 1.03 * noise) / alpha

    biased.model.apply_model = too_long
    wanted = run(comfy.samplers.sampler_object(name), exact)
    torch.testing.assert_close(run(scale(name, b=1.03), biased), wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(run(comfy.samplers.sampler_object(name), biased), wanted, rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize(
    ("prediction", "first"), [("FLOW", 1.0), ("FLOW", 1 - 1.2e-7), ("FLOW", 0.999), ("EPS", 4518.0)]
)
def test_where_x_is_noise_alone_nothing_is_corrected(prediction: str, first: float) -> None:
    """Flow models begin at sigma 1, or what rounding makes of it, and those with zero terminal SNR at thousands."""
    patcher, asked = gaussian_mixture.patcher(prediction), []
    last = 0.5 if prediction == "FLOW" else 2.0

    def two_calls(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for sigma in (first, last):
            asked.append(model(x, torch.full((len(x),), sigma), **extra_args))
        return x

    sampler = comfy.samplers.KSAMPLER(two_calls)
    run(sampler, patcher)
    run(scale(sampler, b=1.05), patcher)
    assert torch.equal(asked[0], asked[2])
    assert not torch.allclose(asked[1], asked[3], rtol=1e-3)


# -- samplers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", comfy.samplers.KSampler.SAMPLERS)
def test_every_sampler_is_corrected_and_left_alone_to_the_bit_by_1(model: Any, name: str) -> None:
    settings = {"steps": 4, "scheduler": "exponential"}
    plain = run(comfy.samplers.sampler_object(name), model, **settings)
    assert torch.equal(run(scale(name, b=1.0), model, **settings), plain)
    assert not torch.allclose(run(scale(name, b=1.05), model, **settings), plain, rtol=1e-3, atol=1e-3)


def test_ddpm_takes_the_steps_of_euler_ancestral(model: Any) -> None:
    """So that what is measured for the one holds for the other."""
    ddpm, ancestral = (run(scale(name, b=1.1), model, steps=10) for name in ("ddpm", "euler_ancestral"))
    torch.testing.assert_close(ddpm, ancestral, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2", "dpmpp_sde", "dpmpp_2s_ancestral"])
def test_every_call_of_a_sampler_is_corrected(model: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scales, corrected = [], epsilon.corrected
    monkeypatch.setattr(epsilon, "corrected", lambda *args: scales.append(args[3]) or corrected(*args))
    before = model.model.calls
    run(scale(name, schedule="linear", k=0.01, b=1.001), model)
    assert len(scales) == model.model.calls - before >= 6
    assert scales[0] == pytest.approx(1.051) and scales[-1] == pytest.approx(1.001)
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(scales))


def test_a_range_leaves_the_other_steps_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    levels, corrected = [], epsilon.corrected
    monkeypatch.setattr(epsilon, "corrected", lambda x, *args: levels.append(float(x.std())) or corrected(x, *args))
    run(scale("euler", b=1.1), model, steps=10)
    everywhere, levels[:] = list(levels), []
    run(scale("euler", b=1.1, start_percent=0.3, end_percent=0.7), model, steps=10)
    assert len(everywhere) == 10 and 2 <= len(levels) <= 5
    assert everywhere[0] > 2 * max(levels) and everywhere[-1] < min(levels)


def test_what_a_mask_keeps_stays_as_it_is(model: Any) -> None:
    mask = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).expand(1, 1, 2, 2)
    latent = torch.randn(2, *gaussian_mixture.SHAPE, generator=torch.Generator().manual_seed(8))
    plain, corrected = (
        run(sampler, model, latent=latent, denoise_mask=mask)
        for sampler in (comfy.samplers.sampler_object("euler"), scale("euler", b=1.1))
    )
    kept = (mask == 0).expand_as(plain)
    assert torch.equal(corrected[kept], plain[kept])
    assert not torch.allclose(corrected[~kept], plain[~kept], rtol=1e-3)


@pytest.mark.parametrize("gradient", ["full", "fast"])
def test_it_composes_with_guidance_in_either_order(model: Any, gradient: str) -> None:
    def guide(sampler: comfy.samplers.KSAMPLER) -> tuple[comfy.samplers.KSAMPLER, GuidanceTrace]:
        trace = GuidanceTrace()
        return guided(sampler, Guidance(Distance(), guidance_rate=0.3, gradient=gradient), trace), trace

    base = comfy.samplers.sampler_object("euler_ancestral")
    inner, first = guide(scale(base, b=1.05))
    outer, second = guide(base)
    one, other = run(inner, model), run(scale(outer, b=1.05), model)
    assert torch.equal(one, other) and first.steps == second.steps
    alone, trace = guide(base)
    assert not torch.allclose(run(alone, model), one, rtol=1e-3)
    assert [step.loss for step in trace.steps] != [step.loss for step in first.steps]  # the loss sees the corrected x̂₀


def test_other_post_cfg_functions_come_first(model: Any) -> None:
    patched, seen = model.clone(), []
    patched.set_model_sampler_post_cfg_function(lambda args: seen.append(args["denoised"]) or args["denoised"] * 0.9)
    plain = run(comfy.samplers.sampler_object("euler"), patched)
    uncorrected, seen[:] = list(seen), []
    corrected = run(scale("euler", b=1.05), patched)
    assert torch.equal(seen[0], uncorrected[0]) and not torch.allclose(corrected, plain, rtol=1e-3)


# -- the nodes ---------------------------------------------------------------------------------------------------------


def test_the_model_node_does_what_the_sampler_node_does(model: Any) -> None:
    sampler = comfy.samplers.sampler_object("dpmpp_2m")
    (patched,) = EpsilonScalingModel().scale(model, **OFF | {"b": 1.05})
    result = run(sampler, patched, cfg=3.0)
    assert torch.equal(result, run(scale(sampler, b=1.05), model, cfg=3.0))
    assert not torch.equal(result, run(sampler, model, cfg=3.0))
    assert "sampler_post_cfg_function" not in model.model_options


def test_the_model_node_counts_steps_where_the_host_tells_them(model: Any) -> None:
    (patched,) = EpsilonScalingModel().scale(model, **OFF | {"schedule": "linear", "k": 0.01})
    sampler = comfy.samplers.sampler_object("euler")
    try:
        result = run(sampler, patched)
    except ValueError as error:
        assert "sample_sigmas" not in Path(comfy.samplers.__file__).read_text("utf-8")
        assert str(error).startswith("Epsilon Scaling (Model): 'linear' counts steps") and "SamplerCustom" in str(error)
    else:
        assert torch.equal(result, run(scale(sampler, schedule="linear", k=0.01), model))


def test_uniform_is_the_hosts_own_node_where_it_has_one(model: Any) -> None:
    try:
        module = importlib.import_module("comfy_extras.nodes_eps")
    except ImportError:
        pytest.skip("this ComfyUI has no comfy_extras.nodes_eps")
    core = module.EpsilonScaling.execute(model, 1.013)[0]
    sampler = comfy.samplers.sampler_object("heun")
    expected = run(sampler, core, cfg=2.0)
    torch.testing.assert_close(run(scale(sampler, b=1.013), model, cfg=2.0), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("node", [EpsilonScalingSampler, EpsilonScalingModel])
def test_the_widgets_and_what_cannot_be_meant(model: Any, node: type) -> None:
    required = node.INPUT_TYPES()["required"]
    assert required["schedule"][0] == list(SCHEDULES) and required["b"][1]["step"] == 0.0001
    first = {"sampler": comfy.samplers.sampler_object("euler")} if node is EpsilonScalingSampler else {"model": model}
    with pytest.raises(ValueError, match=r"start_percent \(0\.5\) is not before end_percent \(0\.5\)"):
        node().scale(**first, **OFF | {"start_percent": 0.5, "end_percent": 0.5})


def test_a_linear_schedule_that_falls_to_0_is_refused_when_it_runs(model: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"Epsilon Scaling Sampler: with k -0\.1 and b 0\.5 the divisor of the noise falls to 0 .*Raise k or b",
    ):
        run(scale("euler", schedule="linear", k=-0.1, b=0.5), model, steps=10)


def test_a_sampler_that_hides_how_it_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="does not show how it samples"):
        EpsilonScalingSampler().scale(comfy.samplers.Sampler(), **OFF)


def test_a_sampler_keeps_its_options_and_a_run_leaves_nothing_behind(model: Any) -> None:
    base = comfy.samplers.ksampler("euler_ancestral", {"eta": 0.5})
    options = copy.deepcopy(model.model_options)
    corrected = scale(base, b=1.05)
    assert corrected.extra_options == base.extra_options
    first = run(corrected, model)
    assert torch.equal(run(corrected, model), first) and model.model_options == options


def test_uniform_is_the_same_at_every_level() -> None:
    assert {uniform(1.01)(sigma) for sigma in (1e-3, 1.0, 80.0)} == {1.01}
