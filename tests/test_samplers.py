"""Every sampler of this host with every way of predicting: guided, or refused with the names of those that are."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.metadata
import json
from typing import Any

import comfy.model_base
import comfy.model_sampling
import comfy.samplers
import gaussian_mixture
import pytest
import samplers_table
import torch
from samplers_table import GUIDED, LEAVES_NOISE, PREDICTIONS, REFUSED
from sphereguide import host
from sphereguide.demo.bootstrap import HOST
from sphereguide.nodes.guidance import DSGGuidance
from sphereguide.samplers.trace import GuidanceTrace
from test_dsg import Distance
from torch import Tensor

TYPES = [name for name in PREDICTIONS if name in comfy.model_base.ModelType.__members__]
SAMPLERS = comfy.samplers.KSampler.SAMPLERS
SETTINGS = {"interval": 1, "start_percent": 0.0, "end_percent": 1.0, "gradient": "full", "checkpointing": False}


def host_name() -> str:
    if HOST is None:
        return f"{importlib.metadata.version('comfyui')} (PyPI)"
    return importlib.import_module("comfyui_version").__version__


@functools.cache
def model(prediction: str) -> Any:
    return gaussian_mixture.patcher(prediction)


def guide(sampler: comfy.samplers.KSAMPLER) -> tuple[comfy.samplers.KSAMPLER, GuidanceTrace]:
    return DSGGuidance().guide(sampler, Distance(), guidance_rate=0.3, **SETTINGS)


class OnePrompt(comfy.samplers.CFGGuider):
    """The negative prompt is the positive one: the cfg_pp samplers step away from it even at cfg 1."""

    def set_conds(self, positive: Any, negative: Any) -> None:
        super().set_conds(positive, copy.deepcopy(positive))


def run(sampler: comfy.samplers.KSAMPLER, prediction: str, **settings: Any) -> Tensor:
    # The third-order sampler needs an even spacing; sa_solver draws in the middle of a model's noise levels only.
    scheduler = "simple" if prediction in ("FLOW", "FLUX") else "exponential"
    settings = {"batch": 8, "steps": 7, "scheduler": scheduler, "guider": OnePrompt, **settings}
    return gaussian_mixture.sample(sampler, model(prediction), **settings)


@functools.cache
def unguided(name: str, prediction: str) -> Tensor:
    return run(comfy.samplers.sampler_object(name), prediction)


@functools.cache
def outcome(name: str, prediction: str) -> str:
    """What becomes of guidance with this sampler. AssertionError if that is nothing of what may become of it."""
    sampler = comfy.samplers.sampler_object(name)
    if name not in host.stochastic_samplers():
        with pytest.raises(ValueError, match="adds none") as error:
            guide(sampler)
        assert f"ComfyUI that add noise: {', '.join(host.stochastic_samplers())}. " in str(error.value)
        noise = torch.randn(1, *gaussian_mixture.SHAPE, generator=torch.Generator().manual_seed(2))
        one, other = (run(sampler, prediction, noise=noise, seed=seed, batch=1, steps=4) for seed in (1, 2))
        assert torch.equal(one, other)
        return REFUSED
    sampler, trace = guide(sampler)
    latent = run(sampler, prediction)
    assert Distance()(latent).mean() < 0.95 * Distance()(unguided(name, prediction)).mean()
    assert trace.steps and not any(any(step.skipped) for step in trace.steps)
    assert (torch.tensor([step.radius for step in trace.steps]) - 1).abs().max() < 1e-5
    alike = next(other for other in TYPES if levels(other) == levels(prediction))
    torch.testing.assert_close(unguided(name, prediction), unguided(name, alike), rtol=0.01, atol=0.01)
    return LEAVES_NOISE if leaves_noise(name, alike) else GUIDED


def levels(prediction: str) -> tuple[float, float, bool]:
    """What the samples of the exact denoiser depend on: all predictions of the same noise levels agree."""
    sampling = model(prediction).model.model_sampling
    return float(sampling.sigma_min), float(sampling.sigma_max), isinstance(sampling, comfy.model_sampling.CONST)


@functools.cache
def leaves_noise(name: str, prediction: str) -> bool:
    """Whether the unguided sampler, on a fine schedule, ends clearly further from the modes than samples lie."""
    latents = run(comfy.samplers.sampler_object(name), prediction, batch=32, steps=24, scheduler="exponential")
    modes = model(prediction).model.diffusion_model.means + 0.3
    deviation = (latents[:, None] - modes).flatten(2).square().mean(2).amin(1).mean().sqrt()
    assert deviation.isfinite()
    return bool(deviation > 1.3 * gaussian_mixture.STD)


@pytest.mark.parametrize("prediction", TYPES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_guided_or_refused(name: str, prediction: str) -> None:
    assert outcome(name, prediction) in (GUIDED, LEAVES_NOISE, REFUSED)


def test_no_way_of_predicting_is_left_out() -> None:
    """Of this host's, but for the models that start from an image, whose noise is none that a sampler could know."""

    def way(name: str) -> type:
        sampling = comfy.model_base.model_sampling(gaussian_mixture.CONFIG, comfy.model_base.ModelType[name])
        return type(sampling).__bases__[1]

    ways = {way(name) for name in comfy.model_base.ModelType.__members__ if not name.startswith("IMG_TO_IMG")}
    assert ways == {way(name) for name in TYPES}


