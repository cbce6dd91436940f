"""ILVR: Iterative Latent Variable Refinement (Choi et al., ICCV 2021, arXiv 2108.02938), for most samplers.

After each step the low frequencies of the state x' are replaced by those of the reference, noised to the same level:

    x = x' + φ_N(y_t) − φ_N(x'),    y_t ~ q(y_t | y)            eq. 8; φ_N scales down and up by N

A sampler asks the model about its state, so the state is refined where it arrives there: in place, at each call whose
sigma is an entry of the schedule. So multistep samplers keep their history. A sampler that does not go on from there
(uni_pc) is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import comfy.samplers
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import host
from ..losses.base import repeat
from ..losses.measurement import low_pass
from .kernel import lost_changes_message, mask_at, noise_of, refuse_several_latents, with_function

__all__ = ["ReferencedModel", "referenced"]


def referenced(
    sampler: comfy.samplers.KSAMPLER, reference: Tensor, factor: int, start_percent: float, end_percent: float
) -> comfy.samplers.KSAMPLER:
    """`sampler` with ILVR.

    reference  latents `[R, C, h, w]` as ComfyUI passes them between nodes, resized to the latent that is sampled;
               sample i has reference i mod R
    factor     N, in latent pixels, ≥ 2

    The noise of y_t depends on the seed of the run and on the step alone. Where the schedule ends within the range,
    as it does with `end_percent` 1, the result itself is refined too. What a noise mask keeps, it keeps.

    Raises ValueError for a sampler that takes no notice of a change of its state. One that is guided already hides it:
    running that raises ValueError.
    """
    if host.keeps_changes(sampler, at_levels=True) is False:
        raise ValueError(lost_changes_message("ILVR Reference", sampler, "euler or euler_ancestral"))
    function = sampler.sampler_function

    def sample(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
        **options: Any,
    ) -> Tensor:
        refuse_several_latents("ILVR Reference", model)
        extra_args = extra_args or {}
        seed = extra_args.get("seed") or 0
        model = ReferencedModel(model, x, sigmas, reference, factor, start_percent, end_percent, seed)
        x = function(model, x, sigmas, extra_args=extra_args, callback=callback, disable=disable, **options)
        return model.refined(x, len(sigmas) - 1, **extra_args) if model.refines(model.schedule[-1]) else x

    return with_function(sampler, sample)


class ReferencedModel:
    """A sampler's model that refines the state that it is asked about. See `referenced`."""

    refines_state = True

    def __init__(
        self,
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        reference: Tensor,
        factor: int,
        start_percent: float,
        end_percent: float,
        seed: int,
    ) -> None:
        self.wrapped = model
        self.schedule: list[float] = sigmas.tolist()
        self.factor = factor
        self.seed = seed
        base_model = host.base_model(model)
        self.model_sampling = base_model.model_sampling
        self.sigma_start = float(self.model_sampling.percent_to_sigma(start_percent))
        self.sigma_end = float(self.model_sampling.percent_to_sigma(end_percent))
        reference = base_model.process_latent_in(reference.to(x))
        if reference.shape[1:-2] != x.shape[1:-2]:
            raise ValueError(
                f"ILVR Reference: the reference latent is of shape {list(reference.shape)}, the sampled one of shape "
                f"{list(x.shape)}. Encode the reference with this model's VAE, with as many frames."
            )
        frames = reference.reshape(-1, *reference.shape[-3:])
        if frames.shape[-2:] != x.shape[-2:]:
            frames = F.interpolate(frames, size=x.shape[-2:], mode="bicubic", antialias=True)
        reference = frames.reshape(*reference.shape[:-2], *x.shape[-2:])
        self.reference = repeat(reference, len(x))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        level = float(sigma.max())
        if self.refines(level):
            entries = (i for i, s in enumerate(self.schedule) if i and math.isclose(s, level, rel_tol=1e-4))
            step = next(entries, None)
            if step is not None:
                x.copy_(self.refined(x, step, **extra_args))
        return self.wrapped(x, sigma, **extra_args)

    def refines(self, sigma: float) -> bool:
        return self.sigma_end <= sigma <= self.sigma_start

    def refined(self, x: Tensor, step: int, **extra_args: Any) -> Tensor:
        """x with the low frequencies of the reference, noised to the level of that entry of the schedule."""
        sigma = torch.as_tensor(self.schedule[step], device=x.device, dtype=x.dtype)
        y = self.reference
        if self.schedule[step] > 0:
            y = self.model_sampling.noise_scaling(sigma, noise_of(x.shape, self.seed, step, 0, 1).to(x), y)
        change = low_pass((y - x).reshape(-1, *x.shape[-3:]), self.factor).reshape(x.shape)
        # At sigma 0 a mask that changes with the noise (differential diffusion) would leave nothing out.
        level = sigma if sigma > 0 else torch.full_like(sigma, self.schedule[step - 1])
        mask = mask_at(self.wrapped, level.expand(len(x)), **extra_args)
        return x + (change if mask is None else change * mask)
