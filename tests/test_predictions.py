"""A guided run is the same however the model predicts: of x = α·x₀ + σ·ε only the SNR counts.

The papers' loops are held against models with α = 1 (test_reference.py, test_dps.py and others). This carries them over
to flow models, α = 1 − σ. What the methods move is the state of unit variance, x/√(α² + σ²), the same for all.
auto_strength is not among them: its curve follows the percent of the model's own schedule (test_dsg.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import comfy.samplers
import gaussian_mixture
import pytest
import torch
from gaussian_mixture import SHAPE
from sphereguide.samplers.diffrgd import Riemannian, riemannian_guided
from sphereguide.samplers.dps import Posterior, posterior_guided
from sphereguide.samplers.dsg import Guidance, guided
from sphereguide.samplers.tfg import PRESETS, Unified, unified_guided
from sphereguide.samplers.trace import GuidanceTrace
from test_dsg import Distance
from torch import Tensor

SIGMAS = [0.93, 0.8, 0.55, 0.3, 0.1, 0.0]
"""Of flow models; σ/α with α = 1 are 13 to 0.1."""
NOISE = [torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in range(len(SIGMAS))]

METHODS: dict[str, tuple[Callable[..., Any], type, dict[str, Any]]] = {
    "DSG": (guided, Guidance, {"guidance_rate": 0.3}),
    "DSG, recurrence": (guided, Guidance, {"guidance_rate": 0.3, "recurrence": 2}),
    "DSG, fast": (guided, Guidance, {"guidance_rate": 0.3, "gradient": "fast"}),
    "DPS": (posterior_guided, Posterior, {"step_size": 0.3}),
    "DPS, fast": (posterior_guided, Posterior, {"step_size": 0.3, "gradient": "fast"}),
    "DiffRGD": (riemannian_guided, Riemannian, {"step_size": 0.5}),
    "DiffRGD, fast": (riemannian_guided, Riemannian, {"step_size": 0.5, "gradient": "fast"}),
    "TFG, fast": (unified_guided, Unified, {"rho": 0.3, "mu": 0.2, "n_iter": 2, "gradient": "fast"}),
    **{
        f"TFG, {preset}": (
            unified_guided,
            Unified,
            {"preset": preset, "rho": 0.3, "mu": 0.2, "sigma_bar": 0.2, "samples": 2, "n_iter": 2, "n_recur": 2},
        )
        for preset in PRESETS
    },
}


def run(steer: Callable[..., Any], objective: type, settings: dict[str, Any], flow: bool) -> list[Tensor]:
    """States of unit variance, by DDIM with η = 1."""
    states: list[Tensor] = []

    def ddim(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
        def level(sigma):
            return (1 - sigma, sigma) if flow else (torch.ones(()), sigma)

        for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
            x0 = model(x, s * x.new_ones(len(x)), **extra_args)
            (alpha, sigma), (alpha_next, sigma_next) = level(s), level(t)
            callback({"x": x, "i": i, "sigma": s, "sigma_hat": s, "denoised": x0})
            if len(x) == 2:  # no rehearsal
                states.append(x.clone() / (alpha**2 + sigma**2).sqrt())
            share = (sigma_next * alpha / (alpha_next * sigma)) ** 2
            x = alpha_next * (x0 + (x / alpha - x0) * share)
            if t > 0:
                x = x + sigma_next * (1 - share).sqrt() * noise_sampler(s, t)
        return x

    left = iter(NOISE)
    sigmas = torch.tensor(SIGMAS)
    if not flow:
        sigmas = sigmas / (1 - sigmas)
    with torch.inference_mode():
        sampler = comfy.samplers.KSAMPLER(ddim, {"noise_sampler": lambda *_: next(left).clone()})
        sampler = steer(sampler, objective(Distance(), **settings), GuidanceTrace())
        guider = comfy.samplers.CFGGuider(gaussian_mixture.patcher("FLOW" if flow else "EPS"))
        guider.set_conds(gaussian_mixture.conditioning(0.3), gaussian_mixture.conditioning(-0.2))
        guider.set_cfg(1.0)
        start = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(77))
        last = guider.sample(start, torch.zeros_like(start), sampler, sigmas, disable_pbar=True, seed=3)
    return [*states, last]


@pytest.mark.parametrize("method", METHODS)
def test_flow_models_are_guided_like_the_papers(method: str) -> None:
    steer, objective, settings = METHODS[method]
    flow, plain = (run(steer, objective, settings, flow) for flow in (True, False))
    unguided = run(steer, objective, settings | {"start_percent": 0.999, "end_percent": 1.0}, False)
    torch.testing.assert_close(flow, plain, rtol=2e-4, atol=2e-4)
    assert len(flow) == len(SIGMAS)
    assert (plain[1] - unguided[1]).abs().max() > 1e-3 and (plain[-1] - unguided[-1]).abs().max() > 0.01
