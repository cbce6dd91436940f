"""A loaded model becomes differentiable without a copy, and is put back."""

from __future__ import annotations

import copy
import gc
import weakref
from types import SimpleNamespace

import comfy.model_management
import comfy.ops
import comfy.samplers
import pytest
import tiny_models
import torch
from comfy.ldm.modules.attention import attention_pytorch
from sphereguide import host
from sphereguide.losses.base import Loss
from sphereguide.losses.measurement import SuperResolution
from sphereguide.models.decoder import Decoder
from sphereguide.samplers import kernel
from sphereguide.samplers.autograd import differentiable, normal, wants_lenience
from sphereguide.samplers.dsg import Guidance, _Spherical, guided
from sphereguide.samplers.kernel import GRADIENTS, steered
from sphereguide.samplers.trace import GuidanceTrace


@pytest.fixture(scope="module")
def patcher():
    return tiny_models.sd15()


def weights(module):
    slots = [*module.named_parameters(), *module.named_buffers()]
    return {name: (id(tensor), tensor.data_ptr(), tensor.is_inference()) for name, tensor in slots}


def run(patcher, guidance, *, cfg=3.0, batch=2, size=8, steps=3, callback=None, control=None, sampler=None):
    sampler = sampler or comfy.samplers.ksampler("euler_ancestral")
    trace = GuidanceTrace()
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(patcher)
        positive, negative = tiny_models.conditioning(seed=1), tiny_models.conditioning(seed=2)
        if control is not None:
            hint = torch.rand(1, 3, size * 8, size * 8, generator=torch.Generator().manual_seed(5))
            positive[0][1]["control"] = control.copy().set_cond_hint(hint)
            positive[0][1]["control_apply_to_uncond"] = True
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        sigmas = comfy.samplers.calculate_sigmas(patcher.model.model_sampling, "karras", steps)
        noise = torch.randn(batch, 4, size, size, generator=torch.manual_seed(4))
        sampler = sampler if guidance is None else guided(sampler, guidance, trace)
        latent = torch.zeros_like(noise)
        return guider.sample(noise, latent, sampler, sigmas, callback=callback, disable_pbar=True, seed=4), trace


class Interrupted(BaseException):
    """Stands for the host's, which has moved between modules."""


class Brightness(Loss):
    space = "latent"

    def forward(self, latents, step=None):
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
        assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        with recording():
            assert torch.is_grad_enabled()
    assert weights(model) == before


def test_weights_are_put_back_after_an_error(patcher):
    before = weights(patcher.model)
    unet = patcher.model.diffusion_model
    with pytest.raises(KeyError), differentiable(patcher.model) as recording, recording(checkpointing=unet):
        raise KeyError
    assert weights(patcher.model) == before
    assert not any("forward" in vars(module) for module in patcher.model.modules())


def test_the_host_may_load_a_model_anew_within_the_block(patcher):
    before = weights(patcher.model)
    bias = patcher.model.diffusion_model.out[2].bias
    with torch.inference_mode():
        with differentiable(patcher.model) as recording:
            with recording.put_back():
                assert weights(patcher.model) == before and torch.is_inference_mode_enabled()
                patcher.model.diffusion_model.out[2].bias = torch.nn.Parameter(bias.clone())  # as a LoRA is taken off
            within = weights(patcher.model).values()
            assert not any(is_inference for *_, is_inference in within) and not torch.is_inference_mode_enabled()
        patcher.model.diffusion_model.out[2].bias = bias
    assert weights(patcher.model) == before


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
        moved = module.weight.data_ptr()
    assert module.weight.data_ptr() == moved and module.weight.dtype == torch.float64


def test_notes_on_a_weight_stay_on_it():
    with torch.inference_mode():
        module = torch.nn.Linear(3, 3)
        module.weight._model_dtype = torch.float16  # as newer hosts do
    with differentiable(module):
        assert module.weight._model_dtype == torch.float16


