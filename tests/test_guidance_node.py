"""The DSG Guidance and Guidance Report nodes: what they accept, refuse and say."""

from __future__ import annotations

import comfy.samplers
import gaussian_mixture
import pytest
import tiny_models
import torch
from sphereguide import host
from sphereguide.losses.measurement import Inpainting, SuperResolution
from sphereguide.nodes.guidance import DSGGuidance
from sphereguide.nodes.report import GuidanceReport
from test_dsg import Distance

SETTINGS = {
    "guidance_rate": 0.2,
    "interval": 1,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "gradient": "full",
    "checkpointing": False,
}


def guide(sampler=None, loss=None, vae=None, **changes):
    sampler = comfy.samplers.sampler_object("euler_ancestral") if sampler is None else sampler
    return DSGGuidance().guide(sampler, Distance() if loss is None else loss, **{**SETTINGS, **changes}, vae=vae)


@pytest.mark.parametrize("name", [n for n in comfy.samplers.KSampler.SAMPLERS if n not in host.stochastic_samplers()])
def test_deterministic_samplers_are_refused_by_name_with_those_that_work(name):
    with pytest.raises(ValueError, match=r"euler_ancestral.*ddpm") as error:
        guide(comfy.samplers.sampler_object(name))
    assert "adds none" in str(error.value)
    if name not in ("ddim", "dpm_fast", "dpm_adaptive", "uni_pc", "uni_pc_bh2"):  # the host builds those from others
        assert f"({name})" in str(error.value)


def test_eta_zero_is_refused():
    with pytest.raises(ValueError, match=r"\(euler_ancestral\) adds none.*eta or s_noise"):
        guide(comfy.samplers.ksampler("euler_ancestral", {"eta": 0.0}))


def test_an_image_loss_without_a_vae_asks_for_one():
    with pytest.raises(ValueError, match=r"no VAE to decode them\. Connect the VAE"):
        guide(loss=Inpainting(torch.rand(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)))


def test_a_latent_loss_needs_no_vae():
    sampler, trace = guide()
    gaussian_mixture.sample(sampler, gaussian_mixture.patcher(), steps=4)
    assert len(trace.steps) == 3


def test_an_empty_range_is_refused():
    with pytest.raises(ValueError, match=r"start_percent \(0.8\) is not before end_percent \(0.2\)"):
        guide(start_percent=0.8, end_percent=0.2)


def test_an_image_of_the_wrong_size_is_refused_at_the_first_guided_step():
    loss = SuperResolution(torch.rand(1, 3, 4, 4), 4)
    sampler, _ = guide(loss=loss, vae=tiny_models.TinyVAE())
    model = tiny_models.sd15()
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(tiny_models.conditioning(), tiny_models.conditioning())
    with torch.inference_mode(), pytest.raises(ValueError, match=r"4×4 pixels, where this latent calls for 16×16"):
        sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "karras", 3)
        guider.sample(torch.randn(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), sampler, sigmas, disable_pbar=True, seed=0)


@pytest.mark.parametrize("guided_steps", [True, False])
def test_the_report_passes_the_latent_through_and_draws(guided_steps):
    sampler, trace = guide(guidance_rate=0.2 if guided_steps else 0.0)
    latent = {"samples": gaussian_mixture.sample(sampler, gaussian_mixture.patcher(), batch=2, steps=5)}
    passed, image = GuidanceReport().report(latent, trace)
    assert passed is latent
    assert image.shape == (1, 360, 1200, 3) and image.dtype == torch.float32
    assert 0 <= image.min() < 0.2 and image.max() == 1  # ink on paper
