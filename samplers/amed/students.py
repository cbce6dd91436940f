"""What AMED's students do between two time points, and the solvers that they are built on.

A predictor chooses r, scale_dir and scale_time, for each sample:

    t_mid = t_next^r · t^(1−r)
    d     = (x − D(x, t))/t
    d_mid = (x_mid − D(x_mid, scale_time·t_mid))/t_mid

    amed    x_mid = x + (t_mid − t)·d,    x_next = x + scale_dir·(t_next − t)·d_mid
    dpm2    x_mid = x + (t_mid − t)·d,    x_next = x + scale_dir·(t_next − t)·(d_mid/2r + (1 − 1/2r)·d)
    euler, ipndm, dpmpp    a step of the solver to t_mid, and one from there to t_next, of which scale_dir is taken

(Zhou et al., arXiv 2312.00094, section 3.4 and algorithm 2; AMED-Solver is `amed`, the others are AMED-Plugin.) With
r = ½ and scales of 1 amed and dpm2 are DPM-Solver-2, and the others their solvers on the schedule with the geometric
means between its points. ComfyUI's x is α·x₀ + σ·ε with t = σ; for flow models d is their velocity, so that
the same lines hold.

Those of several parallel directions have K of each number, and K weights λ whose sum is 1:

    τ_k = t_next^r_k · t^(1−r_k)
    d_k = (x_k − D(x_k, scale_time_k·τ_k))/τ_k

    epd        x_k = x + (τ_k − t)·d,    x_next = x + (t_next − t)·Σ λ_k·scale_dir_k·d_k
    epd_ipndm  x_k a step of iPNDM, which remembers the directions d at the beginnings of the intervals

(EPD-Solver, Zhu et al., ICCV 2025, arXiv 2507.14797, and its plugin. The scales are there 1 + o_k and 1 + δ_k/τ_k.) One
direction with λ = 1 is `amed`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..kernel import per_sample

__all__ = [
    "MOST_PARALLEL",
    "ORDERS",
    "PARALLEL",
    "STUDENTS",
    "AdamsBashforth",
    "Choice",
    "DPMSolverPP",
    "Student",
    "classical",
    "direction",
    "heun",
]

ORDERS = {"amed": 1, "euler": 1, "dpm2": 1, "ipndm": 4, "dpmpp": 3, "epd": 1, "epd_ipndm": 4}
"""The students, and the highest order of their solver."""
STUDENTS = tuple(ORDERS)
PARALLEL = ("epd", "epd_ipndm")
"""Those of several parallel directions."""
MOST_PARALLEL = 4

Ask = Callable[[Tensor, Tensor], Tensor]
"""The model: x `[B, …]`, sigma `[B]` to denoised `[B, …]`."""


@dataclass(frozen=True)
class Choice:
    """What a predictor chooses for an interval, each `[B]`; for K parallel directions `[B, K]`, with their weights."""

    r: Tensor
    scale_dir: Tensor
    scale_time: Tensor
    weight: Tensor | None = None

    def each(self) -> list[Choice]:
        """That of each direction, of `[B]`."""
        columns = (value.unbind(1) for value in (self.r, self.scale_dir, self.scale_time))
        return [Choice(*of_one) for of_one in zip(*columns, strict=True)]

    def middle(self, t: Tensor, t_next: Tensor) -> Tensor:
        """t_mid `[B]`: of several the weighted mean Σ λ_k·τ_k, where a direction that is linear in t is their mean."""
        if self.weight is not None:
            times = torch.stack([one.middle(t, t_next) for one in self.each()], 1)
            return (self.weight * times).sum(1)
        return t_next**self.r * t ** (1 - self.r)


def classical(like: Tensor, parallel: int = 0) -> Choice:
    """The choice that makes a student its classical solver, for `[B, …]`.

    parallel   the directions of epd: alike in weight, and evenly spread in log t
    """
    one = like.new_ones(len(like), dtype=torch.float32)
    if not parallel:
        return Choice(one / 2, one, one)
    ones = one[:, None].expand(-1, parallel)
    return Choice(ones.cumsum(1) / (parallel + 1), ones, ones, ones / parallel)


def direction(x: Tensor, t: Tensor, denoised: Tensor) -> Tensor:
    """d = dx/dt."""
    return (x - denoised) / per_sample(t, x)


class Solver(Protocol):
    history: list[Any]

    def advance(self, x: Tensor, t: Tensor, t_next: Tensor, denoised: Tensor) -> Tensor:
        """x at `t_next`; `denoised` is that of x at `t`."""


class AdamsBashforth:
    """iPNDM: the directions of the last steps, with the weights of uniform steps. Order 1 is Euler's method."""

    WEIGHTS = (
        (1.0,),
        (3 / 2, -1 / 2),
        (23 / 12, -16 / 12, 5 / 12),
        (55 / 24, -59 / 24, 37 / 24, -9 / 24),
    )

    def __init__(self, order: int) -> None:
        self.order = order
        self.history: list[Tensor] = []

    def slope(self, d: Tensor) -> Tensor:
        """The direction that is followed where the model's is d."""
        self.history = [d, *self.history][: self.order]
        weights = self.WEIGHTS[len(self.history) - 1]
        return sum(w * d for w, d in zip(weights, self.history, strict=True))

    def advance(self, x: Tensor, t: Tensor, t_next: Tensor, denoised: Tensor) -> Tensor:
        return x + per_sample(t_next - t, x) * self.slope(direction(x, t, denoised))