class Shell(torch.Tensor):
    """A wrapper subclass, as quantized weights are: a scale and integers that it stands for."""

    @staticmethod
    def __new__(cls, integers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, integers.shape, dtype=torch.float32)

    def __init__(self, integers, scale):
        self.integers, self.scale = integers, scale

    def __tensor_flatten__(self):
        return ["integers"], self.scale

    @staticmethod
    def __tensor_unflatten__(inner, scale, size, stride):
        return Shell(inner["integers"], scale)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def plain(value):
            return value.integers.float() * value.scale if isinstance(value, Shell) else value

        if function is torch.ops.aten.detach.default:
            return Shell(args[0].integers, args[0].scale)
        return function(*map(plain, args), **(kwargs or {}))


def test_quantized_weights_stay_quantized_and_have_a_gradient():
    with torch.inference_mode():
        module = torch.nn.Linear(3, 2, bias=False)
        module.weight = torch.nn.Parameter(Shell(torch.tensor([[1, 2, 3], [4, 5, 6]]), 0.5), requires_grad=False)
        before = module.weight
        integers = before.data.integers.data_ptr()
    with differentiable(module) as recording, recording():
        assert type(module.weight.data) is Shell and module.weight.data.integers.data_ptr() == integers
        x = torch.ones(1, 3, requires_grad=True)
        (gradient,) = torch.autograd.grad(module(x).sum(), x)
    assert gradient.tolist() == [[2.5, 3.5, 4.5]]
    assert module.weight is before


def test_weights_that_hide_what_they_are_made_of_are_refused_with_a_way_out():
    class Closed(torch.Tensor):
        pass

    with torch.inference_mode():
        module = torch.nn.Linear(3, 2, bias=False)
        weight = module.weight.detach().as_subclass(Closed)
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
    refusal = pytest.raises(RuntimeError, match=r"weights of type Closed, through which no gradient can .*'fast'")
    with refusal, differentiable(module):
        pass


def test_what_a_network_keeps_from_an_unguided_call_serves_in_a_guided_one():
    class Keeps(torch.nn.Module):
        kept = None

        def forward(self, x):
            if self.kept is None:
                self.kept = torch.full_like(x, 2.0)
            return x * self.kept

    module = Keeps()
    with torch.inference_mode(), differentiable(module) as recording:
        x = torch.ones(1, 3)
        module(x)
        with recording():
            x.requires_grad_()
            assert torch.autograd.grad(module(x).sum(), x)[0].tolist() == [[2.0, 2.0, 2.0]]


def test_layers_whose_weights_come_and_go_fetch_them_again_in_the_backward_pass():
    class Streamed(torch.nn.Module):
        """Computes with a buffer that the next call of anybody overwrites, out of autograd's sight."""

        buffer = torch.zeros(1)

        def __init__(self, weight):
            super().__init__()
            self.own = weight
            self._v = None  # by which hosts with dynamic VRAM mark such layers

        def forward(self, x):
            Streamed.buffer.data.fill_(self.own)
            return x * Streamed.buffer

    network = torch.nn.Sequential(Streamed(2.0), Streamed(5.0))
    with differentiable(network) as recording, recording():
        x = torch.ones(1, requires_grad=True)
        assert torch.autograd.grad(network(x), x)[0].item() == 10.0
    assert not any("forward" in vars(layer) for layer in network)


def test_layers_that_lie_elsewhere_are_streamed():
    here, elsewhere = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta")
    assert host.streamed_layers(torch.nn.Sequential(here, elsewhere)) == [elsewhere]


@pytest.mark.parametrize("kernel", ["sage", "flash", "comfy_kitchen"])
def test_attention_without_a_backward_pass_gives_way_to_pytorchs(monkeypatch, kernel):
    plain = {"transformer_options": {"of": "another"}}
    assert host.with_differentiable_attention(plain) is plain
    monkeypatch.setattr(comfy.model_management, f"{kernel}_attention_enabled", lambda: True, raising=False)
    options = host.with_differentiable_attention(plain)["transformer_options"]
    q, k, v = torch.randn(3, 1, 5, 8)
    q.requires_grad_()
    out = options["optimized_attention_override"](None, q, k, v, 2)
    assert options["of"] == "another" and torch.autograd.grad(out.sum(), q)[0].abs().max() > 0
    torch.testing.assert_close(out, attention_pytorch(q, k, v, 2))


