"""One guidance, three ways to it: DSG Guidance on a sampler, DSG Guidance (Model), KSampler (DSG Guided)."""

from __future__ import annotations

import comfy.samplers
import pytest
import tiny_models
import torch
from sphereguide import host
from sphereguide.nodes.guidance import DSGGuidance, DSGGuidanceModel, DSGKSampler
from test_dsg import Distance

try:
    import comfy.patcher_extension

    HAS_WRAPPERS = True
except ImportError:
    HAS_WRAPPERS = False

SETTINGS = {
    "guidance_rate": 0.3,
    "interval": 1,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "gradient": "full",
    "checkpointing": False,
}
RUN = {"seed": 5, "steps": 6, "cfg": 3.0, "sampler_name": "euler_ancestral", "scheduler": "normal", "denoise": 1.0}


class Target(Distance):
    def __init__(self):
        super().__init__(torch.linspace(-1, 1, 4 * 8 * 8).reshape(1, 4, 8, 8))


@pytest.fixture(scope="module")
def patcher():
    return tiny_models.sd15()


def conds():
    return tiny_models.conditioning(), tiny_models.conditioning(seed=2)


def latent(**entries):
    with torch.inference_mode():
        return {"samples": torch.zeros(2, 4, 8, 8), **entries}


def by_ksampler(patcher, given=None, **changes):
    positive, negative = conds()
    run = {**RUN, **{k: v for k, v in changes.items() if k in RUN}}
    settings = {**SETTINGS, **{k: v for k, v in changes.items() if k not in RUN}}
    with torch.inference_mode():
        return DSGKSampler().sample(patcher, positive, negative, given or latent(), Target(), **run, **settings)


def by_sampler(patcher, given=None, sampler=None, model=None, **changes):
    """As KSampler itself does it, with the sampler that is given, or the guided one."""
    run = {**RUN, **changes}
    positive, negative = conds()
    with torch.inference_mode():
        trace = None
        if sampler is None:
            plain = comfy.samplers.sampler_object(run["sampler_name"])
            sampler, trace = DSGGuidance().guide(plain, Target(), **SETTINGS)
        ksampler = comfy.samplers.KSampler(
            patcher, run["steps"], patcher.load_device, run["sampler_name"], run["scheduler"], run["denoise"]
        )
        given = given or latent()
        return (
            host.sample_latent(
                model or patcher, given, run["seed"], run["cfg"], sampler, ksampler.sigmas, positive, negative
            ),
            trace,
        )


def by_plain_ksampler(model, given=None, **changes):
    """The host's own KSampler node."""
    try:
        from nodes import common_ksampler
    except ImportError:
        from comfy.nodes.base_nodes import common_ksampler

    run = {**RUN, **changes}
    positive, negative = conds()
    order = ("seed", "steps", "cfg", "sampler_name", "scheduler")
    with torch.inference_mode():
        arguments = [run[name] for name in order]
        return common_ksampler(model, *arguments, positive, negative, given or latent(), denoise=run["denoise"])[0]


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde", "dpm_2_ancestral"])
@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_ksampler_and_the_guided_sampler_give_the_same_bits(patcher, name, denoise):
    expected, trace = by_sampler(patcher, sampler_name=name, denoise=denoise)
    result, same = by_ksampler(patcher, sampler_name=name, denoise=denoise)
    assert torch.equal(result["samples"], expected["samples"])
    assert same.steps == trace.steps and trace.steps


@pytest.mark.parametrize("changes", [{}, {"denoise": 0.4}, {"sampler_name": "ddpm"}, {"cfg": 1.0}])
def test_at_strength_zero_it_is_the_hosts_own_ksampler(patcher, changes):
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    for entries in ({}, {"noise_mask": mask}, {"batch_index": [3, 7]}):
        result, trace = by_ksampler(patcher, latent(**entries), guidance_rate=0.0, **changes)
        assert torch.equal(result["samples"], by_plain_ksampler(patcher, latent(**entries), **changes)["samples"])
        assert result.keys() == latent(**entries).keys()
        assert not trace


def test_the_list_of_samplers_is_that_of_those_that_add_noise():
    names = DSGKSampler.INPUT_TYPES()["required"]["sampler_name"][0]
    assert names == list(host.stochastic_samplers())


@pytest.mark.skipif(not HAS_WRAPPERS, reason="this host has no comfy.patcher_extension")
@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde"])
def test_the_model_route_guides_the_plain_ksampler_with_the_same_bits(patcher, name):
    expected, trace = by_ksampler(patcher, sampler_name=name)
    with torch.inference_mode():
        model, same = DSGGuidanceModel().guide(patcher, Target(), **SETTINGS)
    assert torch.equal(by_plain_ksampler(model, sampler_name=name)["samples"], expected["samples"])
    assert same.steps == trace.steps
    plain = by_plain_ksampler(patcher, sampler_name=name)["samples"]  # the model that was patched is as it was
    assert torch.equal(plain, by_ksampler(patcher, sampler_name=name, guidance_rate=0.0)[0]["samples"])
    assert not torch.equal(plain, expected["samples"])


@pytest.mark.skipif(not HAS_WRAPPERS, reason="this host has no comfy.patcher_extension")
def test_the_model_route_lets_other_packs_wrap_the_sampler_too(patcher):
    seen = []

    def theirs(executor, *args, **kwargs):
        seen.append(type(executor.class_obj))
        return executor(*args, **kwargs)

    with torch.inference_mode():
        model, trace = DSGGuidanceModel().guide(patcher, Target(), **SETTINGS)
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, "theirs", theirs)
    guided = by_plain_ksampler(model)["samples"]
    assert seen == [comfy.samplers.KSAMPLER] and trace
    assert torch.equal(guided, by_ksampler(patcher)[0]["samples"])


@pytest.mark.skipif(not HAS_WRAPPERS, reason="this host has no comfy.patcher_extension")
def test_the_model_route_refuses_a_deterministic_sampler_when_it_runs(patcher):
    with torch.inference_mode():
        model, _ = DSGGuidanceModel().guide(patcher, Target(), **SETTINGS)
    with pytest.raises(ValueError, match=r"\(euler\) adds none.*euler_ancestral"):
        by_plain_ksampler(model, sampler_name="euler")


@pytest.mark.skipif(not HAS_WRAPPERS, reason="this host has no comfy.patcher_extension")
def test_a_model_and_its_sampler_are_not_both_guided(patcher):
    with torch.inference_mode():
        model, _ = DSGGuidanceModel().guide(patcher, Target(), **SETTINGS)
    with pytest.raises(ValueError, match="guided already"):
        by_sampler(patcher, model=model)


@pytest.mark.skipif(HAS_WRAPPERS, reason="this host has comfy.patcher_extension")
def test_an_older_host_says_which_version_has_it_and_what_else_works(patcher):
    with pytest.raises(RuntimeError, match=r"needs ComfyUI 0\.3\.8 .*KSampler \(DSG Guided\)"):
        DSGGuidanceModel().guide(patcher, Target(), **SETTINGS)
