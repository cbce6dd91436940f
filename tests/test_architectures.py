"""Guidance through the real networks of this host, small and with random weights, and each way of predicting."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import pytest
import tiny_models
import torch
from sphereguide.losses.base import Loss
from sphereguide.samplers.dsg import Guidance, guided
from sphereguide.samplers.kernel import GRADIENTS
from sphereguide.samplers.trace import GuidanceTrace
from tiny_models import ARCHITECTURES, Architecture
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PREDICTIONS = (
    *("V_PREDICTION", "V_PREDICTION_EDM", "STABLE_CASCADE", "EDM", "FLOW", "V_PREDICTION_CONTINUOUS", "FLUX"),
    *("FLOW_COSMOS", "V_PREDICTION_DDPM", "FLOW_AV"),
)
ELSEWHERE = {"EPS"}  # SD 1.5's own
NO_SCHEDULE = {"IMG_TO_IMG", "IMG_TO_IMG_FLOW"}  # from image to image in one step, without noise
UNET = {"channel_mult": [1], "num_res_blocks": [1], "transformer_depth": [1], "transformer_depth_output": [1, 1]}


def _predictions() -> dict[str, Architecture]:
    """Every prediction of this host, those that came after this test too, and those that it lacks."""
    of_host = comfy.model_base.ModelType.__members__.keys() - NO_SCHEDULE - ELSEWHERE
    base = dataclasses.replace(ARCHITECTURES["SD 1.5"], network={**tiny_models.SD15, **UNET}, shape=(4, 4, 4))
    names = dict.fromkeys([*PREDICTIONS, *sorted(of_host)])
    return {f"SD 1.5, {name}": dataclasses.replace(base, prediction=name) for name in names}


CASES = {**ARCHITECTURES, **_predictions()}
GUIDED = [
    pytest.param(name, gradient, id=f"{name}-{gradient}")
    for name in CASES
    for gradient in (GRADIENTS if name in ARCHITECTURES else GRADIENTS[:1])
]


def case(name: str) -> Architecture:
    if missing := CASES[name].missing:
        pytest.skip(f"{name}: {missing}")
    return CASES[name]


@functools.cache
def loaded(name: str, dtype: torch.dtype = torch.float32) -> comfy.model_patcher.ModelPatcher:
    return CASES[name].patcher(dtype)


@functools.cache
def unguided(name: str) -> Tensor:
    return sample(CASES[name], loaded(name), comfy.samplers.ksampler("euler_ancestral"))


class Distance(Loss):
    """‖x̂₀ − target‖ of each sample, on latents."""

    space = "latent"

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("target", torch.randn(1, *shape, generator=torch.Generator().manual_seed(9)))

    def forward(self, latents, step=None):
        return torch.linalg.vector_norm((latents - self.target.to(latents)).flatten(1), dim=1)


def sample(architecture, patcher, sampler, *, cfg=3.0, sigmas=None) -> Tensor:
    """Two latents through ComfyUI's own sampling, as SamplerCustom calls it."""
    with torch.inference_mode():
        if sigmas is None:
            sigmas = comfy.samplers.calculate_sigmas(patcher.model.model_sampling, "normal", 5)
        noise = torch.randn(2, *architecture.shape, generator=torch.manual_seed(4))
        positive, negative, latent = architecture.prompt(1), architecture.prompt(2), torch.zeros_like(noise)
        return comfy.sample.sample_custom(
            patcher, noise, cfg, sampler, sigmas, positive, negative, latent, disable_pbar=True, seed=4
        )


def with_guidance(architecture, sampler=None, **settings):
    sampler = sampler or comfy.samplers.ksampler("euler_ancestral")
    with torch.inference_mode():
        loss = Distance(architecture.shape)
    trace = GuidanceTrace()
    return guided(sampler, Guidance(loss, **settings), trace), trace


