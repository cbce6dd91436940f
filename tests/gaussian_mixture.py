"""A diffusion model whose denoiser is known exactly, as a ComfyUI `BaseModel`, made as ComfyUI makes its own.

    p(x₀) = Σ_k w_k N(m_k, s²I),    x = α·x₀ + σ·ε    (α = 1; for flow models α = 1 − σ)

    D(x, σ) = E[x₀ | x] = Σ_k r_k·(m_k + α·s²/v·(x − α·m_k)),    r_k ∝ w_k·N(x; α·m_k, v·I),    v = α²s² + σ²

The conditioning shifts the means, so that CFG has an effect.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models_base
import torch
from torch import Tensor, nn

SHAPE = (4, 2, 2)
STD = 0.25


class Denoiser(nn.Module):
    """D(x `[B, 4, 2, 2]`, σ `[B]`, shift `[B]`), with a cache that is no buffer, as some of ComfyUI's networks have."""

    dtype = torch.float32
    std = STD

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.means = nn.Parameter(torch.randn(3, *SHAPE, generator=generator))
        self.register_buffer("log_weights", torch.tensor([0.5, 0.3, 0.2]).log())
        self.cached_ones = torch.ones(1)

    def forward(self, x: Tensor, sigma: Tensor, shift: Tensor, alpha: Tensor) -> Tensor:
        sigma, shift, alpha = (value.to(x).reshape(-1, 1, 1, 1, 1) for value in (sigma, shift, alpha))
        means = self.means.to(x) + shift
        variance = alpha**2 * self.std**2 + sigma**2
        deviation = x[:, None] - alpha * means
        log_density = -0.5 * (deviation**2 / variance).flatten(2).sum(2)
        responsibility = (self.log_weights.to(x) + log_density).softmax(1)[..., None, None, None]
        posterior = means + alpha * self.std**2 / variance * deviation
        posterior *= self.cached_ones.to(x)  # in place on what autograd may have kept, as ComfyUI's blocks of 2024 do
        return (responsibility * posterior).sum(1)


class GaussianMixture(comfy.model_base.BaseModel):
    calls = 0

    def apply_model(self, x: Tensor, t: Tensor, c_crossattn: Tensor | None = None, **kwargs: Any) -> Tensor:
        assert set(kwargs) <= {"transformer_options", "control"}, f"unexpected conditioning {set(kwargs)}"
        self.calls += 1
        sigma, sampling = t.to(x), self.model_sampling
        s, zero = sigma.reshape(-1, 1, 1, 1), torch.zeros_like(x)
        alpha = sampling.noise_scaling(s, torch.zeros_like(s), torch.ones_like(s))
        shift = torch.zeros_like(sigma) if c_crossattn is None else c_crossattn[:, 0, 0]
        denoised = self.diffusion_model(x, sigma, shift, alpha)
        # What a network of this prediction type gives: `calculate_denoised` is affine in it, and is undone so.
        offset, factor = (sampling.calculate_denoised(sigma, a, b) for a, b in ((zero, x), (zero + 1, zero)))
        output = (denoised - offset) / factor
        return sampling.calculate_denoised(sigma, output, x)


class _Config(comfy.supported_models_base.BASE):
    unet_config = {"disable_unet_model_creation": True}
    unet_extra_config = {}
    memory_usage_factor = 0.01


CONFIG = _Config({"disable_unet_model_creation": True})


def patcher(
    model_type: str = "EPS", latent_format: comfy.latent_formats.LatentFormat | None = None
) -> comfy.model_patcher.ModelPatcher:
    """The mixture as a MODEL. Made in inference mode, like everything that a node loads.

    `latent_format` says what the model's latents are to a VAE; without it they are the same.
    """
    with torch.inference_mode():
        model = GaussianMixture(CONFIG, comfy.model_base.ModelType[model_type])
        model.diffusion_model = Denoiser()
        if latent_format is not None:
            model.latent_format = latent_format
        cpu = torch.device("cpu")
        return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def conditioning(shift: float = 0.0) -> list[list[Any]]:
    return [[torch.full((1, 1, 1), shift), {}]]


def sample(
    sampler: comfy.samplers.KSAMPLER,
    model: comfy.model_patcher.ModelPatcher,
    *,
    batch: int = 1,
    steps: int = 8,
    scheduler: str = "normal",
    cfg: float = 1.0,
    seed: int = 1,
    guider: Callable[..., Any] = comfy.samplers.CFGGuider,
    denoise_mask: Tensor | None = None,
    latent: Tensor | None = None,
    callback: Callable[..., None] | None = None,
    noise: Tensor | None = None,
    sigmas: Tensor | None = None,
) -> Tensor:
    """One run, as SamplerCustomAdvanced makes it: in inference mode, seeded, `[batch, 4, 2, 2]`."""
    with torch.inference_mode():
        guide = guider(model)
        guide.set_conds(copy.deepcopy(conditioning(0.3)), copy.deepcopy(conditioning(-0.2)))
        guide.set_cfg(cfg)
        if sigmas is None:
            sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, scheduler, steps)
        latent = torch.zeros(batch, *SHAPE) if latent is None else latent
        if noise is None:
            noise = torch.randn(latent.shape, generator=torch.manual_seed(seed))
        torch.manual_seed(seed)
        return guide.sample(
            noise, latent, sampler, sigmas, denoise_mask=denoise_mask, callback=callback, disable_pbar=True, seed=seed
        )
