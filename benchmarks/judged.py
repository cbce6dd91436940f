"""What the judge sees in latents of Toy Portraits, for benchmarks of many samples."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from result import Result
from sphereguide.demo import judge as judging
from sphereguide.demo import portraits, toy_portraits
from torch import Tensor

__all__ = [
    "DESCENTS",
    "fast_vae",
    "features_of",
    "frechet",
    "originals",
    "originals_row",
    "real_features",
    "steps_of",
]

FEW = 4
"""Pictures that are decoded at once: their activations stay in a processor's cache."""
DESCENTS = 3
"""Of a step of DiffRGD, a model call each."""


def steps_of(method: str, nfe: int) -> int:
    """That take `nfe` model calls. The last step of DiffRGD, which draws no noise, takes one call."""
    return (nfe + DESCENTS) // (DESCENTS + 1) if method == "DiffRGD" else nfe


@functools.cache
def _judge() -> judging.Judge:
    return judging.load(toy_portraits.WEIGHTS)


@functools.cache
def fast_vae() -> Any:
    """In bfloat16, which takes half of the time; 200 portraits lie 0.0001 off those that float32 decodes."""
    with torch.inference_mode():
        vae = toy_portraits.load_vae()
        vae.vae_dtype = torch.bfloat16
        # The memory format takes a fifth off a guided step on a processor.
        vae.first_stage_model.to(torch.bfloat16, memory_format=torch.channels_last)
        return vae


def features_of(latents: Tensor) -> Tensor:
    """Of the pictures of latents `[B, 4, 16, 16]`, `[B, 96]`."""
    with torch.inference_mode():
        pictures = torch.cat([fast_vae().decode(few) for few in latents.split(FEW)])
    return _judge().of(pictures.movedim(-1, 1).clone()).features


def frechet(pictures: Tensor, real: Tensor) -> float:
    """Distance of pictures `[B, 3, 128, 128]` in 0..1 to those with the features `real`, in four digits."""
    return round(judging.frechet(_judge().of(pictures).features, real), 4)


def originals(seeds: Sequence[portraits.Portrait | int]) -> Tensor:
    """Portraits, `[B, 3, 128, 128]`, 0..1."""
    return judging.to_tensor(np.stack([portraits.render(seed) for seed in seeds]))


def originals_row(result: Result, seeds: Sequence[int], real: Tensor) -> dict[str, Any]:
    """What the Fréchet distance of so few is, be they perfect: of the test portraits `seeds` themselves."""
    key = {"method": "originals", "settings": "reference", "n": len(seeds)}
    if result.find(key) is None:
        result.add({**key, "frechet": frechet(originals(seeds), real)})
    return result.find(key)


def real_features(first: int, quick: bool) -> Tensor:
    """Of test portraits that were never a latent, from that number on, `[N, 96]`.

    A Fréchet distance is to 2048 of them; with --quick to too few for a figure to mean anything.
    """
    seeds = portraits.TEST_SEEDS[first : first + (128 if quick else 2048)]
    return _judge().of(judging.to_tensor(portraits.dataset(seeds)["images"])).features
