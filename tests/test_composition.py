"""Guidance beside what else a workflow does to a model or to its prompts: neither breaks the other."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import comfy.samplers
import comfy.sd
import pytest
import tiny_models
import torch
from sphereguide.demo.bootstrap import HOST
from sphereguide.samplers.dsg import Guidance, guided
from sphereguide.samplers.trace import GuidanceTrace
from test_autograd import Brightness
from torch import Tensor

NODES, EXTRAS = ("nodes", "comfy_extras") if HOST else ("comfy.nodes.base_nodes", "comfy_extras.nodes")
STEPS = 3


def node(module: str, name: str, **inputs: Any) -> Any:
    """The outputs of a node of this host."""
    kind = getattr(importlib.import_module(module), name)
    run = getattr(kind, "execute", None) or getattr(kind(), kind.FUNCTION)
    return run(**inputs)


@dataclass(frozen=True)
class Workflow:
    model: Any
    positive: list[Any]
    negative: list[Any]
    latent: Tensor
    mask: Tensor | None = None


@functools.cache
def plain(*shape: int) -> Workflow:
    prompts = (tiny_models.conditioning(seed=seed) for seed in (1, 2))
    return Workflow(base_model(), *prompts, torch.zeros(shape))


@functools.cache
def base_model() -> Any:
    return tiny_models.sd15()


def picture(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(6))


# -- what workflows do -------------------------------------------------------------------------------------------------


def lora(workflow: Workflow) -> Workflow:
    weights, generator = {}, torch.Generator().manual_seed(7)
    for name, weight in workflow.model.model.diffusion_model.named_parameters():
        if ".attn" in name and name.endswith(".weight"):
            key = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
            weights[f"{key}.lora_up.weight"] = torch.randn(weight.shape[0], 2, generator=generator)
            weights[f"{key}.lora_down.weight"] = torch.randn(2, weight.shape[1], generator=generator)
    return replace(workflow, model=comfy.sd.load_lora_for_models(workflow.model, None, weights, 0.3, 0.0)[0])


def two_areas(workflow: Workflow) -> Workflow:
    left, right = (
        node(NODES, "ConditioningSetArea", conditioning=prompt, width=width, height=64, x=x, y=0, strength=1.0)[0]
        for prompt, width, x in ((workflow.positive, 64, 0), (tiny_models.conditioning(seed=3), 96, 32))
    )
    return replace(workflow, positive=left + right, latent=torch.zeros(1, 4, 8, 16))


def masked_prompt(bounds: str, workflow: Workflow) -> Workflow:
    mask = torch.zeros(64, 64)
    mask[16:48, :40] = 1
    local = node(
        NODES,
        "ConditioningSetMask",
        conditioning=tiny_models.conditioning(seed=3),
        mask=mask,
        set_cond_area=bounds,
        strength=0.8,
    )
    return replace(workflow, positive=workflow.positive + local[0])


def ranges(workflow: Workflow) -> Workflow:
    prompts = ((workflow.positive, 0.0, 0.4), (tiny_models.conditioning(seed=3), 0.4, 1.0))
    first, second = (
        node(NODES, "ConditioningSetTimestepRange", conditioning=prompt, start=start, end=end)[0]
        for prompt, start, end in prompts
    )
    return replace(workflow, positive=first + second)


def controlnet_and_areas(workflow: Workflow) -> Workflow:
    hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    control = tiny_models.controlnet().copy().set_cond_hint(hint)
    workflow = two_areas(workflow)
    positive = [[prompt, {**options, "control": control}] for prompt, options in workflow.positive]
    return replace(workflow, positive=positive)


def patched(module: str, name: str, workflow: Workflow, **settings: float) -> Workflow:
    return replace(workflow, model=node(f"{EXTRAS}.{module}", name, model=workflow.model, **settings)[0])


def differential_diffusion(workflow: Workflow) -> Workflow:
    workflow = patched("nodes_differential_diffusion", "DifferentialDiffusion", workflow)
    mask = torch.linspace(0.2, 1, 8).expand(1, 1, 8, 8).clone()
    return replace(workflow, latent=picture(2, 4, 8, 8), mask=mask)


class Encoder:
    """As much of a VAE as encoding takes: the picture's channels and their mean."""

    def encode(self, pixels: Tensor) -> Tensor:
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return torch.cat([small, small.mean(1, keepdim=True)], 1)