def test_only_flow_models_are_left_with_noise() -> None:
    """By samplers that step as if their noise were added as it is to the others. Some step right."""
    noisy = {
        (name, prediction) for name in SAMPLERS for prediction in TYPES if outcome(name, prediction) == LEAVES_NOISE
    }
    assert {prediction for _, prediction in noisy} <= {"FLOW", "FLUX"}
    assert ("lcm", "FLOW") not in noisy


@pytest.mark.parametrize("prediction", [name for name in TYPES if name in ("FLOW", "FLUX", "FLOW_COSMOS")])
@pytest.mark.parametrize("name, draws", [("dpmpp_sde", 2), ("seeds_2", 2), ("seeds_3", 3)])
def test_each_draw_of_a_step_is_recorded_with_flow_models_too(name: str, draws: int, prediction: str) -> None:
    if name not in SAMPLERS:
        pytest.skip(f"this host has no sampler {name}")
    sampler, trace = guide(comfy.samplers.sampler_object(name))
    gaussian_mixture.sample(sampler, model(prediction), steps=5, scheduler="simple")
    for step in range(4):
        sigmas = [entry.sigma for entry in trace.steps if entry.step == step]
        assert len(sigmas) == draws
        assert len(set(sigmas)) == draws  # each with a model call of its own


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_table_is_what_this_host_does(request: pytest.FixtureRequest) -> None:
    seen = {name: {prediction: outcome(name, prediction) for prediction in TYPES} for name in SAMPLERS}
    target = request.config.getoption("--samplers-table")
    if target is not None:
        others = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
        target.write_text(samplers_table.dump({**others, host_name(): seen}), encoding="utf-8")
    results = json.loads((target or samplers_table.FILE).read_text(encoding="utf-8"))
    if host_name() not in results:
        pytest.skip(f"{samplers_table.FILE.name} says nothing of ComfyUI {host_name()}")
    assert results[host_name()] == seen


def test_the_readme_shows_the_table() -> None:
    shown = samplers_table.between_marks(samplers_table.README.read_text(encoding="utf-8"))
    if shown is None:
        pytest.skip("the README has no marks for the table")
    results = json.loads(samplers_table.FILE.read_text(encoding="utf-8"))
    assert shown == samplers_table.render(results), "run tests/samplers_table.py"


def test_alike_rows_and_columns_become_one() -> None:
    both = {"EPS": GUIDED, "V_PREDICTION": GUIDED, "FLOW": LEAVES_NOISE}
    plain = dict.fromkeys(both, REFUSED)
    old = {"a": both, "a_gpu": both, "b": plain, "c": plain}
    new = {"a": dict.fromkeys(both, GUIDED), "d": dict.fromkeys(both, GUIDED)}
    table = samplers_table.render({"1": old, "2": new})
    assert table.splitlines()[:-2] == [
        "| sampler | ComfyUI 1: ε, v | ComfyUI 1: flow | ComfyUI 2: ε, v, flow |",
        "| --- | --- | --- | --- |",
        "| `a` | ● | ○ | ● |",
        "| `d` |  |  | ● |",
        "| `a_gpu` | ● | ○ |  |",
        "| `b`, `c` | – | – |  |",
    ]
    assert samplers_table.between_marks("x\n<!-- samplers -->\nold\n<!-- /samplers -->\ny", "new") == (
        "x\n<!-- samplers -->\nnew\n<!-- /samplers -->\ny"
    )
