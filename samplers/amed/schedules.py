"""The time points of AMED's schedules, between the sigmas of a loaded model.

    polynomial     σ^(1/ρ) uniform                                                    EDM, ρ = 7
    logsnr         log(σ/α) uniform
    time_uniform   t^(1/ρ) uniform from 1 to 0.001, σ(t) = √(exp(½β_d·t² + β_min·t) − 1)      VP, ρ = 1; flow: σ = t
    discrete       the model's own timestep^(1/ρ) uniform                             ρ = 1

A point count that is a multiple of another's has that other's points among its own: so a teacher of more steps passes
through those of its student.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ..kernel import levels

__all__ = ["RHO", "SCHEDULES", "time_points"]

RHO = {"polynomial": 7.0, "logsnr": 1.0, "time_uniform": 1.0, "discrete": 1.0}
"""The ρ of each schedule that the authors use; logsnr has none."""
SCHEDULES = tuple(RHO)
SHORTEST = 1e-3
"""The last t of time_uniform."""


def time_points(
    sampling: Any, schedule: str, steps: int, rho: float, sigma_min: float, sigma_max: float
) -> list[float]:
    """`steps` + 1 sigmas from `sigma_max` down to `sigma_min`, for a `model_sampling` of ComfyUI.

    Raises ValueError for a schedule that there is not, for no step, and where the points don't fall.
    """
    if schedule not in RHO:
        raise ValueError(f"There is no schedule '{schedule}'. There are: {', '.join(SCHEDULES)}.")
    if steps < 1 or not 0 < sigma_min < sigma_max or rho <= 0:
        raise ValueError(
            f"There is no schedule from sigma_max {sigma_max:g} to sigma_min {sigma_min:g} of the model with steps "
            f"{steps} and rho {rho:g}. Take at least one step, a rho above 0, and a model whose sigma_min is above 0 "
            "and below its sigma_max."
        )
    way = np.linspace(0, 1, steps + 1)

    def powers(first: float, last: float) -> np.ndarray:
        return (first ** (1 / rho) + way * (last ** (1 / rho) - first ** (1 / rho))) ** rho

    flow = levels(sampling, torch.tensor(sigma_max))[0] < 0.5
    if schedule == "polynomial" or (schedule == "time_uniform" and flow):
        points = powers(sigma_max, sigma_min)
    elif schedule == "logsnr":
        # σ/α; a flow model begins with noise alone, α = 0: from where α is sigma_min, then.
        ends = (min(sigma_max, 1 - sigma_min), sigma_min) if flow else (sigma_max, sigma_min)
        first, last = (math.log(sigma / (1 - sigma) if flow else sigma) for sigma in ends)
        ratio = np.exp(first + way * (last - first))
        points = ratio / (1 + ratio) if flow else ratio
    elif schedule == "time_uniform":
        # β_d and β_min from σ(1) = sigma_max and σ(SHORTEST) = sigma_min
        high, low = math.log1p(sigma_max**2), math.log1p(sigma_min**2)
        beta_d = 2 * (low / SHORTEST - high) / (SHORTEST - 1)
        beta_min = high - beta_d / 2
        t = powers(1.0, SHORTEST)
        points = np.sqrt(np.expm1(beta_d / 2 * t**2 + beta_min * t))
    else:
        first, last = (float(sampling.timestep(torch.tensor([sigma]))) for sigma in (sigma_max, sigma_min))
        # From 0, for the power: EDM's timesteps are below.
        points = np.array([float(sampling.sigma(torch.tensor(t + last))) for t in powers(first - last, 0.0)])
    points[0], points[-1] = sigma_max, sigma_min
    if not (np.diff(points) < 0).all():
        raise ValueError(
            f"The schedule {schedule} with {steps} steps gives {', '.join(f'{sigma:.4g}' for sigma in points)}, which "
            "does not fall from point to point. Take fewer steps, a rho of 0 (the schedule's own), or another schedule."
        )
    return [float(sigma) for sigma in points]
