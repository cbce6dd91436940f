"""What a predictor sees of the model: the output of its U-Net's last middle module."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .predictor import BOTTLENECK

__all__ = ["Bottleneck", "watched"]

log = logging.getLogger("sphereguide")


class Bottleneck:
    """The channel mean of the bottleneck in a model call, of its conditional half, pooled to 8×8."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []  # of one call of the network
        self.found: list[Tensor] = []  # `[B, 64]` of each conditional part since `forget`
        self.batch = 0
        self.open = self.warned = False

    def forget(self, x: Tensor) -> None:
        """The next evaluation is that of x `[B, …]`."""
        self.found.clear()
        self.batch, self.open = len(x), True

    def features(self, x: Tensor) -> Tensor:
        """`[B, 64]` for x `[B, …]`: zeros where the network has no bottleneck, or shows none for each sample."""
        if not self.found:
            return x.new_zeros(len(x), BOTTLENECK**2, dtype=torch.float32)
        return torch.stack(self.found).mean(0)  # several prompts have several

    def note(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.open and isinstance(output, Tensor):
            self.outputs.append(output.detach().float().mean(1))

    def sort(self, cond_or_uncond: list[int], whole: bool) -> None:
        """Finds the conditional parts in what a call left: ComfyUI puts several prompts in one batch, marked so.

        whole   whether the network was called once, with all that ComfyUI gave to be called with
        """
        outputs, self.outputs = self.outputs, []
        rows = len(cond_or_uncond) * self.batch
        if not self.open or not outputs or 0 not in cond_or_uncond:
            return
        if not whole or len(outputs) > 1 or outputs[0].shape[0] % rows:
            if not self.warned:
                log.warning(
                    "AMED Sampler: the model is called in pieces (tiles, windows?), so that the predictor can't see "
                    "its bottleneck. It chooses by the time alone."
                )
            self.warned = True
            return
        maps = outputs[0].unflatten(0, (len(cond_or_uncond), self.batch, -1)).mean(2)  # over the frames of a video
        pooled = F.adaptive_avg_pool2d(maps, BOTTLENECK).flatten(2)
        self.found += [part for part, index in zip(pooled, cond_or_uncond, strict=True) if index == 0]

    def close(self, args: dict[str, Any]) -> Tensor:
        """A post-CFG function: what others of them ask the model is no part of the evaluation."""
        self.open = False
        return args["denoised"]


@contextlib.contextmanager
def watched(
    diffusion_model: nn.Module | None, model_options: dict[str, Any], prompts: Collection[str] = ("positive",)
) -> Iterator[tuple[Bottleneck, dict[str, Any]]]:
    """Within the block, calls of the network with the yielded `model_options` leave their bottleneck.

    diffusion_model   None for a predictor that looks at none
    prompts   what the guider calls its prompts: of others than positive and negative the first need not be the positive
    """
    bottleneck = Bottleneck()
    # ComfyUI calls the children of the block, and never the block.
    block = getattr(diffusion_model, "middle_block", None)
    readable = isinstance(block, nn.Sequential) and len(block) and {*prompts} <= {"positive", "negative"}
    if not readable or "multigpu_clones" in model_options:
        yield bottleneck, model_options
        return
    wrapper = model_options.get("model_function_wrapper")

    def call(apply_model: Any, parameters: dict[str, Any]) -> Tensor:
        bottleneck.outputs.clear()
        sizes = []

        def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            sizes.append(x.shape)
            return apply_model(x, *args, **kwargs)

        x = parameters["input"]
        if wrapper is None:
            output = counted(x, parameters["timestep"], **parameters["c"])
        else:
            output = wrapper(counted, parameters)
        bottleneck.sort(parameters["cond_or_uncond"], sizes == [x.shape])
        return output

    functions = [bottleneck.close, *model_options.get("sampler_post_cfg_function", [])]
    handle = block[-1].register_forward_hook(bottleneck.note)
    try:
        yield bottleneck, {**model_options, "model_function_wrapper": call, "sampler_post_cfg_function": functions}
    finally:
        handle.remove()  # clones share the module
