"""What a predictor sees of the model: the output of its U-Net's last middle module."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .predictor import BOTTLENECK

__all__ = ["Bottleneck", "watched"]

log = logging.getLogger("sphereguide")


class Bottleneck:
    """The channel mean of the bottleneck in the latest model call, of its conditional half, pooled to 8×8."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []  # of one call of the network
        self.found: list[Tensor] = []  # `[B, 64]` of each conditional part since `forget`
        self.unclear = False

    def forget(self) -> None:
        self.found.clear()

    def features(self, x: Tensor) -> Tensor:
        """`[B, 64]` for x `[B, …]`: zeros where the network has no bottleneck, or shows none for each sample."""
        if not self.found:
            return x.new_zeros(len(x), BOTTLENECK**2, dtype=torch.float32)
        return torch.stack(self.found).mean(0)  # several prompts have several

    def note(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self.outputs.append(output.detach().float().mean(1))

    def sort(self, cond_or_uncond: list[int], batch: int) -> None:
        """Finds the conditional parts in what a call left: ComfyUI puts several prompts in one batch, marked so."""
        outputs, self.outputs = self.outputs, []
        parts = len(cond_or_uncond)
        if not outputs or 0 not in cond_or_uncond:
            return
        if len(outputs) > 1 or outputs[0].shape[0] % batch or batch % parts:
            if not self.unclear:
                log.warning(
                    "AMED Sampler: the model is called in pieces (tiles?), so that the predictor can't see its "
                    "bottleneck. It chooses by the time alone."
                )
            self.unclear = True
            return
        maps = outputs[0].unflatten(0, (parts, batch // parts, -1)).mean(2)  # over the frames of a video
        pooled = F.adaptive_avg_pool2d(maps, BOTTLENECK).flatten(2)
        self.found += [part for part, index in zip(pooled, cond_or_uncond, strict=True) if index == 0]


@contextlib.contextmanager
def watched(diffusion_model: nn.Module, model_options: dict[str, Any]) -> Iterator[tuple[Bottleneck, dict[str, Any]]]:
    """Within the block, calls of the network with the yielded `model_options` leave their bottleneck."""
    bottleneck = Bottleneck()
    # ComfyUI calls the children of the block, and never the block.
    block = getattr(diffusion_model, "middle_block", None)
    if not isinstance(block, nn.Sequential) or not len(block):
        yield bottleneck, model_options
        return
    wrapper = model_options.get("model_function_wrapper")

    def call(apply_model: Any, parameters: dict[str, Any]) -> Tensor:
        bottleneck.outputs.clear()
        if wrapper is None:
            output = apply_model(parameters["input"], parameters["timestep"], **parameters["c"])
        else:
            output = wrapper(apply_model, parameters)
        bottleneck.sort(parameters["cond_or_uncond"], len(parameters["input"]))
        return output

    handle = block[-1].register_forward_hook(bottleneck.note)
    try:
        yield bottleneck, {**model_options, "model_function_wrapper": call}
    finally:
        handle.remove()  # clones share the module
