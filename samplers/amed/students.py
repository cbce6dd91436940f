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
    "ORDERS",
    "STUDENTS",
    "AdamsBashforth",
    "Choice",
    "DPMSolverPP",
    "Student",
    "classical",
    "direction",
    "heun",
]

ORDERS = {"amed": 1, "euler": 1, "dpm2": 1, "ipndm": 4, "dpmpp": 3}
"""The students, and the highest order of their solver."""
STUDENTS = tuple(ORDERS)

Ask = Callable[[Tensor, Tensor], Tensor]
"""The model: x `[B, …]`, sigma `[B]` to denoised `[B, …]`."""


@dataclass(frozen=True)
class Choice:
    """What a predictor chooses for an interval, each `[B]`."""

    r: Tensor
    scale_dir: Tensor
    scale_time: Tensor

    def middle(self, t: Tensor, t_next: Tensor) -> Tensor:
        """t_mid `[B]`."""
        return t_next**self.r * t ** (1 - self.r)


def classical(like: Tensor) -> Choice:
    """The choice that makes a student its classical solver, for `[B, …]`."""
    one = like.new_ones(len(like), dtype=torch.float32)
    return Choice(one / 2, one, one)


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

    def advance(self, x: Tensor, t: Tensor, t_next: Tensor, denoised: Tensor) -> Tensor:
        directions = [direction(x, t, denoised), *self.history][: self.order]
        self.history = directions
        weights = self.WEIGHTS[len(directions) - 1]
        return x + per_sample(t_next - t, x) * sum(w * d for w, d in zip(weights, directions, strict=True))


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
        if name in ("euler", "ipndm"):
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

        mask  0 where an image is kept, whose noise falls as it is, so that no scale may change its length
        """
        t_mid = choice.middle(t, t_next)
        d = direction(x, t, denoised)
        if self.solver is None:
            x_mid = x + per_sample(t_mid - t, x) * d
        else:
            x_mid = self.solver.advance(x, t, t_mid, denoised)
        denoised_mid = ask(x_mid, choice.scale_time * t_mid)
        d_mid = direction(x_mid, t_mid, denoised_mid)
        scale = per_sample(choice.scale_dir, x)
        if mask is not None:
            scale = 1 + (scale - 1) * mask
        if self.solver is not None:
            return x_mid + scale * (self.solver.advance(x_mid, t_mid, t_next, denoised_mid) - x_mid), d_mid
        if self.name == "dpm2":
            share = per_sample(1 / (2 * choice.r), x)
            return x + scale * per_sample(t_next - t, x) * (share * d_mid + (1 - share) * d), d_mid
        return x + scale * per_sample(t_next - t, x) * d_mid, d_mid