def inpainting_model(workflow: Workflow) -> Workflow:
    model = tiny_models.sd15(in_channels=9)
    model.model.set_inpaint()
    mask = torch.zeros(1, 64, 64)
    mask[..., 24:] = 1
    positive, negative, latent = node(
        NODES,
        "InpaintModelConditioning",
        positive=workflow.positive,
        negative=workflow.negative,
        pixels=torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(5)),
        vae=Encoder(),
        mask=mask,
    )
    mask = torch.nn.functional.interpolate(latent["noise_mask"].reshape(1, 1, 64, 64), size=(8, 8))
    return Workflow(model, positive, negative, latent["samples"], mask)


class Tiles:
    """MultiDiffusion (arXiv 2302.08113): the model sees overlapping tiles of a latent, which are averaged.

    As packs for tiled diffusion have it: in inference mode whatever the caller's mode, with buffers that stay from call
    to call, and returning one of them.
    """

    def __init__(self, size: int, stride: int, returns_buffer: bool = True) -> None:
        self.size, self.stride, self.returns_buffer = size, stride, returns_buffer
        self.total: Tensor | None = None
        self.count: Tensor | None = None

    @torch.inference_mode()
    def __call__(self, model_function: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        x, timestep, c = args["input"], args["timestep"], args["c"]
        places = [
            (..., slice(top, top + self.size), slice(left, left + self.size))
            for top in range(0, x.shape[-2] - self.size + 1, self.stride)
            for left in range(0, x.shape[-1] - self.size + 1, self.stride)
        ]
        if self.total is None or self.total.shape != x.shape:
            self.total, self.count = torch.zeros_like(x), torch.zeros_like(x[:1])
            for place in places:
                self.count[place] += 1
        self.total.zero_()
        for place in places:
            self.total[place] += model_function(x[place], timestep, **c) / self.count[place]
        return self.total if self.returns_buffer else self.total.clone()


def tiled_diffusion(workflow: Workflow, returns_buffer: bool = True) -> Workflow:
    model = workflow.model.clone()
    model.set_model_unet_function_wrapper(Tiles(8, 4, returns_buffer))
    return replace(workflow, model=model, latent=torch.zeros(2, 4, 12, 16))


SHAPES = {"5×9 latents": (2, 4, 5, 9), "one sample": (1, 4, 8, 8), "three samples": (3, 4, 8, 8)}
WORKFLOWS: dict[str, Callable[[Workflow], Workflow]] = {
    "LoRA": lora,
    "two areas": two_areas,
    "masked prompt": functools.partial(masked_prompt, "default"),
    "mask bounds": functools.partial(masked_prompt, "mask bounds"),
    "ranges": ranges,
    "ControlNet and areas": controlnet_and_areas,
    "PAG": functools.partial(patched, "nodes_pag", "PerturbedAttentionGuidance", scale=3.0),
    "SAG": functools.partial(patched, "nodes_sag", "SelfAttentionGuidance", scale=0.5, blur_sigma=2.0),
    "RescaleCFG": functools.partial(patched, "nodes_model_advanced", "RescaleCFG", multiplier=0.7),
    "FreeU": functools.partial(patched, "nodes_freelunch", "FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2),
    "LoRA, PAG and ranges": lambda workflow: ranges(WORKFLOWS["PAG"](lora(workflow))),
    "differential diffusion": differential_diffusion,
    "inpainting model": inpainting_model,
    "tiled diffusion": tiled_diffusion,
    **{name: lambda workflow, shape=shape: plain(*shape) for name, shape in SHAPES.items()},
}


@functools.cache
def workflow(name: str) -> Workflow:
    with torch.inference_mode():  # as nodes run
        return WORKFLOWS[name](plain(2, 4, 8, 8))


def sample(workflow: Workflow, sampler: comfy.samplers.KSAMPLER | None = None) -> Tensor:
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(workflow.model)
        guider.set_conds(workflow.positive, workflow.negative)
        guider.set_cfg(3.0)
        sigmas = comfy.samplers.calculate_sigmas(workflow.model.model.model_sampling, "karras", STEPS)
        noise = torch.randn(workflow.latent.shape, generator=torch.manual_seed(4))
        sampler = sampler or comfy.samplers.ksampler("euler_ancestral")
        latent = workflow.latent.clone()
        return guider.sample(noise, latent, sampler, sigmas, denoise_mask=workflow.mask, disable_pbar=True, seed=4)


def steer(workflow: Workflow, **settings: Any) -> tuple[Tensor, GuidanceTrace]:
    trace = GuidanceTrace()
    sampler = guided(comfy.samplers.ksampler("euler_ancestral"), Guidance(Brightness(), **settings), trace)
    return sample(workflow, sampler), trace


@functools.cache
def unguided(name: str) -> Tensor:
    return sample(workflow(name))


# -- both at once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_loss_falls_and_the_unguided_run_stays_what_it_was(name: str) -> None:
    before = unguided(name)
    latent, trace = steer(workflow(name), guidance_rate=0.5)
    assert (Brightness()(latent) < Brightness()(before)).all()
    assert [step.step for step in trace.steps] == list(range(STEPS - 1))
    assert not any(any(step.skipped) for step in trace.steps)
    assert (torch.tensor([step.radius for step in trace.steps]) - 1).abs().max() < 1e-5
    assert torch.equal(sample(workflow(name)), before)


@pytest.mark.parametrize("name", ["two areas", "ranges", "PAG", "SAG", "RescaleCFG", "tiled diffusion"])
def test_the_negative_prompt_may_be_a_constant(name: str) -> None:
    latent, trace = steer(workflow(name), guidance_rate=0.5, gradient="cond only")
    assert (Brightness()(latent) < Brightness()(unguided(name))).all()
    assert not torch.equal(latent, steer(workflow(name), guidance_rate=0.5)[0])
    assert not any(any(step.skipped) for step in trace.steps)


def test_a_constant_negative_prompt_takes_no_graph_from_a_buffer_of_the_wrapper() -> None:
    given = plain(2, 4, 8, 8)
    norms, expected = (
        [step.gradient_norm for step in steer(tiled_diffusion(given, returns_buffer), gradient="cond only")[1].steps]
        for returns_buffer in (True, False)
    )
    assert torch.allclose(torch.tensor(norms), torch.tensor(expected), rtol=1e-4)


def test_the_buffer_of_a_wrapper_keeps_no_graph() -> None:
    given = tiled_diffusion(plain(2, 4, 8, 8))
    steer(given)
    assert given.model.model_options["model_function_wrapper"].total.grad_fn is None


@pytest.mark.parametrize("name", [name for name in WORKFLOWS if name not in SHAPES])
def test_what_the_workflow_does_has_an_effect(name: str) -> None:
    given = workflow(name)
    without = replace(plain(*given.latent.shape), latent=given.latent, mask=given.mask)
    if name == "inpainting model":
        without = replace(without, model=given.model)
    assert not torch.allclose(unguided(name), sample(without), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_rate_zero_is_the_unguided_run_bit_for_bit(name: str) -> None:
    latent, trace = steer(workflow(name), guidance_rate=0.0)
    assert torch.equal(latent, unguided(name)) and not trace


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_gradient_goes_through_all_of_it(name: str) -> None:
    """Along a random direction, sample by sample, it is that of finite differences."""
    given, found, h = workflow(name), {}, 0.003
    direction = picture(*given.latent.shape)

    def one_step(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
        x, sigma = given.latent + 2 * picture(*x.shape).flip(0, 1), torch.full((len(x),), 2.0)

        ahead, behind = (
            Brightness()(model.wrapped(x + d, sigma, **extra_args)) for d in (h * direction, -h * direction)
        )
        found["numeric"] = (ahead - behind) / (2 * h)
        model(x, sigma, **extra_args)
        found["noise"] = noise_sampler(sigma[0], sigmas[1])  # at rate 1 from nothing: −√n·g/‖g‖
        return x

    silent = {"noise_sampler": lambda sigma, sigma_next: torch.zeros_like(given.latent)}
    sampler = guided(
        comfy.samplers.KSAMPLER(one_step, silent), Guidance(Brightness(), guidance_rate=1.0), trace := GuidanceTrace()
    )
    sample(given, sampler)
    noise, norm = found["noise"].flatten(1), torch.tensor(trace.steps[0].gradient_norm)
    n = (noise != 0).sum(1)  # those that a mask leaves free
    assert (n > n.new_full((), math.prod(given.latent.shape[1:]) // 4)).all()
    analytic = -(noise * direction.flatten(1)).sum(1) * norm / n.sqrt()
    assert ((analytic - found["numeric"]).abs() < 0.01 * norm).all()
    assert found["numeric"].abs().amax() > 0.2 * norm.amax()


def test_a_lora_changes_the_guided_result_and_leaves_the_weights_to_the_bit() -> None:
    network = plain(2, 4, 8, 8).model.model.diffusion_model
    bare, _ = steer(plain(2, 4, 8, 8))
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    latent, _ = steer(workflow("LoRA"))
    assert not torch.allclose(latent, bare, rtol=1e-3, atol=1e-3)
    changed = [name for name, weight in network.state_dict().items() if not torch.equal(weight, before[name])]
    assert changed and all(".attn" in name for name in changed)
    assert torch.equal(steer(plain(2, 4, 8, 8))[0], bare)  # the host takes the LoRA off for it
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