def test_a_models_own_attention_serves_where_it_records():
    """Kernels that drop the graph say nothing, and what goes around them still has one."""
    asked = []

    def theirs(kernel, q, k, v, heads, **kwargs):
        asked.append(kernel)
        with torch.set_grad_enabled(len(asked) == 2 and torch.is_grad_enabled()):
            return 2 * attention_pytorch(q, k, v, heads)

    options = {"transformer_options": {"optimized_attention_override": theirs}}
    override = host.with_differentiable_attention(options)["transformer_options"]["optimized_attention_override"]
    assert options["transformer_options"]["optimized_attention_override"] is theirs
    q, k, v = torch.randn(3, 1, 5, 8)
    exact, ours = attention_pytorch(q, k, v, 2), object()
    torch.testing.assert_close(override(ours, q, k, v, 2), 2 * exact)
    q.requires_grad_()
    torch.testing.assert_close(override(ours, q, k, v, 2), 2 * exact)
    dropped = override(ours, q, k, v, 2)
    torch.testing.assert_close(dropped, exact)
    assert dropped.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(override(ours, q, k, v, 2), 2 * exact)
    assert asked == [ours, attention_pytorch, attention_pytorch, ours]


def test_layers_whose_weights_are_cast_for_each_call_are_streamed():
    """Autograd would keep a copy of each in the larger type."""
    with torch.inference_mode():
        layers = [
            comfy.ops.manual_cast.Linear(8, 8, bias=False, dtype=dtype)
            for dtype in (torch.bfloat16, torch.float8_e4m3fn)
        ]
        for layer in layers:
            layer.weight.data = torch.randn(8, 8).mul(0.1).to(layer.weight.dtype)
    network = torch.nn.Sequential(*layers)
    assert host.streamed_layers(network) == []
    network.manual_cast_dtype = torch.bfloat16  # as a BaseModel has it
    assert host.streamed_layers(network) == [layers[1]]
    own, kept, x = {layer.weight.data_ptr() for layer in layers}, [], torch.randn(2, 8).bfloat16().requires_grad_()

    def pack(tensor):
        kept.append(tensor.shape == (8, 8) and tensor.data_ptr() not in own)
        return tensor

    with differentiable(network) as recording, recording(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        total = network(x).sum()
        assert kept and not any(kept)
        gradient = torch.autograd.grad(total, x)[0]
    exact = (layers[1].weight.float().sum(0) @ layers[0].weight.float()).expand(2, 8)
    torch.testing.assert_close(gradient.float(), exact.detach(), rtol=0.02, atol=0.01)


def test_recomputing_spares_another_packs_forward():
    unet = tiny_models.sd15().model.diffusion_model
    block = unet.middle_block[0]
    theirs = block.forward
    block.forward = lambda *args, **kwargs: theirs(*args, **kwargs)
    patched = block.forward
    with differentiable(unet) as recording, recording(checkpointing=unet):
        assert block.forward is not patched
    assert block.forward is patched


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
        with differentiable(unet) as recording, recording(checkpointing=checkpointing):
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
        with differentiable(unet) as recording, recording(checkpointing=checkpointing), hooks:
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


@pytest.mark.parametrize("size", [64, 256, 1024, 4096])
def test_what_is_overwritten_and_freed_lends_its_address_to_no_other(size):
    """torch's own `allow_mutation_on_saved_tensors` fails here now and then."""
    x, factors = torch.linspace(-1, 1, size).requires_grad_(), range(1, 100)
    with differentiable() as recording, recording(lenient=True):
        total = torch.zeros(())
        for factor in factors:
            kept = x * factor
            total = total + kept.sin().sum()
            kept.mul_(2)
        gradient = torch.autograd.grad(total, x)[0]
    exact = sum(factor * torch.cos(factor * x.detach()) for factor in factors)
    torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "write",
    [
        lambda whole, part: whole.add_(1),
        lambda whole, part: whole[3:5].zero_(),
        lambda whole, part: part.view(2, 3).mul_(0),
        lambda whole, part: torch._foreach_mul_([whole], 2),
        lambda whole, part: torch.exp(whole.detach(), out=whole.detach()),
        lambda whole, part: torch.sort(whole.detach(), out=(whole.detach(), torch.empty(8, dtype=torch.long))),
    ],
    ids=["all", "a part", "a view", "a list", "out", "several out"],
)
def test_what_autograd_keeps_is_copied_whichever_view_of_it_is_written_to(write):
    x = torch.linspace(-1, 1, 8).requires_grad_()
    with differentiable() as recording, recording(lenient=True):
        whole = x.flip(0)
        part = whole[1:7]
        outcome = (part.sin() * part.cos()).sum()
        before = whole.detach().clone()
        write(whole, part)
        assert not torch.equal(whole, before)
        gradient = torch.autograd.grad(outcome, x)[0]
    exact = torch.cos(2 * x.detach())
    exact[[0, -1]] = 0
    torch.testing.assert_close(gradient, exact)


