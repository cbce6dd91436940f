"""The DiffRGD Guidance and TFG Guidance nodes: what they accept, refuse and say, on images and with real networks."""

from __future__ import annotations

import itertools

import comfy.model_management
import comfy.samplers
import gaussian_mixture
import pytest
import tiny_models
import torch
from sphereguide.losses.measurement import SuperResolution
from sphereguide.nodes.guidance import DPSGuidance
from sphereguide.nodes.reference import ILVRReference
from sphereguide.nodes.report import GuidanceReport
from sphereguide.nodes.successors import DiffRGDGuidance, TFGGuidance
from sphereguide.samplers.epsilon import EpsilonScaling, uniform, with_post_cfg
from sphereguide.samplers.kernel import GRADIENTS
from sphereguide.samplers.tfg import PRESETS
from test_dsg import Distance, Indifferent

try:
    from comfy.model_management import InterruptProcessingException as Interrupted
except ImportError:  # PyPI's package of 2024
    from comfy.interruption import InterruptProcessingException as Interrupted

NODES = [DiffRGDGuidance, TFGGuidance]


def guide(node, sampler=None, loss=None, vae=None, **changes):
    settings = {}
    for name, (kind, *options) in node.INPUT_TYPES()["required"].items():
        if isinstance(kind, list) or "default" in options[0]:
            settings[name] = kind[0] if isinstance(kind, list) else options[0]["default"]
    sampler = comfy.samplers.sampler_object("euler_ancestral") if sampler is None else sampler
    return node().guide(sampler, Distance() if loss is None else loss, vae=vae, **{**settings, **changes})


@pytest.fixture(scope="module")
def patcher():
    return tiny_models.sd15()


def through_networks(node, patcher, batch=2, **settings):
    with torch.inference_mode():
        loss = SuperResolution(torch.rand(1, 3, 16, 16, generator=torch.manual_seed(0)), 4)
        sampler, trace = guide(node, loss=loss, vae=tiny_models.TinyVAE(), **settings)
        guider = comfy.samplers.CFGGuider(patcher)
        guider.set_conds(tiny_models.conditioning(), tiny_models.conditioning(seed=2))
        guider.set_cfg(2.0)
        sigmas = comfy.samplers.calculate_sigmas(patcher.model.model_sampling, "karras", 3)
        noise = torch.randn(batch, 4, 8, 8, generator=torch.manual_seed(0))
        latent = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=0)
    return latent, trace


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("node", NODES)
def test_images_guide_through_the_unet_and_the_vae(patcher, node, gradient):
    plain, _ = through_networks(node, patcher, end_percent=0.001)
    latent, trace = through_networks(node, patcher, gradient=gradient)
    assert trace and not any(any(step.skipped) for step in trace.steps)
    assert not torch.equal(latent, plain)
    assert torch.equal(latent, through_networks(node, patcher, gradient=gradient)[0])


@pytest.mark.parametrize("node", NODES)
def test_checkpointing_guides_the_same(patcher, node):
    """Random weights make much of a rounding error: to 1 % of the latents, and closely in the first gradient."""
    found = [through_networks(node, patcher, batch=1, checkpointing=checkpointing) for checkpointing in (False, True)]
    (plain, one), (latent, other) = found
    assert (latent - plain).abs().max() < 0.01 * plain.abs().max()
    assert other.steps[0].loss == pytest.approx(one.steps[0].loss, rel=1e-4)
    assert other.steps[0].gradient_norm == pytest.approx(one.steps[0].gradient_norm, rel=1e-3)


@pytest.mark.parametrize("node, asks", [(DiffRGDGuidance, 3), (TFGGuidance, 4)])
def test_an_interrupt_stops_within_a_step(node, asks):
    """Before the next gradient: all of `asks` belong to the first guided step."""

    class Interrupts(Distance):
        asked = 0

        def forward(self, latents, step=None):
            Interrupts.asked += 1
            if Interrupts.asked == asks - 1:
                comfy.model_management.interrupt_current_processing()
            return super().forward(latents)

    sampler, trace = guide(node, loss=Interrupts())
    with pytest.raises(Interrupted):
        gaussian_mixture.sample(sampler, gaussian_mixture.patcher(), steps=4)
    assert Interrupts.asked == asks - 1 and not trace.finished
    comfy.model_management.interrupt_current_processing(False)


