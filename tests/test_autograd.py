"""A loaded model becomes differentiable without a copy, and is put back."""

from __future__ import annotations

import comfy.samplers
import pytest
import tiny_models
import torch
from sphereguide.losses.base import Loss
from sphereguide.losses.measurement import SuperResolution
from sphereguide.models.decoder import Decoder
from sphereguide.samplers.autograd import differentiable, normal
from sphereguide.samplers.dsg import GRADIENTS, Guidance, guided
from sphereguide.samplers.trace import GuidanceTrace


@pytest.fixture(scope="module")
def patcher():
    return tiny_models.sd15()


def weights(module):
    slots = [*module.named_parameters(), *module.named_buffers()]
    return {name: (id(tensor), tensor.data_ptr(), tensor.is_inference()) for name, tensor in slots}


def run(patcher, guidance, *, cfg=3.0, batch=2, size=8, steps=3, callback=None):
    sampler = comfy.samplers.ksampler("euler_ancestral")
    trace = GuidanceTrace()
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(patcher)
        guider.set_conds(tiny_models.conditioning(seed=1), tiny_models.conditioning(seed=2))
        guider.set_cfg(cfg)
        sigmas = comfy.samplers.calculate_sigmas(patcher.model.model_sampling, "karras", steps)
        noise = torch.randn(batch, 4, size, size, generator=torch.manual_seed(4))
        sampler = sampler if guidance is None else guided(sampler, guidance, trace)
        latent = torch.zeros_like(noise)
        return guider.sample(noise, latent, sampler, sigmas, callback=callback, disable_pbar=True, seed=4), trace


class Brightness(Loss):
    space = "latent"

    def forward(self, latents):
        return latents.flatten(1).mean(1)


def image_guidance(**settings):
    with torch.inference_mode():
        loss = SuperResolution(torch.rand(1, 3, 16, 16), 4)
        return Guidance(loss, decode=Decoder(tiny_models.TinyVAE()), **settings)


# -- weights -----------------------------------------------------------------------------------------------------------


def test_no_weight_is_copied_and_all_are_put_back(patcher):
    model = patcher.model
    before = weights(model)
    assert all(is_inference for _, _, is_inference in before.values())  # the trap is set
    with differentiable(model) as recording:
        within = weights(model)
        assert {name: pointer for name, (_, pointer, _) in within.items()} == {
            name: pointer for name, (_, pointer, _) in before.items()
        }
        assert not any(is_inference for _, _, is_inference in within.values())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        with torch.inference_mode(), recording():
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert weights(model) == before


def test_weights_are_put_back_after_an_error(patcher):
    before = weights(patcher.model)
    with pytest.raises(KeyError), differentiable(patcher.model, checkpointing=patcher.model.diffusion_model):
        raise KeyError
    assert weights(patcher.model) == before
    assert not any("forward" in vars(module) for module in patcher.model.modules())


def test_tied_weights_stay_tied():
    with torch.inference_mode():
        module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        module[1].weight = module[0].weight
    with differentiable(module):
        assert module[1].weight is module[0].weight
    assert module[1].weight is module[0].weight


def test_a_weight_that_the_host_moved_meanwhile_stays_where_it_was_moved():
    with torch.inference_mode():
        module = torch.nn.Linear(3, 3)
        with differentiable(module):
            module.to(torch.float64)  # stands for a move to another device
            moved = module.weight
        assert module.weight is moved and module.weight.dtype == torch.float64


def test_normal_clones_inference_tensors_and_nothing_else():
    from comfy.conds import CONDRegular

    with torch.inference_mode():
        inference = torch.ones(2)
        cond = CONDRegular(inference)
    plain, function = torch.ones(2), object()
    value = {"a": [inference, plain], "b": (function,), "c": {"cond": cond}, "d": {"deep": [plain]}}
    result = normal(value)
    assert not result["a"][0].is_inference() and result["a"][1] is plain
    assert result["b"] is value["b"] and result["d"] is value["d"]
    assert not result["c"]["cond"].cond.is_inference() and cond.cond is inference
    assert value["a"][0] is inference


# -- gradients through a real U-Net, CFG and a VAE ---------------------------------------------------------------------


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_guidance_through_the_unet_and_the_vae_leaves_everything_as_it_was(patcher, gradient, checkpointing):
    plain, _ = run(patcher, None)
    guidance = image_guidance(gradient=gradient, checkpointing=checkpointing)
    before = weights(patcher.model), weights(guidance.decode.module), weights(guidance.loss)
    latent, trace = run(patcher, guidance)
    assert (weights(patcher.model), weights(guidance.decode.module), weights(guidance.loss)) == before
    assert not torch.equal(latent, plain)
    assert len(trace.steps) == 2 and not any(any(step.skipped) for step in trace.steps)
    assert torch.equal(run(patcher, None)[0], plain)


