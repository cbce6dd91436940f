"""What guidance did, as a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..samplers.trace import GuidanceTrace, GuidedStep


class GuidanceReport:
    DESCRIPTION = (
        "Draws what guidance did at each step: the loss, the size of its gradient, and how far the guided noise is off "
        "the length that noise should have. Put it behind the sampler: the latent passes through."
    )
    CATEGORY = "SphereGuide/guidance"
    FUNCTION = "report"
    RETURN_TYPES = ("LATENT", "IMAGE")
    RETURN_NAMES = ("samples", "report")
    OUTPUT_TOOLTIPS = ("The latent, unchanged.", "The plots; a line for each image of the batch.")
    SEARCH_ALIASES = ["plot", "loss curve", "trace", "debug guidance"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "samples": (
                    "LATENT",
                    {"tooltip": "The output of the guided sampler. It makes the report wait until sampling is done."},
                ),
                "trace": ("GUIDANCE_TRACE", {"tooltip": "The trace of the guidance node."}),
            }
        }

    def report(self, samples: dict[str, Tensor], trace: GuidanceTrace) -> tuple[dict[str, Tensor], Tensor]:
        return samples, plot(trace.steps)


def plot(steps: list[GuidedStep]) -> Tensor:
    """IMAGE `[1, 360, 1200, 3]`: loss, gradient norm and radius error over the steps, a line a sample."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Guidance Report draws with matplotlib, which is missing. pip install matplotlib") from error

    figure = Figure(figsize=(12, 3.6), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    x = [step.step for step in steps]
    curves = {
        "loss": [step.loss for step in steps],
        "gradient norm": [step.gradient_norm for step in steps],
        "radius error  |‖ε′‖/√n − 1|": [[abs(r - 1) for r in step.radius] for step in steps],
    }
    for axes, (title, values) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if steps:
            axes.plot(x, values, linewidth=1.2, marker=".", markersize=3)
        else:
            axes.text(0.5, 0.5, "no step was guided", transform=axes.transAxes, ha="center")
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(np.float32) / 255
    return torch.from_numpy(pixels)[None]


NODES = {"SphereGuideReport": (GuidanceReport, "Guidance Report")}
