"""How near guided samples come to the exact posterior of a linear inverse problem, where that is known.

    python quickstart.py bench posterior [--quick] [--json FILE]

The model is a Gaussian mixture with its exact denoiser, of 8, 80, 800 and 3072 dimensions: five modes of standard
deviation s = .15. Measured is y = A·x₀ + .05·noise, with A half of the coordinates (inpainting) or the means of four
(averaging). The posterior is a mixture again, whose samples, means, variances and weights are known in closed form.

Each method runs at the strength that is best on other measurements by the sliced Wasserstein distance: the best of
eight, of further ones where that is the first or the last, and then of the two halfway to its neighbours (`tried`).
`nfe` are the model calls that it takes: compare methods at equal ones. Rows:

    wasserstein   sliced Wasserstein-2 distance to exact samples of the posterior, with a 95 % interval of the bootstrap
                  over measurements; `floor` is that of others of these
    mean_error    RMS error of the posterior mean
    std_ratio     standard deviation of the samples over the exact one
    weights       total variation between the weights of the modes and the exact ones
    rmse          to the true x₀
    off_shell     share of the steps whose ‖x_next − μ‖ is none that Gaussian noise has: off by three of its deviations
    radius        mean ‖x_next − μ‖/(c·√n), which is 1 for the unguided sampler
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "demo"), str(ROOT / "tests"), str(ROOT / "benchmarks")]
from bootstrap import import_host, import_pack  # noqa: E402

import_host(cpu=True)
import_pack()

import comfy.samplers  # noqa: E402
import gaussian_mixture  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from processes import processes  # noqa: E402
from result import Result, interval, save  # noqa: E402
from shell import Shell  # noqa: E402
from sphereguide.losses.base import Loss  # noqa: E402
from sphereguide.samplers.diffrgd import Riemannian, riemannian_guided  # noqa: E402
from sphereguide.samplers.dps import Posterior, posterior_guided  # noqa: E402
from sphereguide.samplers.dsg import Guidance, guided  # noqa: E402
from sphereguide.samplers.tfg import Unified, unified_guided  # noqa: E402
from sphereguide.samplers.trace import GuidanceTrace  # noqa: E402
from torch import Tensor  # noqa: E402

SHAPES = {8: (4, 1, 2), 80: (4, 4, 5), 800: (4, 10, 20), 3072: (4, 24, 32)}
TASKS = ("inpainting", "averaging")
STEPS = (100, 20)
MODES, STD, NOISE = 5, 0.15, 0.05
TUNED_ON, MEASURED_ON, EACH = 4, 8, 64
"""Measurements that choose the strength, those that are reported, and samples of each."""
BEYOND = 4
"""Strengths that are tried beyond the ends of the eight."""

Method = Callable[[comfy.samplers.KSAMPLER, Loss, float, GuidanceTrace], comfy.samplers.KSAMPLER]


def _dps(sampler: comfy.samplers.KSAMPLER, loss: Loss, strength: float, trace: GuidanceTrace) -> Any:
    return posterior_guided(sampler, Posterior(loss, step_size=strength), trace)


def _dsg(sampler: comfy.samplers.KSAMPLER, loss: Loss, strength: float, trace: GuidanceTrace) -> Any:
    return guided(sampler, Guidance(loss, guidance_rate=strength), trace)


def _auto(sampler: comfy.samplers.KSAMPLER, loss: Loss, strength: float, trace: GuidanceTrace) -> Any:
    return guided(sampler, Guidance(loss, auto_strength=strength), trace)


def _freedom(sampler: comfy.samplers.KSAMPLER, loss: Loss, strength: float, trace: GuidanceTrace) -> Any:
    return unified_guided(sampler, Unified(loss, preset="FreeDoM", rho=strength), trace)


def _tfg(sampler: comfy.samplers.KSAMPLER, loss: Loss, strength: float, trace: GuidanceTrace) -> Any:
    return unified_guided(sampler, Unified(loss, rho=strength, mu=strength), trace)


def _diffrgd(sampler: comfy.samplers.KSAMPLER, loss: Loss, strength: float, trace: GuidanceTrace) -> Any:
    return riemannian_guided(sampler, Riemannian(loss, step_size=strength), trace)


METHODS: dict[str, tuple[Method, tuple[float, ...]]] = {
    "DPS": (_dps, (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)),
    "DSG": (_dsg, (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.55, 0.7)),
    "DSG auto": (_auto, (0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)),
    "FreeDoM": (_freedom, (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)),
    "TFG": (_tfg, (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)),
    "DiffRGD": (_diffrgd, (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)),
}
"""How to guide, and the strengths to choose from: ζ of DPS, g_r of DSG, its auto_strength, ρ of FreeDoM (without
time travel), ρ = μ of TFG, η of DiffRGD (three descents a step)."""


@dataclass(frozen=True)
class Problem:
    """A·x₀ + noise, and what follows from it. Vectors are `[…, n]`; A·Aᵀ = a·I."""

    task: str
    dim: int

    def forward(self, x: Tensor) -> Tensor:
        """A·x."""
        return x[..., : self.dim // 2] if self.task == "inpainting" else x.unflatten(-1, (-1, 4)).mean(-1)

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ·y."""
        if self.task == "inpainting":
            return torch.cat([y, torch.zeros_like(y)], -1)
        return y.repeat_interleave(4, -1) / 4

    @property
    def gram(self) -> float:
        """a."""
        return 1.0 if self.task == "inpainting" else 0.25

    @property
    def gain(self) -> float:
        """s²/(a·s² + η²)."""
        return STD**2 / (self.gram * STD**2 + NOISE**2)

    def means(self) -> Tensor:
        """Of the modes, `[MODES, n]`: the order of the coordinates means nothing, so that A may take the first half."""
        return torch.randn(MODES, self.dim, generator=torch.Generator().manual_seed(self.dim))

    def truth(self, seed: int, count: int) -> tuple[Tensor, Tensor]:
        """x₀ `[count, n]` and y."""
        generator = torch.Generator().manual_seed(seed)
        mode = torch.randint(MODES, (count,), generator=generator)
        x = self.means()[mode] + STD * torch.randn(count, self.dim, generator=generator)
        y = self.forward(x)
        return x, y + NOISE * torch.randn(y.shape, generator=generator)

    def weights(self, y: Tensor) -> Tensor:
        """p(mode | y), `[count, MODES]`."""
        off = y[:, None] - self.forward(self.means())
        return (-0.5 * off.square().sum(-1) / (self.gram * STD**2 + NOISE**2)).softmax(1)

    def samples(self, y: Tensor, each: int, seed: int) -> Tensor:
        """Of the posterior, `[count, each, n]`: of the mode, moved by what its own measurement lacks."""
        generator = torch.Generator().manual_seed(seed)
        mode = torch.multinomial(self.weights(y), each, replacement=True, generator=generator)
        x = self.means()[mode] + STD * torch.randn(len(y), each, self.dim, generator=generator)
        own = self.forward(x)
        own = own + NOISE * torch.randn(own.shape, generator=generator)
        return x + self.gain * self.adjoint(y[:, None] - own)

    def moments(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `[count, n]`, and variance `[count]`, which is the mean one of the coordinates."""
        means, weights = self.means(), self.weights(y)[..., None]
        of_mode = means + self.gain * self.adjoint(y[:, None] - self.forward(means))
        mean = (weights * of_mode).sum(1)
        within = STD**2 - self.gain * STD**2 * self.gram * len(self.forward(means[0])) / self.dim
        return mean, within + (weights * (of_mode - mean[:, None]).square()).sum(1).mean(-1)


class Measured(Loss):
    """‖y − A(x̂₀)‖₂ of latents."""

    space = "latent"

    def __init__(self, problem: Problem, y: Tensor) -> None:
        super().__init__()
        self.problem = problem
        self.register_buffer("y", y)

    def forward(self, images: Tensor, step: Any = None) -> Tensor:
        return torch.linalg.vector_norm(self.y - self.problem.forward(images.flatten(1)), dim=1)


def mixture(problem: Problem) -> Any:
    """MODEL."""
    model = gaussian_mixture.patcher()
    with torch.inference_mode():
        denoiser = model.model.diffusion_model
        denoiser.means = torch.nn.Parameter(problem.means().unflatten(1, SHAPES[problem.dim]))
        denoiser.log_weights = torch.zeros(MODES)
        denoiser.std = STD
    return model


def drawn(
    problem: Problem, y: Tensor, each: int, steps: int, method: str | None, strength: float, seed: int
) -> tuple[Tensor, Tensor, int]:
    """Samples `[count, each, n]`, ‖x_next − μ‖/(c·√n) of each step `[steps − 1, count·each]`, and the model calls."""
    model, count, shell = mixture(problem), len(y) * each, Shell()
    with torch.inference_mode():
        sampler = comfy.samplers.sampler_object("euler_ancestral")
        if method is not None:
            loss = Measured(problem, y.repeat_interleave(each, 0))
            sampler = METHODS[method][0](sampler, loss, strength, GuidanceTrace())
        sampler = shell.watched(sampler)
        sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "normal", steps)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(gaussian_mixture.conditioning(), gaussian_mixture.conditioning())
        guider.set_cfg(1.0)
        noise = torch.randn(count, *SHAPES[problem.dim], generator=torch.manual_seed(seed))
        found = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=seed)
    return found.flatten(1).unflatten(0, (-1, each)).clone(), shell.radii(), model.model.calls


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 128) -> Tensor:
    """W₂² along random directions of samples `[count, each, n]`, the mean over them: `[count]`."""
    on = torch.randn(a.shape[-1], directions, generator=torch.Generator().manual_seed(0))
    on /= on.norm(dim=0)
    return ((a @ on).sort(1).values - (b @ on).sort(1).values).square().mean((1, 2))


def root(squares: Tensor) -> float:
    return float(squares.mean().sqrt())


def measured(problem: Problem, steps: int, method: str | None, strength: float, tuning: bool) -> dict[str, Any]:
    count, seed = (TUNED_ON, 1) if tuning else (MEASURED_ON, 2)
    truth, y = problem.truth(seed, count)
    found, radii, nfe = drawn(problem, y, EACH, steps, method, strength, seed)
    exact = problem.samples(y, EACH, 10)
    wasserstein = sliced_wasserstein(found, exact)
    if tuning:
        return {"wasserstein": root(wasserstein)}
    mean, variance = problem.moments(y)
    mode = (found[:, :, None] - problem.means()).square().sum(-1).argmin(-1)
    share = torch.nn.functional.one_hot(mode, MODES).float().mean(1)
    ends = interval(1e6 * wasserstein.double().numpy())  # of squares, which it rounds
    own = (found - found.mean(1, keepdim=True)).square().sum(1).mean(-1) / (EACH - 1)
    return {
        "nfe": nfe,
        "wasserstein": root(wasserstein),
        "wasserstein_interval": [round(value**0.5 / 1e3, 4) for value in ends],
        "floor": root(sliced_wasserstein(problem.samples(y, EACH, 11), exact)),
        "mean_error": float((found.mean(1) - mean).square().mean().sqrt()),
        "std_ratio": float((own / variance).mean().sqrt()),
        "weights": float((share - problem.weights(y)).abs().sum(1).mean() / 2),
        "rmse": float((found - truth[:, None]).square().mean().sqrt()),
        "radius": float(radii.mean()),
        "off_shell": float(Shell.off(radii, problem.dim).float().mean()),
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.6), dpi=80, layout="constrained")
    columns = (("wasserstein", "sliced Wasserstein"), ("std_ratio", "std over the exact"), ("off_shell", "off shell"))
    for line, task in enumerate(TASKS):
        for column, (key, title) in enumerate(columns):
            axes = figure.add_subplot(len(TASKS), len(columns), 1 + column + line * len(columns))
            for color, method in enumerate(("unguided", *METHODS)):
                for steps, style in zip(STEPS, ("-", "--"), strict=True):
                    points = [
                        (row["dim"], row[key])
                        for row in rows
                        if (row["task"], row["method"], row["steps"]) == (task, method, steps)
                    ]
                    x, y = np.array(points).reshape(-1, 2).T
                    axes.plot(x, y, style, marker="o", markersize=3, color=f"C{color}")
                axes.plot([], [], color=f"C{color}", label=method)
            if key == "wasserstein":
                floor = sorted({(row["dim"], row["floor"]) for row in rows if row["task"] == task})
                axes.plot(*zip(*floor, strict=True), ":", color="#666666", label="exact samples")
                lines = axes.get_legend_handles_labels()
            axes.set(title=f"{task}: {title}", xscale="log", xlabel="dimensions")
            axes.set_xticks([*SHAPES], [str(dim) for dim in SHAPES])
            if key != "off_shell":
                axes.set_yscale("log")
            if key == "std_ratio":
                axes.axhline(1, color="#666666", linestyle=":")
    figure.legend(*lines, loc="outside lower center", ncols=len(METHODS) + 2, fontsize=8)
    figure.suptitle(f"solid {STEPS[0]} steps, dashed {STEPS[1]}", fontsize=9)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 80 dimensions, 20 steps")
    parser.add_argument("--json", type=Path, help="where to write the rows; a plot goes beside it")
    options = parser.parse_args()
    dims, steps_of = ([8, 80], STEPS[1:]) if options.quick else ([*SHAPES], STEPS)
    settings = {"sampler": "euler_ancestral", "scheduler": "normal", "modes": MODES, "std": STD, "noise": NOISE}
    settings |= {"measurements": MEASURED_ON, "samples": EACH}
    result = Result("posterior", settings, options.json, options.quick)
    print(f"{'':33}calls strength  wasserst.  floor   mean    std  weights  radius  off shell")
    with processes(options.quick) as pool:
        for task in TASKS:
            for dim in dims:
                for steps in steps_of:
                    problem = Problem(task, dim)
                    for method in (None, *METHODS):
                        row = one(pool, result, problem, steps, method)
                        print(
                            f"{task:11}{dim:6}{steps:5} {row['method']:10}{row['nfe']:5}{row['strength'] or 0:9g}"
                            + "".join(f"{row[key]:9.3f}" for key in ("wasserstein", "floor", "mean_error", "std_ratio"))
                            + "".join(f"{row[key]:9.3f}" for key in ("weights", "radius", "off_shell")),
                            flush=True,
                        )
    result.finish(draw)


def one(pool: Any, result: Result, problem: Problem, steps: int, method: str | None) -> dict[str, Any]:
    cell = {**asdict(problem), "method": method or "unguided", "steps": steps}
    row = result.find(cell)
    if row is None:
        strength = None
        if method is not None:
            tried = chosen(pool, problem, steps, method)
            strength = min(tried, key=tried.__getitem__)
        found = pool.submit(measured, problem, steps, method, strength or 0.0, False).result()
        found = {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}
        row = {**cell, "strength": strength, **found, "n": MEASURED_ON * EACH}
        if method is not None:
            row["tried"] = {f"{value:.4g}": round(distance, 4) for value, distance in sorted(tried.items())}
        result.add(row)
    return row


def chosen(pool: Any, problem: Problem, steps: int, method: str) -> dict[float, float]:
    """The sliced Wasserstein distance of each strength that was tried."""
    most = 1.0 if method == "DSG" else np.inf
    tried: dict[float, float] = {}

    def add(values: Iterable[float]) -> float:
        jobs = {value: pool.submit(measured, problem, steps, method, value, True) for value in values if value <= most}
        tried.update({value: np.nan_to_num(job.result()["wasserstein"], nan=np.inf) for value, job in jobs.items()})
        return min(tried, key=tried.__getitem__)

    best = add(METHODS[method][1])
    for _ in range(BEYOND):
        values = sorted(tried)
        if best == values[0]:
            best = add([best**2 / values[1]])
        elif best == values[-1]:
            best = add([min(best**2 / values[-2], most)])
    values = sorted(tried)
    at = values.index(best)
    add([(best * other) ** 0.5 for other in (*values[max(0, at - 1) : at], *values[at + 1 : at + 2])])
    return tried


if __name__ == "__main__":
    main()