def test_checkpointing_gives_the_same_gradient(patcher):
    unet, gradients = patcher.model.diffusion_model, []
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 7, 16, generator=generator)
    for checkpointing in (None, unet):
        with differentiable(unet, checkpointing=checkpointing) as recording, recording():
            variable = x.clone().requires_grad_()
            output = unet(variable, torch.tensor([300.0]), context=context, transformer_options={})
            gradients.append(torch.autograd.grad(output.square().sum(), variable)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_guided_run_repeats_to_the_bit(patcher):
    for checkpointing in (False, True):
        guidance = image_guidance(checkpointing=checkpointing)
        assert torch.equal(run(patcher, guidance)[0], run(patcher, guidance)[0])


def test_checkpointing_recomputes_the_blocks_and_keeps_less(patcher):
    unet, kept = patcher.model.diffusion_model, {}
    x = torch.randn(1, 4, 8, 8)
    context = torch.randn(1, 7, 16)
    for checkpointing in (None, unet):
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with differentiable(unet, checkpointing=checkpointing), torch.inference_mode(False), torch.enable_grad(), hooks:
            unet(x.clone().requires_grad_(), torch.ones(1), context=context, transformer_options={})
        kept[checkpointing is not None] = count
    assert kept[True] < 0.5 * kept[False]


def test_the_gradient_through_the_unet_is_that_of_finite_differences():
    patcher = tiny_models.sd15(dtype=torch.float64)
    unet = patcher.model.diffusion_model.double()
    generator = torch.Generator().manual_seed(0)
    x, direction, context = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in [(1, 4, 8, 8), (1, 4, 8, 8), (1, 7, 16)]
    )

    def f(x):
        return unet(x, torch.tensor([300.0]).double(), context=context, transformer_options={}).square().sum()

    with differentiable(unet) as recording, recording():
        variable = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(f(variable), variable)
        numeric = (f(x + 1e-6 * direction) - f(x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), numeric.detach(), rtol=1e-5, atol=1e-6)


def test_a_patch_that_overwrites_what_autograd_keeps_does_not_break_guidance():
    patcher = tiny_models.sd15()
    gentle, _ = run(patcher, image_guidance())

    def overwrite(args):
        exponential = (args["denoised"] * 1e-3).exp()  # autograd keeps the result of exp
        return args["denoised"] + exponential.sub_(1)

    def same_without_overwriting(args):
        return args["denoised"] + ((args["denoised"] * 1e-3).exp() - 1)

    results = []
    for function in (overwrite, same_without_overwriting):
        patched = patcher.clone()
        patched.set_model_sampler_post_cfg_function(function)
        results.append(run(patched, image_guidance())[0])
    assert torch.equal(*results) and not torch.equal(results[0], gentle)


def test_decoder_is_vae_decode_without_the_clamp_and_has_a_gradient():
    vae = tiny_models.TinyVAE()
    decode = Decoder(vae)
    latents = torch.randn(2, 4, 8, 8) * 0.1
    with torch.no_grad():
        images = decode(latents)
        torch.testing.assert_close(images.clamp(0, 1), vae.process_output(vae.first_stage_model.decode(latents)))
    with differentiable(decode.module) as recording, recording():
        variable = latents.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(decode(variable).sum(), variable)
    assert gradient.isfinite().all() and gradient.abs().amax() > 0


def test_the_preview_callback_sees_inference_mode_as_with_core_samplers(patcher):
    seen = []
    run(patcher, Guidance(Brightness()), callback=lambda *_: seen.append(torch.is_inference_mode_enabled()))
    assert seen == [True] * 3


class Interrupted(BaseException):
    """Stands for the host's, which has moved between modules."""


def test_an_interrupt_passes_through_and_leaves_the_model_usable(patcher):
    plain, _ = run(patcher, None)

    def interrupt(step, *_):
        if step == 1:
            raise Interrupted

    before = weights(patcher.model)
    with pytest.raises(Interrupted):
        run(patcher, Guidance(Brightness()), callback=interrupt)
    assert weights(patcher.model) == before
    assert torch.equal(run(patcher, None)[0], plain)