def test_a_tensor_and_its_conjugate_are_two():
    x = torch.linspace(-1, 1, 8).requires_grad_()
    gradients = []
    for write in (False, True):
        with differentiable() as recording, recording(lenient=True):
            whole = torch.complex(x, x.flip(0))
            outcome = (whole * whole.conj() * 1j + whole.conj() ** 2).abs().sum()
            if write:
                whole.mul_(2)
            gradients.append(torch.autograd.grad(outcome, x)[0])
    torch.testing.assert_close(*gradients)


def test_what_lies_in_no_memory_of_its_own_passes():
    x = torch.linspace(-1, 1, 8).reshape(2, 4).requires_grad_()
    sparse = torch.eye(2).to_sparse()
    with differentiable() as recording, recording(lenient=True):
        gradient = torch.autograd.grad(torch.sparse.mm(sparse, x).sum(), x)[0]
    assert torch.equal(gradient, torch.ones(2, 4))


@pytest.mark.parametrize("lenient", [False, True])
def test_a_recording_that_ends_in_an_error_leaves_nothing(lenient):
    """Circles that only a whole backward pass opens: an operation keeps its result, or is written to what it keeps."""
    x, alive = torch.linspace(-1, 1, 8).requires_grad_(), []

    def failing():
        whole = x * 2
        part = whole[1:]
        result = part.exp()
        alive.extend(weakref.ref(tensor) for tensor in (part, result))
        whole[1:] = part.sin()
        if not lenient:
            torch.autograd.grad(whole.sum(), x)
        raise RuntimeError("cancelled")

    with differentiable() as recording, recording(lenient):
        with pytest.raises(RuntimeError) as failed:
            failing()
        assert ("inplace operation" in str(failed.value)) is not lenient and wants_lenience(failed.value) is not lenient
        del failed
    gc.collect()
    assert [tensor() for tensor in alive] == [None, None]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_that_no_module_shows_are_differentiated_through(checkpointing):
    """As those of adapters that live in a closure."""
    with torch.inference_mode():
        kernel = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1)) * 0.1

    def patched(weight):
        patcher = tiny_models.sd15()
        block = patcher.model.diffusion_model.input_blocks[0][0]
        inner = block.forward

        def forward(x, *args, **kwargs):
            bent = torch.nn.functional.conv2d(torch.tanh(x), weight, padding=1)
            return inner(x + bent, *args, **kwargs)

        block.forward = forward
        return patcher

    guidance = image_guidance(checkpointing=checkpointing)
    latent, trace = run(patched(kernel), guidance)
    expected, _ = run(patched(kernel.clone()), guidance)
    assert len(trace.steps) == 2 and not any(any(step.skipped) for step in trace.steps)
    assert kernel.is_inference()
    torch.testing.assert_close(latent, expected)