@pytest.mark.parametrize("node, method", [(DiffRGDGuidance, "DiffRGD Guidance"), (TFGGuidance, "TFG Guidance")])
def test_what_cannot_be_guided_is_refused(node, method):
    with pytest.raises(ValueError, match=rf"{method} steers samplers that add noise.*\(euler\) adds none"):
        guide(node, comfy.samplers.sampler_object("euler"))
    with pytest.raises(ValueError, match=rf"{method}: this loss looks at images, and there is no VAE"):
        guide(node, loss=SuperResolution(torch.rand(1, 3, 16, 16), 4))
    with pytest.raises(ValueError, match=rf"{method}: start_percent \(0.8\) is not before end_percent \(0.2\)"):
        guide(node, start_percent=0.8, end_percent=0.2)
    for inner, outer in itertools.product((node,), (*NODES, DPSGuidance)):
        settings = {"step_size": 1.0} if outer is DPSGuidance else {}
        sampler, _ = guide(outer, guide(inner)[0], **settings)
        with pytest.raises(ValueError, match="guided already"):
            gaussian_mixture.sample(sampler, gaussian_mixture.patcher())


def test_a_loss_on_noisy_latents_has_no_estimate_to_move():
    class Noisy(Distance):
        space = "noisy"

    for settings in ({"preset": "MPGD"}, {"rho": 0.0}, {"preset": "UGD", "rho": 0.0}):
        with pytest.raises(ValueError, match=r"TFG Guidance: this loss looks at the noisy image"):
            guide(TFGGuidance, loss=Noisy(), **settings)
    sampler, trace = guide(TFGGuidance, loss=Noisy())
    gaussian_mixture.sample(sampler, gaussian_mixture.patcher(), steps=4)
    assert trace


@pytest.mark.parametrize("node", NODES)
def test_the_report_draws_and_says_it(node):
    sampler, trace = guide(node)
    latent = {"samples": gaussian_mixture.sample(sampler, gaussian_mixture.patcher(), batch=2, steps=5)}
    passed, image, summary = GuidanceReport().report(latent, trace)["result"]
    assert passed is latent and image.shape == (1, 360, 1200, 3)
    guided = 4 if node is DiffRGDGuidance else 5  # the last step draws no noise, and TFG guides it too
    assert summary.startswith(f"{trace.method}: {guided} steps guided") and "no steps skipped" in summary


@pytest.mark.parametrize("node", NODES)
def test_a_sampler_that_others_change_is_guided(node):
    """ILVR moves the state before guidance sees it; epsilon scaling changes what the model gives."""
    model = gaussian_mixture.patcher()
    plain = comfy.samplers.sampler_object("ddpm")
    reference = {"samples": torch.full((1, *gaussian_mixture.SHAPE), 0.3)}
    referenced, *_ = ILVRReference().refer(plain, reference, 2, 0.0, 1.0)
    for sampler in (referenced, with_post_cfg(plain, EpsilonScaling(lambda _: uniform(1.02)))):
        before = Distance()(gaussian_mixture.sample(sampler, model, batch=8, steps=12))
        for loss in (Distance(), Indifferent()):
            guided, trace = guide(node, sampler, loss)
            latent = gaussian_mixture.sample(guided, model, batch=8, steps=12)
            assert trace and latent.isfinite().all()
            assert isinstance(loss, Indifferent) or Distance()(latent).mean() < before.mean()


def test_the_presets_are_those_of_the_help():
    (names, _), *_ = (TFGGuidance.INPUT_TYPES()["required"]["preset"],)
    assert names == list(PRESETS) == ["custom", "DPS", "LGD-MC", "FreeDoM", "MPGD", "UGD"]


@pytest.mark.parametrize("node", NODES)
def test_the_trace_knows_the_id_of_its_node(node):
    assert guide(node, unique_id="12:3")[1].node == "12:3"