def state(model: nn.Module) -> tuple[Any, ...]:
    """What guidance could leave changed: which tensors there are, how the modules run, global modes and kernels."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        {name: (id(tensor), tensor.data_ptr(), tensor.is_inference()) for name, tensor in tensors},
        {
            name: (module.training, "forward" in vars(module), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        },
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        getattr(comfy.model_management, "in_training", None),
        {name: id(value) for name, value in vars(sys.modules.get("comfy_kitchen", comfy)).items()},
    )


# -- the sampler -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, gradient", GUIDED)
def test_guidance_lowers_the_loss_on_the_sphere_and_leaves_the_model_as_it_was(name, gradient):
    architecture, loss = case(name), Distance(CASES[name].shape)
    model = loaded(name).model
    without = unguided(name)
    before, values = state(model), [tensor.clone() for tensor in model.state_dict().values()]
    sampler, trace = with_guidance(architecture, guidance_rate=0.5, gradient=gradient)
    latent = sample(architecture, loaded(name), sampler)
    assert state(model) == before
    assert all(map(torch.equal, model.state_dict().values(), values))
    assert (loss(latent) < loss(without)).all()
    assert len(trace.steps) == 4 and not any(any(step.skipped) for step in trace.steps)
    torch.testing.assert_close(torch.tensor([step.radius for step in trace.steps]), torch.ones(4, 2))


@pytest.mark.parametrize("name", CASES)
def test_rate_zero_is_the_unguided_sampler_bit_for_bit(name):
    sampler, trace = with_guidance(case(name), guidance_rate=0.0)
    assert torch.equal(sample(case(name), loaded(name), sampler), unguided(name))
    assert trace.steps == []


# -- the gradient ------------------------------------------------------------------------------------------------------


class DoublePrecision(TorchFunctionMode):
    """Where the host casts to single precision, as it does what a network returns, it casts to double instead."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def doubled(value):
            return torch.float64 if value is torch.float32 else value

        if function is torch.Tensor.float:
            function = torch.Tensor.double
        return function(*map(doubled, args), **{name: doubled(value) for name, value in (kwargs or {}).items()})


def gradient_of(architecture, patcher, *, cfg, probe=None, **settings) -> tuple[Tensor, Any]:
    """∇ₓ L(x̂₀(x)) of one guided call as the sampler gets it, `[2, …]`, and what `probe(L, x)` finds."""
    found: dict[str, Any] = {}
    sigma = float(patcher.model.model_sampling.percent_to_sigma(0.4))

    def one_step(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
        def distance(x):
            return loss(model(x, sigmas[:1].expand(2), **extra_args))

        x = x.double()  # newer hosts sample in single precision
        with DoublePrecision():
            found["probe"] = probe and probe(distance, x)
            distance(x)
        found["noise"] = noise_sampler(sigmas[0], sigmas[1])  # at rate 1 from nothing: −√n·g/‖g‖
        return x

    loss = Distance(architecture.shape)
    silent = {"noise_sampler": lambda sigma, sigma_next: torch.zeros(2, *architecture.shape, dtype=torch.float64)}
    sampler = comfy.samplers.KSAMPLER(one_step, silent)
    sampler, trace = with_guidance(architecture, sampler, guidance_rate=1.0, **settings)
    sigmas = torch.tensor([sigma, sigma / 2, 0.0], dtype=torch.float64)
    sample(architecture, patcher, sampler, cfg=cfg, sigmas=sigmas)
    norm = torch.tensor(trace.steps[0].gradient_norm, dtype=torch.float64).reshape(2, *[1] * len(architecture.shape))
    return -found["noise"] * norm / math.prod(architecture.shape) ** 0.5, found["probe"]


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_finite_differences_in_float64(name, cfg):
    architecture, h = case(name), 1e-5
    along = torch.randn(2, *architecture.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))

    def central_difference(f, x):
        return (f(x + h * along) - f(x - h * along)) / (2 * h)

    gradient, numeric = gradient_of(architecture, loaded(name, torch.float64), cfg=cfg, probe=central_difference)
    torch.testing.assert_close((gradient * along).flatten(1).sum(1), numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_checkpointing_gives_the_same_gradient(name):
    architecture = case(name)
    patcher = loaded(name, torch.float64)
    calls, gradients = {}, {}
    blocks = [child for child in patcher.model.diffusion_model.children() if isinstance(child, nn.ModuleList)]
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)]

    def count(*_):
        calls[checkpointing] += 1

    handles = [layer.register_forward_pre_hook(count) for layer in layers]
    for checkpointing in (False, True):
        calls[checkpointing] = 0
        gradients[checkpointing], _ = gradient_of(architecture, patcher, cfg=3.0, checkpointing=checkpointing)
    for handle in handles:
        handle.remove()
    assert calls[True] > 1.5 * calls[False] > 0  # what only the prompt goes through is not computed again
    torch.testing.assert_close(gradients[True], gradients[False], rtol=1e-10, atol=1e-12)
