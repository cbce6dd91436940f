"""What guidance did, as a picture."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from torch import Tensor

from ..samplers.trace import GuidanceTrace, GuidedStep
from .figure import drawn, new_figure, written


class GuidanceReport:
    DESCRIPTION = (
        "Draws what guidance did as the noise fell: the loss, the size of its gradient, and how far the guided noise "
        "is off the length that noise should have; and says it in words. Put it behind the sampler: the latent passes "
        "through. A run that was cancelled is reported up to there, by the trace of its guidance node."
    )
    CATEGORY = "SphereGuide/guidance"
    FUNCTION = "report"
    RETURN_TYPES = ("LATENT", "IMAGE", "STRING")
    RETURN_NAMES = ("samples", "report", "summary")
    OUTPUT_TOOLTIPS = (
        "The latent, unchanged.",
        "The plots; a line for each image of the batch.",
        "The summary that the node shows.",
    )
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

    def report(self, samples: dict[str, Tensor], trace: GuidanceTrace) -> dict[str, Any]:
        summary = trace.summary()
        try:
            figure = plot(trace.steps)
        except ImportError as error:  # what was sampled for minutes goes on all the same
            summary = f"{summary}\n{error}"
            figure = written(str(error), 1200, 360)
        return {"ui": {"text": [summary]}, "result": (samples, figure, summary)}


def plot(steps: list[GuidedStep]) -> Tensor:
    """IMAGE `[1, 360, 1200, 3]`: loss, gradient norm and radius error over sigma, and guidance_rate where it varies.

    A line a sample; crosses: skipped.
    """
    figure = new_figure("Guidance Report", 12, 3.6)
    sigma = np.array([step.sigma for step in steps])
    skipped = np.array([step.skipped for step in steps])
    curves = {
        "loss": [step.loss for step in steps],
        "gradient norm": [step.gradient_norm for step in steps],
        "radius error  |‖ε′‖/√n − 1|": [[abs(r - 1) for r in step.radius] for step in steps],
    }
    rates = [step.rate for step in steps]
    if len(set(itertools.chain(*rates))) > 1 and np.isfinite(rates).all():
        curves["guidance_rate"] = rates
    for axes, (title, values) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        axes.set(title=title, xlabel="sigma")
        axes.grid(alpha=0.3)
        if not steps:
            axes.text(0.5, 0.5, "no step was guided", transform=axes.transAxes, ha="center")
            continue
        axes.plot(sigma, values, linewidth=1.2, marker=".", markersize=3)
        finite = np.nan_to_num(np.array(values, dtype=float), posinf=0, neginf=0)
        at = np.nonzero(skipped)
        axes.plot(sigma[at[0]], finite[at], "x", color="crimson")
        axes.set_xscale("log")
        axes.invert_xaxis()  # as sampling goes, from noise to image
    return drawn(figure)


NODES = {"SphereGuideReport": (GuidanceReport, "Guidance Report")}