@pytest.mark.parametrize("use", [lambda x, kept: x * kept, lambda x, kept: x * kept.add_(0)], ids=["kept", "written"])
def test_inference_tensors_are_legal_where_lenience_is_asked_for(use):
    with torch.inference_mode():
        kept = torch.arange(8.0)
    x = torch.ones(8, requires_grad=True)
    with differentiable() as recording:
        with recording(), pytest.raises(RuntimeError) as refused:
            use(x, kept)
        assert wants_lenience(refused.value)
        with recording(lenient=True):
            gradient = torch.autograd.grad(use(x, kept).sum(), x)[0]
    assert torch.equal(gradient, torch.arange(8.0)) and kept.is_inference()


def test_what_a_guider_may_run_is_found_where_hosts_keep_it():
    modules = [torch.nn.Linear(1, 1) for _ in range(4)]
    guider = SimpleNamespace(
        inner_model=modules[0],
        conds={"positive": [{"control": SimpleNamespace(vae=SimpleNamespace(first_stage_model=modules[1]))}]},
        loaded_models=[SimpleNamespace(model=modules[2]), object()],
        model_patcher=SimpleNamespace(model_patches_models=lambda: [SimpleNamespace(model=modules[3])]),
    )
    assert set(host.networks(guider)) == set(modules)
    guider.model_patcher = SimpleNamespace()  # an older host's
    assert set(host.networks(guider)) == set(modules[:3])


def test_a_layer_without_a_backward_pass_is_named(patcher):
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("ConvRot W4A4 GEMM expects RHS W.T")

    block = patcher.model.diffusion_model.middle_block[0]
    handle = block.register_forward_hook(lambda module, inputs, output: Forward.apply(output))
    try:
        message = r"no gradient can be taken through this model \(ConvRot W4A4.*'fast'"
        with pytest.raises(RuntimeError, match=message):
            run(patcher, image_guidance())
        run(patcher, image_guidance(gradient="fast"))
    finally:
        handle.remove()
    _, trace = run(patcher, image_guidance())
    assert not any(any(step.skipped) for step in trace.steps)


def test_what_the_host_counts_as_out_of_memory_is(monkeypatch):
    assert host.out_of_memory(torch.cuda.OutOfMemoryError("no"))
    assert not host.out_of_memory(RuntimeError("other"))
    monkeypatch.setattr(comfy.model_management, "is_oom", lambda error: "other" in str(error), raising=False)
    assert host.out_of_memory(RuntimeError("other"))


def test_several_latents_as_one_are_refused():
    packed = SimpleNamespace(conds={}, inner_model=torch.nn.Identity())
    kernel.refuse_several_latents("DSG Guidance", packed)
    packed.inner_model.latent_shapes = [(1, 4, 8, 8)]
    kernel.refuse_several_latents("DSG Guidance", packed)
    packed.inner_model.latent_shapes *= 2
    with pytest.raises(ValueError, match="DSG Guidance: this model samples several latents as one"):
        kernel.refuse_several_latents("DSG Guidance", packed)


def test_a_weak_loss_passes_through_a_decoder_in_half_precision(patcher):
    """Of 1e-8 a pixel, which float16 has no number for that a decoder could multiply."""

    class Weak(Loss):
        def forward(self, images, step=None):
            return 1e-8 * images.square().flatten(1).sum(1)

    gradients = []
    for dtype in (torch.float32, torch.float16):
        vae = tiny_models.TinyVAE()
        with torch.inference_mode():
            vae.first_stage_model.to(dtype)
        vae.vae_dtype = dtype
        seen = []

        class Spy(_Spherical):
            def drawn(self, noise, sigma_next, seen=seen):
                seen.append(self.latest.gradient.clone())
                return super().drawn(noise, sigma_next)

        guidance = Guidance(Weak(), Decoder(vae), guidance_rate=0.3)
        sampler = steered(comfy.samplers.ksampler("euler_ancestral"), guidance, GuidanceTrace(), Spy)
        run(patcher, None, sampler=sampler)
        gradients.append(seen[0])
    exact, half = gradients
    assert torch.nn.functional.cosine_similarity(exact.flatten(), half.flatten(), dim=0) > 0.99
    torch.testing.assert_close(half.norm(), exact.norm(), rtol=0.02, atol=0)


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