class DPMSolverPP:
    """DPM-Solver++ multistep (Lu et al., arXiv 2211.01095), orders 1 to 3; the last of `steps`, if given, lower it."""

    def __init__(self, order: int, steps: float = math.inf) -> None:
        self.order, self.left = order, steps
        self.history: list[tuple[Tensor, Tensor]] = []  # log sigma, denoised: the latest first

    def advance(self, x: Tensor, t: Tensor, t_next: Tensor, denoised: Tensor) -> Tensor:
        past = self.history[: int(min(self.order, self.left)) - 1]
        self.left -= 1
        self.history = [(t.log(), denoised), *self.history][:2]
        h = (t / t_next).log()
        phi_1 = torch.expm1(-h)
        x_next = per_sample(t_next / t, x) * x - per_sample(phi_1, x) * denoised
        if not past:
            return x_next
        before = [t.log(), *(log_sigma for log_sigma, _ in past)]
        values = [denoised, *(value for _, value in past)]
        r = [(earlier - later) / h for later, earlier in itertools.pairwise(before)]
        slopes = [(a - b) / per_sample(ratio, x) for (a, b), ratio in zip(itertools.pairwise(values), r, strict=True)]
        if len(past) == 1:
            return x_next - per_sample(phi_1 / 2, x) * slopes[0]
        # ∫ e^(h(s − 1))·(D₀ + slope·s + bend·s²)·h ds from 0 to 1, with s = (λ − λ₀)/h and λ = −log σ, is exact.
        # k-diffusion's dpmpp_3m_sde takes half of the bend, and is of second order.
        bend = (slopes[0] - slopes[1]) / per_sample(r[0] + r[1], x)
        slope = slopes[0] + per_sample(r[0], x) * bend
        phi_2 = 1 + phi_1 / h
        return x_next + per_sample(phi_2, x) * slope + per_sample(1 - 2 * phi_2 / h, x) * bend


def heun(x: Tensor, t: Tensor, t_next: Tensor, ask: Ask) -> Tensor:
    """A step of Heun's method: two model calls."""
    d = direction(x, t, ask(x, t))
    there = x + per_sample(t_next - t, x) * d
    return x + per_sample((t_next - t) / 2, x) * (d + direction(there, t_next, ask(there, t_next)))


class Student:
    """A student in a run of `intervals`, the last of which ends it or, as in a first part of a schedule, does not.

    Those with a solver of several steps remember the directions of the run.
    """

    def __init__(self, name: str, max_order: int, intervals: int, ends: bool = True) -> None:
        self.name = name
        self.solver: Solver | None = None
        if name in ("euler", "ipndm", "epd_ipndm"):
            self.solver = AdamsBashforth(min(max_order, ORDERS[name]))
        elif name == "dpmpp":
            self.solver = DPMSolverPP(min(max_order, ORDERS[name]), 2 * intervals if ends else math.inf)

    def detach(self) -> None:
        """Lets go of the graphs behind what is remembered."""
        if self.solver is not None:
            self.solver.history = tree_map(Tensor.detach, self.solver.history)

    def advance(
        self,
        x: Tensor,
        t: Tensor,
        t_next: Tensor,
        choice: Choice,
        denoised: Tensor,
        ask: Ask,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x at `t_next` and d_mid, for x `[B, …]` at `t` `[B]`, where the model said `denoised`. One model call.

        Of parallel directions d_mid is the weighted mean, and there is a call for each, one after the other: masks,
        the frames of a video and what other packs keep for each sample fit a batch of B, and not one of K·B.

        mask  0 where an image is kept, whose noise falls as it is, so that no scale may change its length
        """
        d = direction(x, t, denoised)
        if choice.weight is not None:
            slope = d if self.solver is None else self.solver.slope(d)
            d_mid = scaled = torch.zeros_like(x)
            for one, weight in zip(choice.each(), choice.weight.unbind(1), strict=True):
                tau = one.middle(t, t_next)
                there = x + per_sample(tau - t, x) * slope
                part = per_sample(weight, x) * direction(there, tau, ask(there, one.scale_time * tau))
                d_mid, scaled = d_mid + part, scaled + _scale(one, x, mask) * part
            return x + per_sample(t_next - t, x) * scaled, d_mid
        t_mid = choice.middle(t, t_next)
        if self.solver is None:
            x_mid = x + per_sample(t_mid - t, x) * d
        else:
            x_mid = self.solver.advance(x, t, t_mid, denoised)
        denoised_mid = ask(x_mid, choice.scale_time * t_mid)
        d_mid = direction(x_mid, t_mid, denoised_mid)
        scale = _scale(choice, x, mask)
        if self.solver is not None:
            return x_mid + scale * (self.solver.advance(x_mid, t_mid, t_next, denoised_mid) - x_mid), d_mid
        if self.name == "dpm2":
            share = per_sample(1 / (2 * choice.r), x)
            return x + scale * per_sample(t_next - t, x) * (share * d_mid + (1 - share) * d), d_mid
        return x + scale * per_sample(t_next - t, x) * d_mid, d_mid


def _scale(choice: Choice, x: Tensor, mask: Tensor | None) -> Tensor:
    """scale_dir, for x `[B, …]`, and 1 where the mask keeps an image."""
    scale = per_sample(choice.scale_dir, x)
    return scale if mask is None else 1 + (scale - 1) * mask