def test_a_controlnet_is_differentiated_with_the_model(patcher):
    plain, _ = run(patcher, None)
    with torch.inference_mode():
        control = tiny_models.controlnet()
    results = {}
    for gradient in (None, *GRADIENTS):
        guidance = image_guidance(gradient=gradient) if gradient else None
        before = weights(control.control_model)
        results[gradient], trace = run(patcher, guidance, control=control)
        assert weights(control.control_model) == before
        assert not any(any(step.skipped) for step in trace.steps)
    assert not torch.equal(results[None], plain)
    assert len({float(result.sum()) for result in results.values()}) == 4


def test_prompts_with_loras_of_their_own_are_refused_where_the_gradient_would_be_wrong(patcher):
    with pytest.raises(RuntimeError, match=r"different hooks.*'fast'"):
        kernel._refuse_what_has_no_gradient(
            "DSG Guidance",
            kernel.FAST,
            SimpleNamespace(conds={"positive": [{"hooks": object()}], "negative": [{}]}),
            {},
        )
    alike = SimpleNamespace(conds={"positive": [{}], "negative": [{}]})
    kernel._refuse_what_has_no_gradient("DSG Guidance", kernel.FAST, alike, {})


def test_a_model_that_is_spread_over_gpus_is_refused(patcher):
    with pytest.raises(RuntimeError, match=r"ComfyUI spreads this model over several GPUs.*'fast'"):
        kernel._refuse_what_has_no_gradient(
            "DSG Guidance", kernel.FAST, SimpleNamespace(conds={}), {"multigpu_clones": {}}
        )


def test_half_precision_weights_and_vae(patcher):
    half = tiny_models.sd15(dtype=torch.bfloat16)
    with torch.inference_mode():
        half.model.diffusion_model.to(torch.bfloat16)
    _, trace = run(half, image_guidance())
    _, exact = run(patcher, image_guidance())
    assert not any(any(step.skipped) for step in trace.steps)
    torch.testing.assert_close(trace.steps[0].loss, exact.steps[0].loss, rtol=0.05, atol=0)


def test_a_video_of_one_frame_is_an_image_and_a_longer_one_is_refused():
    decode = Decoder(tiny_models.TinyVAE())
    with torch.no_grad():
        assert decode(torch.zeros(2, 4, 1, 8, 8)).shape == (2, 3, 64, 64)
        with pytest.raises(ValueError, match="video of 3 frames"):
            decode(torch.zeros(2, 4, 3, 8, 8))


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


def test_a_run_leaves_no_mode_hook_or_option_behind(patcher):
    import comfy.model_management

    hooks = [len(module._forward_pre_hooks) for module in patcher.model.modules()]
    options = copy.deepcopy(patcher.model_options)
    for gradient in GRADIENTS:
        with torch.inference_mode():
            run(patcher, image_guidance(gradient=gradient))
            assert torch.is_inference_mode_enabled()
    assert [len(module._forward_pre_hooks) for module in patcher.model.modules()] == hooks
    assert patcher.model_options == options
    assert not getattr(comfy.model_management, "in_training", False)


def test_cancel_inside_a_guided_call_leaves_the_model_usable(patcher):
    plain, _ = run(patcher, None)
    block = patcher.model.diffusion_model.middle_block[0]

    def interrupt(*_):
        if torch.is_grad_enabled():
            raise Interrupted

    before = weights(patcher.model)
    handle = block.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(Interrupted):
            run(patcher, image_guidance())
    finally:
        handle.remove()
    assert weights(patcher.model) == before
    assert torch.equal(run(patcher, None)[0], plain)


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
