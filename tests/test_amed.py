"""AMED: its students, predictor, schedules, sampler and training, on models whose answers are known."""

from __future__ import annotations

import logging
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.samplers
import gaussian_mixture
import numpy as np
import pytest
import tiny_models
import torch
from bootstrap import ROOT
from safetensors.torch import save_file
from sphereguide import host
from sphereguide.demo import toy_portraits, train_amed
from sphereguide.losses.measurement import low_pass
from sphereguide.nodes import amed as nodes
from sphereguide.samplers.amed import __main__ as from_shell
from sphereguide.samplers.amed import predictor as files
from sphereguide.samplers.amed import training
from sphereguide.samplers.amed.bottleneck import watched
from sphereguide.samplers.amed.predictor import AMEDPredictor, AMEDSettings, PredictorNetwork, fingerprint
from sphereguide.samplers.amed.sampling import amed_sampler, base_sigmas, expanded_sigmas, intervals, mismatches
from sphereguide.samplers.amed.schedules import SCHEDULES, time_points
from sphereguide.samplers.amed.students import (
    ORDERS,
    PARALLEL,
    STUDENTS,
    AdamsBashforth,
    Choice,
    DPMSolverPP,
    Student,
)
from sphereguide.samplers.amed.training import History, Plan, Progress, _Training, settings_for, train
from sphereguide.samplers.epsilon import EpsilonScaling, linear, uniform, with_post_cfg
from sphereguide.samplers.ilvr import referenced
from sphereguide.samplers.kernel import noise_of
from test_guidance_node import guide
from torch import Tensor, nn

try:
    from comfy.model_management import InterruptProcessingException as Interrupted
except ImportError:  # PyPI's package of 2024
    from comfy.interruption import InterruptProcessingException as Interrupted

SHAPE = gaussian_mixture.SHAPE
KINDS = ("EPS", "V_PREDICTION", "FLOW")
OF_ONE = [student for student in STUDENTS if student not in PARALLEL]  # the others: test_epd.py


@pytest.fixture(scope="module")
def model() -> Any:
    return gaussian_mixture.patcher()


def settings(model: Any, student: str = "ipndm", steps: int = 3, **changed: Any) -> AMEDSettings:
    given: dict[str, Any] = {"schedule": "polynomial", "rho": 0.0, "max_order": 4, "cfg": 1.0} | changed
    teacher, points = given.pop("teacher", "heun"), given.pop("points", 3)
    return settings_for(model, teacher, points, student=student, steps=steps, **given)


class Classical(nn.Module):
    """r = ½ and scales of 1, whatever it sees."""

    def __init__(self, r: float = 0.5, scale_dir: float = 1.0, scale_time: float = 1.0) -> None:
        super().__init__()
        self.time = nn.Linear(1, 1)  # where it lies is where a predictor's weights lie
        self.values = (r, scale_dir, scale_time)
        self.seen: list[Tensor] = []

    def forward(self, features: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, ...]:
        self.seen.append(features)
        return tuple(torch.full_like(t, value) for value in self.values)


def fixed(settings: AMEDSettings, *values: float) -> AMEDPredictor:
    with torch.inference_mode(False):
        return AMEDPredictor(Classical(*values), settings)  # type: ignore[arg-type]


def sample(
    model: Any,
    sampler: comfy.samplers.KSAMPLER,
    sigmas: Tensor,
    batch: int = 3,
    cfg: float = 1.0,
    conds: Callable[[], tuple[Any, Any]] | None = None,
    shape: tuple[int, ...] = SHAPE,
    **run: Any,
) -> Tensor:
    """One run as SamplerCustomAdvanced makes it."""
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(model)
        mixture = (gaussian_mixture.conditioning(0.3), gaussian_mixture.conditioning(-0.2))
        guider.set_conds(*(conds() if conds else mixture))
        guider.set_cfg(cfg)
        noise = run.pop("noise", noise_of((batch, *shape), 5))
        latent = run.pop("latent", torch.zeros(batch, *shape))
        return guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=1, **run)


def stock(name: str, **options: Any) -> comfy.samplers.KSAMPLER:
    return comfy.samplers.ksampler(name, options)


# -- the predictor -----------------------------------------------------------------------------------------------------


def test_the_predictor_has_as_many_parameters_as_the_published_one() -> None:
    assert sum(weight.numel() for weight in PredictorNetwork(0.01, 0.2).parameters()) == 8971


def test_its_choices_stay_within_their_ranges_and_are_made_for_each_sample() -> None:
    network = PredictorNetwork(0.05, 0.2)
    features = 50 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.03, 80, 64)
    r, scale_dir, scale_time = network(features, t, t / 2)
    assert r.shape == scale_dir.shape == scale_time.shape == (64,)
    assert ((r > 0) & (r < 1)).all() and len(set(r.tolist())) == 64
    assert ((scale_dir - 1).abs() <= 0.05).all() and ((scale_time - 1).abs() <= 0.2).all()
    assert np.ptp(scale_time.tolist()) > 0.01
    alone = network(features[7:8], t[7:8], t[7:8] / 2)
    for one, all_of in zip(alone, (r, scale_dir, scale_time), strict=True):
        torch.testing.assert_close(one[0], all_of[7])


def test_scales_that_may_not_move_are_1() -> None:
    _, scale_dir, scale_time = PredictorNetwork(0.0, 0.0)(torch.randn(4, 64), torch.ones(4), torch.ones(4) / 2)
    assert (scale_dir == 1).all() and (scale_time == 1).all()


# -- the students ------------------------------------------------------------------------------------------------------


def geometric(points: tuple[float, ...], last: float) -> Tensor:
    """The points with the geometric means between them, the last one in place of the last."""
    pairs = [(a, math.sqrt(a * b)) for a, b in pairwise(points)]
    return torch.tensor([sigma for pair in pairs for sigma in pair] + [last])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("student", ["amed", "dpm2"])
def test_with_r_one_half_amed_and_dpm2_are_dpm_solver_2(kind: str, cfg: float, student: str) -> None:
    model = gaussian_mixture.patcher(kind)
    chosen = settings(model, student)
    sigmas = torch.tensor(chosen.sigmas)
    own = sample(model, amed_sampler(fixed(chosen)), sigmas, cfg=cfg)
    torch.testing.assert_close(own, sample(model, stock("dpm_2"), sigmas, cfg=cfg), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("student", "name"), [("euler", "euler"), ("ipndm", "ipndm"), ("dpmpp", "dpmpp_2m")])
def test_with_r_one_half_a_plugin_is_its_solver_on_the_schedule_with_means(kind: str, student: str, name: str) -> None:
    if name not in comfy.samplers.KSampler.SAMPLERS:
        pytest.skip(f"this host has no {name}")
    model = gaussian_mixture.patcher(kind)
    chosen = settings(model, student, max_order=2 if student == "dpmpp" else 4)
    own = sample(model, amed_sampler(fixed(chosen)), torch.tensor(chosen.sigmas))
    other = sample(model, stock(name), geometric(chosen.sigmas, chosen.sigmas[-1]))
    if student == "dpmpp":  # the host's last step is of first order only where it leads to 0
        own = sample(model, amed_sampler(fixed(chosen)), base_sigmas(fixed(chosen)))
        other = sample(model, stock(name), geometric(chosen.sigmas, 0.0))
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_bashforth_is_exact_for_polynomials_of_its_order(order: int) -> None:
    """dx/dt = t^(order−1) on uniform steps, begun with exact history."""
    times = torch.linspace(3.0, 1.0, 9, dtype=torch.float64)
    solver = AdamsBashforth(order)
    x = times[:1] ** order / order
    for i, (t, t_next) in enumerate(pairwise(times)):
        d = t ** (order - 1)
        moved = solver.advance(x, t[None], t_next[None], x - t * d)
        x = moved if i >= order - 1 else t_next[None] ** order / order
    torch.testing.assert_close(x, times[-1:] ** order / order)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_pp_converges_with_its_order(order: int) -> None:
    """On D(x, σ) of a Gaussian, whose ODE has a closed form: x ∝ √(s² + σ²). Halving the steps divides by 2^order."""

    def error(steps: int) -> float:
        times = torch.logspace(1, -1, steps + 1, dtype=torch.float64)
        solver = DPMSolverPP(order, steps + 10)  # never of lower order
        x = (0.25 + times[:1] ** 2).sqrt()
        for t, t_next in pairwise(times):
            x = solver.advance(x, t[None], t_next[None], x * 0.25 / (0.25 + t**2))
        return abs(float(x - (0.25 + times[-1] ** 2).sqrt()))

    assert math.log2(error(64) / error(128)) > order - 0.4


def test_third_order_is_exact_for_a_denoiser_that_is_quadratic_in_log_sigma() -> None:
    """x/σ = x₀/σ₀ + ∫ e^λ·D(λ) dλ with D = 1 + λ + λ², begun with exact history."""
    lams = torch.tensor([-2.0, -1.2, -0.7, 0.1, 0.4], dtype=torch.float64)  # −log σ, uneven
    polynomial = [1.0, 1.0, 1.0]

    def exact(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        def antiderivative(lam: Tensor) -> Tensor:  # of e^λ(1 + λ + λ²)
            return lam.exp() * (lam**2 - lam + 2)

        return (x * a.exp() + antiderivative(b) - antiderivative(a)) / b.exp()

    solver, x = DPMSolverPP(3, 99), torch.ones(1, dtype=torch.float64)
    for i, (a, b) in enumerate(pairwise(lams)):
        denoised = sum(c * a**k for k, c in enumerate(polynomial)).reshape(1)
        truth = exact(a, b, x)
        moved = solver.advance(x, (-a).exp()[None], (-b).exp()[None], denoised)
        if i >= 2:
            torch.testing.assert_close(moved, truth)
        x = truth


def test_the_formulas_by_hand() -> None:
    """One interval from 4 to 1 with r = ¼, scale_dir 1.1, scale_time 0.9: D(x, t) = x/2 + t."""
    asked = []

    def ask(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        return x / 2 + t

    one = torch.ones(1, dtype=torch.float64)
    x, t, t_next = 6 * one, 4 * one, 1 * one
    choice = Choice(one / 4, 1.1 * one, 0.9 * one)
    t_mid = 4**0.75
    d = (6 - 7) / 4
    x_mid = 6 + (t_mid - 4) * d
    d_mid = (x_mid - (x_mid / 2 + 0.9 * t_mid)) / t_mid
    expected = {
        "amed": 6 + 1.1 * (1 - 4) * d_mid,
        "dpm2": 6 + 1.1 * (1 - 4) * (2 * d_mid - d),
        "euler": x_mid + 1.1 * (1 - t_mid) * d_mid,
        "ipndm": x_mid + 1.1 * (1 - t_mid) * (3 * d_mid - d) / 2,
        # the last of two steps is of first order
        "dpmpp": x_mid + 1.1 * ((1 / t_mid) * x_mid + (1 - 1 / t_mid) * (x_mid / 2 + 0.9 * t_mid) - x_mid),
    }
    for name, value in expected.items():
        got, direction = Student(name, ORDERS[name], 1).advance(x, t, t_next, choice, x / 2 + 1 * t, ask)
        assert float(got) == pytest.approx(value), name
        assert float(direction) == pytest.approx(d_mid), name
    assert asked == pytest.approx([0.9 * t_mid] * len(expected))


def test_samples_of_a_batch_take_their_own_times(model: Any) -> None:
    class Each(Classical):
        def forward(self, features: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, ...]:
            return torch.linspace(0.2, 0.8, len(t)), torch.ones_like(t), torch.ones_like(t)

    for student in OF_ONE:
        chosen = settings(model, student)
        with torch.inference_mode(False):
            together = sample(model, amed_sampler(AMEDPredictor(Each(), chosen)), base_sigmas(fixed(chosen)))
        for i, r in enumerate((0.2, 0.5, 0.8)):
            alone = sample(model, amed_sampler(fixed(chosen, r)), base_sigmas(fixed(chosen)))
            torch.testing.assert_close(together[i], alone[i], rtol=1e-5, atol=1e-5)


# -- the schedules -----------------------------------------------------------------------------------------------------


def test_schedules_by_hand(model: Any) -> None:
    sampling = model.model.model_sampling
    low, high = float(sampling.sigma_min), float(sampling.sigma_max)
    assert time_points(sampling, "polynomial", 2, 7.0, 0.002, 80.0) == pytest.approx([80.0, 2.5152, 0.002], rel=1e-4)
    assert time_points(sampling, "logsnr", 2, 1.0, 0.02, 2.0) == pytest.approx([2.0, 0.2, 0.02])
    # half of the timesteps, 999 to 0
    half = float(sampling.sigma(torch.tensor(499.5)))
    assert time_points(sampling, "discrete", 2, 1.0, low, high) == pytest.approx([high, half, low], rel=1e-4)
    # VP with linear β: log(1 + σ²) = ½β_d·t² + β_min·t through (1, σ_max) and (0.001, σ_min)
    (b, d), *_ = np.linalg.lstsq(np.array([[1, 0.5], [1e-3, 0.5e-6]]), np.log1p(np.array([high, low]) ** 2), rcond=None)
    t = (1 + 1e-3) / 2
    middle = math.sqrt(math.expm1(b * t + d / 2 * t**2))
    assert time_points(sampling, "time_uniform", 2, 1.0, low, high) == pytest.approx([high, middle, low], rel=1e-4)


def test_schedules_of_flow_models_are_in_their_time() -> None:
    sampling = gaussian_mixture.patcher("FLOW").model.model_sampling
    low, high = float(sampling.sigma_min), float(sampling.sigma_max)
    assert high == 1.0
    assert time_points(sampling, "time_uniform", 4, 1.0, low, high)[1:4] == pytest.approx(
        [high - (high - low) * i / 4 for i in (1, 2, 3)]
    )
    points = time_points(sampling, "logsnr", 4, 1.0, low, high)
    ratio = [math.log(sigma / (1 - sigma)) for sigma in points[1:]]
    assert np.diff(ratio) == pytest.approx(ratio[1] - ratio[0], rel=1e-3)
    half = float(sampling.sigma(torch.tensor((float(sampling.timestep(torch.tensor(high))) + 1) / 2)))
    assert time_points(sampling, "discrete", 2, 1.0, low, high)[1] == pytest.approx(half, rel=2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_teacher_passes_through_the_points_of_its_student(kind: str, schedule: str) -> None:
    sampling = gaussian_mixture.patcher(kind).model.model_sampling
    ends = (float(sampling.sigma_min), float(sampling.sigma_max))
    for steps in (2, 5):
        few = time_points(sampling, schedule, steps, 1.0, *ends)
        many = time_points(sampling, schedule, 4 * steps, 1.0, *ends)
        assert few == many[::4] and few[0] == ends[1] and few[-1] == ends[0]


def test_schedules_that_can_not_be_are_refused(model: Any) -> None:
    sampling = model.model.model_sampling
    with pytest.raises(ValueError, match=r"There is no schedule 'linear'.*polynomial"):
        time_points(sampling, "linear", 3, 1.0, 0.1, 10.0)
    for bad in ((0, 1.0, 0.1, 10.0), (3, 0.0, 0.1, 10.0), (3, 1.0, 0.0, 10.0), (3, 1.0, 10.0, 0.1)):
        with pytest.raises(ValueError, match="at least one step"):
            time_points(sampling, "polynomial", *bad)

    class Coarse:
        """A model with 10 noise levels, all of which a schedule of 20 can't have once."""

        noise_scaling = staticmethod(sampling.noise_scaling)

        def timestep(self, sigma: Tensor) -> Tensor:
            return sigma.round()

        def sigma(self, timestep: Tensor) -> Tensor:
            return timestep.round()

    with pytest.raises(ValueError, match="does not fall"):
        time_points(Coarse(), "discrete", 20, 1.0, 1.0, 10.0)


# -- the sampler -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("student", OF_ONE)
@pytest.mark.parametrize("afs", [False, True])
def test_it_makes_as_many_model_calls_as_it_says(model: Any, student: str, afs: bool) -> None:
    chosen = settings(model, student, afs=afs)
    assert chosen.nfe == 6 - afs
    before = model.model.calls
    latents = sample(model, amed_sampler(fixed(chosen)), base_sigmas(fixed(chosen)))
    assert model.model.calls - before == chosen.nfe and latents.isfinite().all()


def test_with_afs_the_first_direction_is_the_noise_itself(model: Any) -> None:
    chosen = settings(model, "euler", steps=1, afs=True)
    t, t_next = chosen.sigmas
    asked = []
    apply = model.model.apply_model

    def heard(x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        asked.append((x.clone(), float(sigma.max())))
        return apply(x, sigma, **kwargs)

    started = []
    model.model.apply_model = heard
    try:
        sample(
            model,
            amed_sampler(fixed(chosen)),
            torch.tensor(chosen.sigmas),
            callback=lambda step, denoised, x, total: started.append(x.clone()),
        )
    finally:
        del model.model.apply_model
    (x_mid, t_mid), (x,) = asked[0], started
    assert t_mid == pytest.approx(math.sqrt(t * t_next), rel=1e-4)
    torch.testing.assert_close(x_mid, x + (t_mid - t) * x / math.sqrt(1 + t**2), rtol=1e-4, atol=1e-3)


def test_the_last_time_point_leads_to_0_without_a_model_call(model: Any) -> None:
    chosen = settings(model, "euler")
    noisy = sample(model, amed_sampler(fixed(chosen)), torch.tensor(chosen.sigmas))
    final = sample(model, amed_sampler(fixed(chosen)), base_sigmas(fixed(chosen)))
    # Euler's last direction carries on: what its own last step to 0 from t_mid gives
    torch.testing.assert_close(
        final, sample(model, stock("euler"), geometric(chosen.sigmas, 0.0)), rtol=1e-4, atol=1e-4
    )
    difference = (noisy - final).abs().max()
    assert 0 < difference < 10 * chosen.sigmas[-1]


@pytest.mark.parametrize("student", OF_ONE)
def test_a_part_of_its_schedule_is_sampled_as_the_predictor_learnt_it(model: Any, student: str, caplog: Any) -> None:
    chosen = settings(model, student)
    learnt, sigmas = fixed(chosen, 0.3), base_sigmas(fixed(chosen))
    # A predictor that knows nothing but this part, for which it is the whole.
    alone = fixed(replace(chosen, sigmas=chosen.sigmas[1:]), 0.3)
    with caplog.at_level(logging.WARNING, "sphereguide"):
        part = sample(model, amed_sampler(learnt), sigmas[1:], latent=torch.ones(3, *SHAPE))
    assert not caplog.records
    assert torch.equal(part, sample(model, amed_sampler(alone), sigmas[1:], latent=torch.ones(3, *SHAPE)))
    classical = sample(model, amed_sampler(fixed(chosen)), sigmas[1:], latent=torch.ones(3, *SHAPE))
    assert (part - classical).abs().max() > 1e-3


def test_the_upper_part_of_a_schedule_does_not_lower_the_order(model: Any) -> None:
    """As DPM-Solver++ 2M of the host, which lowers it only where a step leads to 0."""
    chosen = settings(model, "dpmpp", max_order=2)
    upper = torch.tensor(chosen.sigmas[:-1])
    own = sample(model, amed_sampler(fixed(chosen)), upper)
    other = sample(model, stock("dpmpp_2m"), geometric(chosen.sigmas[:-1], chosen.sigmas[-2]))
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 3, 9, 20])
def test_a_predictor_knows_each_interval_of_its_own(kind: str, schedule: str, steps: int) -> None:
    model = gaussian_mixture.patcher(kind)
    predictor = fixed(settings(model, steps=steps, schedule=schedule))
    found = intervals(base_sigmas(predictor).tolist(), predictor)
    assert all(step.known for step in found) and found[-1].last
    assert found[-1].t_next == predictor.settings.sigmas[-1]


def test_sigmas_of_another_schedule_are_sampled_by_the_student_alone_and_it_says_so(model: Any, caplog: Any) -> None:
    chosen = settings(model, "euler")
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "normal", 4)
    with caplog.at_level(logging.WARNING, "sphereguide"):
        found = sample(model, amed_sampler(fixed(chosen, 0.1)), sigmas)
    assert "these steps are not the predictor's" in caplog.text and "as euler makes them" in caplog.text
    torch.testing.assert_close(found, sample(model, amed_sampler(fixed(chosen, 0.5)), sigmas))
    # and ends where the model's own last time point leads
    assert found.isfinite().all()


def test_a_schedule_without_a_step_leaves_the_latent_alone(model: Any) -> None:
    chosen = settings(model)
    found, left = (
        sample(model, sampler, base_sigmas(fixed(chosen))[:1])  # the upper part of SplitSigmas at step 0
        for sampler in (amed_sampler(fixed(chosen)), comfy.samplers.ksampler("euler"))
    )
    assert torch.equal(found, left)


@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("student", OF_ONE)
def test_a_mask_keeps_what_it_covers(kind: str, student: str, afs: bool) -> None:
    model = gaussian_mixture.patcher(kind)
    predictor = fixed(settings(model, student, afs=afs), 0.4, 1.1, 1.2)
    latent = torch.linspace(-1, 1, math.prod(SHAPE)).reshape(1, *SHAPE).repeat(2, 1, 1, 1)
    mask = torch.zeros(1, 1, 2, 2)
    mask[..., 0] = 1
    found = sample(model, amed_sampler(predictor), base_sigmas(predictor), 2, latent=latent, denoise_mask=mask)
    torch.testing.assert_close(found[..., 1], latent[..., 1], rtol=0, atol=2e-5)
    assert (found[..., 0] - latent[..., 0]).abs().mean() > 0.1


def test_a_mask_that_changes_with_the_noise_keeps_what_it_covers(model: Any) -> None:
    """Differential diffusion."""
    predictor = fixed(settings(model, afs=True), 0.4, 1.1, 1.2)
    latent = torch.linspace(-1, 1, math.prod(SHAPE)).reshape(1, *SHAPE)
    mask = torch.tensor([[0.0, 0.5], [0.0, 0.5]])[None, None]

    def at(sigma: Tensor, mask: Tensor, extra_options: Any) -> Tensor:
        return (mask >= (0.3 if float(sigma[0]) < 1 else 0.7)).float()

    options, changing = model.model_options, model.clone()
    changing.model_options = {**options, "denoise_mask_function": at}
    found, free = (
        sample(of, amed_sampler(predictor), base_sigmas(predictor), 1, latent=latent, denoise_mask=mask)
        for of in (changing, model)
    )
    torch.testing.assert_close(found[..., 0], latent[..., 0], rtol=0, atol=2e-5)
    assert (found[..., 1] - latent[..., 1]).abs().mean() > 0.01
    assert (found - free)[..., 1].abs().mean() > 0.01


@pytest.mark.parametrize("student", ["ipndm", "amed"])
def test_it_follows_a_reference(model: Any, student: str) -> None:
    """ILVR, which changes the state where the model is asked about it at a base point."""
    predictor = fixed(settings(model, student), 0.4)
    reference, asked = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(5)), []
    apply_model = model.model.apply_model
    model.model.apply_model = lambda x, t, *args, **kwargs: (
        asked.append((x, float(t[0]))) or apply_model(x, t, *args, **kwargs)
    )
    try:
        found = sample(model, referenced(amed_sampler(predictor), reference, 2, 0.0, 1.0), base_sigmas(predictor))
    finally:
        del model.model.apply_model
    base = base_sigmas(predictor).tolist()
    steps = {base.index(s): x for x, level in asked for s in base[1:-1] if level == pytest.approx(s, rel=1e-4)}
    assert list(steps) == list(range(1, len(base) - 1))
    for step, x in steps.items():
        noised = reference + base[step] * noise_of((len(x), *SHAPE), 1, step, 0, 1)
        torch.testing.assert_close(low_pass(x, 2), low_pass(noised, 2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(low_pass(found, 2), low_pass(reference, 2).expand_as(found), rtol=1e-4, atol=1e-4)


def test_dsg_says_that_there_is_no_noise_to_turn_and_epsilon_scaling_composes(model: Any) -> None:
    chosen = settings(model)
    sampler, sigmas = amed_sampler(fixed(chosen)), base_sigmas(fixed(chosen))
    assert host.adds_noise(sampler) is False
    with pytest.raises(ValueError, match=r"\(amed\) adds none.*euler_ancestral"):
        guide(sampler)
    plain = sample(model, sampler, sigmas)
    assert torch.equal(sample(model, with_post_cfg(sampler, EpsilonScaling(lambda _: uniform(1.0))), sigmas), plain)
    scaled = sample(model, with_post_cfg(sampler, EpsilonScaling(lambda _: uniform(1.05))), sigmas)
    assert (scaled - plain).abs().mean() > 1e-3


@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
@pytest.mark.parametrize("schedule", [lambda _: uniform(1.02), lambda sigmas: linear(0.02, 1.01, sigmas)])
def test_epsilon_scaling_of_samples_with_times_of_their_own_is_that_of_each(kind: str, schedule: Any) -> None:
    model = gaussian_mixture.patcher(kind)
    chosen = settings(model)

    class OfItsOwn(Classical):
        def forward(self, features: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, ...]:
            r, *scales = super().forward(features, t, t_next)
            return r + place[: len(t)], *scales

    predictor = fixed(chosen)
    predictor.network.__class__ = OfItsOwn
    sampler = with_post_cfg(amed_sampler(predictor), EpsilonScaling(schedule))
    place = torch.linspace(-0.3, 0.3, 3)
    together = sample(model, sampler, base_sigmas(predictor))
    plain = sample(model, amed_sampler(predictor), base_sigmas(predictor))
    for i in range(3):
        place = torch.linspace(-0.3, 0.3, 3)[i:]
        alone = sample(model, sampler, base_sigmas(predictor), 1, noise=noise_of((3, *SHAPE), 5)[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)
    assert (together - plain).abs().mean() > 1e-3


def test_expanded_sigmas_are_those_of_the_predictor(model: Any) -> None:
    chosen = replace(settings(model, "euler"), midpoints=(8.0, 1.0, 0.1))
    sigmas = expanded_sigmas(fixed(chosen), chosen.midpoints)
    a, b, c, _ = chosen.sigmas
    assert sigmas.tolist() == pytest.approx([a, 8.0, b, 1.0, c, 0.1, 0.0])
    # along them Euler's method is the student
    r = math.log(8.0 / a) / math.log(b / a)
    one = replace(settings(model, "euler", steps=1), sigmas=(a, b))
    own = sample(model, amed_sampler(fixed(one, r)), torch.tensor([a, b]))
    torch.testing.assert_close(own, sample(model, stock("euler"), torch.tensor([a, 8.0, b])), rtol=1e-4, atol=1e-4)


# -- the bottleneck ----------------------------------------------------------------------------------------------------


def test_the_bottleneck_is_that_of_the_conditional_half() -> None:
    model = tiny_models.sd15()
    prompts = tiny_models.conditioning(seed=1), tiny_models.conditioning(seed=2)
    chosen = settings(model, cfg=4.0)
    seen = {}
    for name, conds, cfg in (("both", prompts, 4.0), ("alone", prompts, 1.0), ("other", prompts[::-1], 1.0)):
        predictor = fixed(chosen)
        sample(model, amed_sampler(predictor), base_sigmas(predictor), 2, cfg, lambda c=conds: c, (4, 16, 16))
        seen[name] = predictor.network.seen[0]
    assert seen["both"].shape == (2, 64) and seen["both"].abs().min() > 0
    torch.testing.assert_close(seen["both"], seen["alone"], rtol=1e-4, atol=1e-5)
    assert (seen["both"] - seen["other"]).abs().max() > 1e-3
    assert not model.model.diffusion_model.middle_block[-1]._forward_hooks


@pytest.mark.parametrize("size", [8, 16, 32])
def test_the_bottleneck_is_pooled_to_8_by_8(size: int) -> None:
    model = tiny_models.sd15()
    predictor = fixed(settings(model))
    raw = []
    hook = model.model.diffusion_model.middle_block[-1].register_forward_hook(lambda m, i, out: raw.append(out))
    try:
        conds = (tiny_models.conditioning(), tiny_models.conditioning())
        sample(model, amed_sampler(predictor), base_sigmas(predictor), 1, 1.0, lambda: conds, (4, size, size))
    finally:
        hook.remove()
    expected = torch.nn.functional.adaptive_avg_pool2d(raw[0].mean(1), 8).flatten(1)
    torch.testing.assert_close(predictor.network.seen[0], expected)


def test_halves_that_come_in_calls_of_their_own_and_frames_of_a_video() -> None:
    block = nn.Sequential(nn.Identity())
    network = nn.Module()
    network.middle_block = block
    maps = torch.randn(6, 5, 8, 8)

    def apply_model(x: Tensor, timestep: Tensor, **c: Any) -> Tensor:
        block[-1](maps[: len(x) * c.get("frames", 1)])
        return x

    x = torch.zeros(2, 4, 8, 8)
    with watched(network, {}) as (bottleneck, options):

        def call(half: int, **c: Any) -> None:
            parameters = {"input": x, "timestep": None, "c": c, "cond_or_uncond": [half]}
            options["model_function_wrapper"](apply_model, parameters)

        bottleneck.forget(x)
        assert bottleneck.features(x).eq(0).all()
        call(1)
        assert bottleneck.features(x).eq(0).all()
        call(0)
        torch.testing.assert_close(bottleneck.features(x), maps[:2].mean(1).flatten(1))
        # what another post-CFG function asks belongs to it
        assert options["sampler_post_cfg_function"][0]({"denoised": x}) is x
        call(0, frames=3)
        torch.testing.assert_close(bottleneck.features(x), maps[:2].mean(1).flatten(1))
        bottleneck.forget(x)
        call(0, frames=3)
        torch.testing.assert_close(bottleneck.features(x), maps.mean(1).unflatten(0, (2, 3)).mean(1).flatten(1))
    for prompts, several in ((("positive", "middle", "negative"), {}), (("positive",), {"multigpu_clones": {}})):
        with watched(network, several, prompts) as (bottleneck, options):
            assert options == several and not block[-1]._forward_hooks


def test_the_bottleneck_is_that_before_a_controlnet_is_added_in_place() -> None:
    network = nn.Module()
    network.middle_block = nn.Sequential(nn.Identity())
    maps = torch.randn(2, 5, 8, 8)

    def apply_model(x: Tensor, timestep: Tensor) -> Tensor:
        h = network.middle_block[-1](maps.clone())
        h += 1  # as ComfyUI's apply_control does
        return x

    x = torch.zeros(2, 4, 8, 8)
    with watched(network, {}) as (bottleneck, options):
        bottleneck.forget(x)
        parameters = {"input": x, "timestep": None, "c": {}, "cond_or_uncond": [0]}
        options["model_function_wrapper"](apply_model, parameters)
        torch.testing.assert_close(bottleneck.features(x), maps.mean(1).flatten(1))


def test_a_model_in_tiles_and_one_without_a_bottleneck_give_zeros(model: Any, caplog: Any) -> None:
    predictor = fixed(settings(model))
    sample(model, amed_sampler(predictor), base_sigmas(predictor))
    assert predictor.network.seen[0].eq(0).all()

    def tiles(apply_model: Any, parameters: dict[str, Any]) -> Tensor:
        x, timestep, c = parameters["input"], parameters["timestep"], parameters["c"]
        halves = [apply_model(part.contiguous(), timestep, **c) for part in x.chunk(2, -1)]
        return torch.cat(halves, -1)

    def tiles_in_a_batch(apply_model: Any, parameters: dict[str, Any]) -> Tensor:
        x, timestep, c = parameters["input"], parameters["timestep"], parameters["c"]
        c = {**c, "c_crossattn": c["c_crossattn"].repeat(2, 1, 1)}
        return torch.cat(apply_model(torch.cat(x.chunk(2, -1)), timestep.repeat(2), **c).chunk(2), -1)

    def windows(apply_model: Any, parameters: dict[str, Any]) -> Tensor:
        x, timestep, c = parameters["input"], parameters["timestep"], parameters["c"]
        one = {**c, "c_crossattn": c["c_crossattn"][:1]}
        return torch.cat([apply_model(x[i : i + 1], timestep[:1], **one) for i in range(len(x))])

    for wrapper in (tiles, tiles_in_a_batch, windows):
        caplog.clear()
        unet = tiny_models.sd15()
        unet.set_model_unet_function_wrapper(wrapper)
        predictor = fixed(settings(unet))
        conds = (tiny_models.conditioning(), tiny_models.conditioning())
        with caplog.at_level(logging.WARNING, "sphereguide"):
            sample(unet, amed_sampler(predictor), base_sigmas(predictor), 2, 1.0, lambda c=conds: c, (4, 16, 16))
        assert predictor.network.seen[0].eq(0).all() and caplog.text.count("called in pieces") == 1


def test_the_hook_goes_when_a_run_fails() -> None:
    model = tiny_models.sd15()
    predictor = fixed(settings(model))
    conds = (tiny_models.conditioning(), tiny_models.conditioning())

    def stop(*_: Any) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        sample(
            model, amed_sampler(predictor), base_sigmas(predictor), 1, 1.0, lambda: conds, (4, 16, 16), callback=stop
        )
    assert not model.model.diffusion_model.middle_block[-1]._forward_hooks


# -- the file ----------------------------------------------------------------------------------------------------------


def trained_file(model: Any, path: Path) -> AMEDPredictor:
    predictor = AMEDPredictor.untrained(replace(settings(model), midpoints=(9.0, 2.0, 0.2), error=0.1), seed=3)
    files.save(predictor, path)
    return predictor


def test_a_file_holds_all_that_sampling_needs(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "mine.safetensors"
    predictor = trained_file(model, path)
    with torch.inference_mode():
        loaded = files.load(path)
    assert loaded.settings == replace(predictor.settings, student_error=loaded.settings.student_error)
    sigmas = base_sigmas(predictor)
    assert torch.equal(sample(model, amed_sampler(predictor), sigmas), sample(model, amed_sampler(loaded), sigmas))
    assert path.stat().st_size < 50_000 and [file.name for file in path.parent.iterdir()] == ["mine.safetensors"]


def test_files_that_are_none(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    predictor = trained_file(model, path)
    whole = path.read_bytes()
    weights = {name: value.contiguous() for name, value in predictor.network.state_dict().items()}
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"Load AMED Predictor: .*cut short"):
        files.load(path)
    with pytest.raises(ValueError, match="can't be read"):
        files.load(tmp_path / "missing.safetensors")
    save_file(weights, path)
    with pytest.raises(ValueError, match="no predictor of Train AMED Predictor"):
        files.load(path)
    for broken in ('{"student": "ipndm"}', '{"student": "magic"}', '{"colour": 1}', "not json"):
        save_file(weights, path, {"format": files.FORMAT, "settings": broken})
        with pytest.raises(ValueError, match="does not fit this version"):
            files.load(path)
    path.write_bytes(whole)
    with torch.inference_mode(False):
        predictor.network.time.bias.data[0] = math.nan
    files.save(predictor, path)
    with pytest.raises(ValueError, match="not finite"):
        files.load(path)


def test_what_a_predictor_was_not_trained_for_is_said(model: Any, caplog: Any) -> None:
    chosen = settings(model, cfg=2.0)
    predictor = fixed(chosen)
    assert chosen.model_hash == fingerprint(model) and mismatches(predictor, model, 2.0) == []
    other = gaussian_mixture.patcher()
    with torch.inference_mode():
        other.model.diffusion_model.means.data += 0.01
    assert "another model" in mismatches(predictor, other, 2.0)[0]
    patched = model.clone()
    patched.add_patches({"diffusion_model.means": (torch.zeros_like(model.model.diffusion_model.means),)}, 0.5)
    assert "other LoRAs" in mismatches(predictor, patched, None)[0]
    another = model.clone()
    another.add_patches({"diffusion_model.means": (torch.ones_like(model.model.diffusion_model.means),)}, 0.5)
    assert fingerprint(another) != fingerprint(patched)
    assert mismatches(predictor, model, 7.0) == ["cfg 7 and not 2"]
    flow = gaussian_mixture.patcher("FLOW")
    assert any("sigmas from 1 to" in text for text in mismatches(predictor, flow, 2.0))
    with caplog.at_level(logging.WARNING, "sphereguide"):
        sample(model, amed_sampler(predictor), base_sigmas(predictor), cfg=3.0)
    assert "cfg 3 and not 2" in caplog.text


def test_a_fingerprint_does_not_depend_on_whether_the_model_is_loaded(model: Any) -> None:
    patched = model.clone()
    patched.add_patches({"diffusion_model.means": (torch.ones_like(model.model.diffusion_model.means),)}, 0.5)
    before, plain = fingerprint(patched), fingerprint(model)
    sigmas = torch.tensor([1.0, 0.0])
    first = sample(patched, stock("euler"), sigmas)
    assert fingerprint(patched) == before != plain
    assert (first - sample(model, stock("euler"), sigmas)).abs().max() > 0.01
    assert fingerprint(model) == plain


# -- training ----------------------------------------------------------------------------------------------------------


def trained(
    model: Any, chosen: AMEDSettings, kept: Path | None = None, prompts: Any = None, **plan: Any
) -> tuple[AMEDPredictor, History]:
    progress = plan.pop("progress", lambda _: None)
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(model)
        guider.set_cfg(chosen.cfg)
        prompts = prompts or (gaussian_mixture.conditioning(0.3), gaussian_mixture.conditioning(-0.2))
        plan = {"trajectories": 64, "epochs": 1, "learning_rate": 0.005, **plan}
        return train(guider, prompts, SHAPE, chosen, Plan(**plan), kept, progress)


@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
@pytest.mark.parametrize("student", OF_ONE)
def test_a_trained_predictor_is_nearer_to_the_true_ode_than_its_student(kind: str, student: str) -> None:
    """On the mixture, whose denoiser is known in closed form, against 300 steps of Heun's method."""
    model = gaussian_mixture.patcher(kind)
    sampling = model.model.model_sampling
    chosen = settings(model, student, points=7, scale_dir=0.1, scale_time=0.2)
    predictor, _ = trained(model, chosen, trajectories=1536, batch_size=32, learning_rate=0.01)
    ends = (float(sampling.sigma_min), float(sampling.sigma_max))
    fine = torch.tensor([*time_points(sampling, "polynomial", 300, 7.0, *ends), 0.0])
    truth = sample(model, stock("heun"), fine, 256)
    sigmas = base_sigmas(predictor)
    errors = []
    for one in (predictor, fixed(chosen)):
        distances = (sample(model, amed_sampler(one), sigmas, 256) - truth).square().flatten(1).mean(1).sqrt()
        # without the few that six model calls send to another mode of the mixture
        errors.append(float(distances.sort()[0][:-25].mean()))
    assert errors[0] < 0.85 * errors[1], errors


def test_each_point_is_learnt_as_published(model: Any) -> None:
    """A step of Adam a time point; a student of one step begins each interval where the teacher is."""
    for student in ("ipndm", "amed"):
        chosen = settings(model, student, points=7, scale_dir=0.1, scale_time=0.2)
        _, history = trained(model, chosen, trajectories=1024, batch_size=32, objective="each point")
        first, last = (np.mean(history.losses[part], 0) for part in (slice(0, 4), slice(-4, None)))
        assert last.sum() < 0.85 * first.sum(), (student, first, last)
        assert history.errors[-1][1] < 0.8 * history.student_error


def test_an_objective_that_there_is_not_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"there is no objective 'both'.*endpoint, each point"):
        trained(model, settings(model), objective="both")


@pytest.mark.parametrize("objective", training.OBJECTIVES)
def test_training_is_the_same_for_the_same_seed_and_leaves_the_model_alone(model: Any, objective: str) -> None:
    chosen = settings(model, steps=2)
    before = sample(model, stock("euler"), torch.tensor([10.0, 1.0, 0.0]))
    first, second, other = (trained(model, chosen, seed=seed, objective=objective) for seed in (1, 1, 2))
    assert first[1] == second[1] and first[1] != other[1]
    for a, b in zip(first[0].network.parameters(), second[0].network.parameters(), strict=True):
        assert torch.equal(a, b) and not a.requires_grad
    assert torch.equal(sample(model, stock("euler"), torch.tensor([10.0, 1.0, 0.0])), before)
    assert "timestep" not in vars(model.model.model_sampling)


def test_the_best_of_the_training_is_what_it_gives(model: Any) -> None:
    chosen = settings(model, steps=2)
    predictor, history = trained(model, chosen, trajectories=320)
    errors = dict(history.errors)
    assert predictor.settings.error == min(errors.values()) and list(errors) == [0, 10, 20]
    assert len(history.losses) == 20 and all(len(losses) == 2 for losses in history.losses)
    assert predictor.settings.trajectories == 320 and predictor.settings.student_error == history.student_error
    for (a, b), middle in zip(pairwise(chosen.sigmas), predictor.settings.midpoints, strict=True):
        assert b < middle < a


def test_the_weights_that_it_gives_are_those_of_the_best_look(model: Any) -> None:
    """With steps so large that the last look is a bad one."""
    chosen, plan = settings(model, steps=2), {"trajectories": 320, "learning_rate": 0.5}
    predictor, history = trained(model, chosen, **plan)
    assert history.errors[-1][1] > 1.2 * predictor.settings.error
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(model)
        guider.set_cfg(chosen.cfg)
        prompts = gaussian_mixture.conditioning(0.3), gaussian_mixture.conditioning(-0.2)
        judge = training._Training(guider, prompts, SHAPE, chosen, Plan(epochs=1, **plan), None, lambda _: None)
        error, _ = judge._error(predictor)
    assert error == pytest.approx(predictor.settings.error, rel=1e-5)


def test_what_fills_no_batch_does_not_count_as_learnt_from(model: Any) -> None:
    predictor, _ = trained(model, settings(model, steps=2), trajectories=38, batch_size=16, epochs=2)
    assert predictor.settings.trajectories == 32


def stop_at(iteration: int) -> Callable[[Progress], None]:
    def progress(told: Progress) -> None:
        if told.iteration == iteration:
            raise Interrupted

    return progress


def test_a_training_that_was_cancelled_goes_on_to_the_same_bits(model: Any, tmp_path: Path) -> None:
    chosen, kept = settings(model, steps=2), tmp_path / "mine.training.safetensors"
    whole, history = trained(model, chosen, trajectories=240)
    with pytest.raises(Interrupted):
        trained(model, chosen, kept, trajectories=240, progress=stop_at(12))
    best_so_far = files.load(kept)
    assert best_so_far.settings.error == min(error for i, error in history.errors if i <= 12)
    assert best_so_far.settings.trajectories == 12 * 16
    told: list[int] = []
    again, resumed = trained(model, chosen, kept, trajectories=240, progress=lambda p: told.append(p.iteration))
    assert told == [13, 14, 15] and resumed == history and again.settings == whole.settings
    for a, b in zip(again.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(a, b)
    told.clear()
    trained(model, chosen, kept, trajectories=240, progress=lambda p: told.append(p.iteration))
    assert told == []  # it is done


@pytest.mark.parametrize("objective", training.OBJECTIVES)
@pytest.mark.parametrize("share", [0.2, 0.4, 0.55, 0.98])
def test_a_training_that_was_cancelled_anywhere_goes_on_to_the_same_bits(
    model: Any, tmp_path: Path, objective: str, share: float
) -> None:
    """In the first look, within an iteration, between two of its steps of Adam, in the last look."""
    chosen, kept = settings(model, steps=2, points=1), tmp_path / "mine.training.safetensors"
    plan = {"trajectories": 160, "objective": objective}
    before = model.model.calls
    whole, history = trained(model, chosen, **plan)
    stop = model.model.calls + int(share * (model.model.calls - before))
    apply = model.model.apply_model

    def stopping(*args: Any, **kwargs: Any) -> Tensor:
        if model.model.calls == stop:
            raise Interrupted
        return apply(*args, **kwargs)

    model.model.apply_model = stopping
    try:
        with pytest.raises(Interrupted):
            trained(model, chosen, kept, **plan)
    finally:
        del model.model.apply_model
    again, resumed = trained(model, chosen, kept, **plan)
    assert resumed == history
    for a, b in zip(again.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_look_in_which_a_training_was_cancelled_is_made_again(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, kept = settings(model, steps=2, points=1), tmp_path / "mine.training.safetensors"
    whole, history = trained(model, chosen, trajectories=480)
    assert [iteration for iteration, _ in history.errors] == [0, 10, 20, 30]
    judge = training._Training._judge

    def stopping(self: Any) -> None:
        if self.iteration == 10:
            raise Interrupted
        judge(self)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(training._Training, "_judge", stopping)
        trained(model, chosen, kept, trajectories=480)
    again, resumed = trained(model, chosen, kept, trajectories=480)
    assert resumed == history and again.settings == whole.settings


def test_other_settings_begin_anew(model: Any, tmp_path: Path, caplog: Any) -> None:
    kept = tmp_path / "mine.training.safetensors"
    trained(model, settings(model, steps=2), kept)
    told: list[int] = []
    with caplog.at_level(logging.WARNING, "sphereguide"):
        trained(model, settings(model, steps=3), kept, progress=lambda p: told.append(p.iteration))
    assert told == [1, 2, 3, 4] and "This one begins anew" in caplog.text
    assert files.load(tmp_path / "mine.training.before").settings.steps == 2
    for other in (
        {"prompts": (gaussian_mixture.conditioning(0.5), gaussian_mixture.conditioning(-0.2))},
        {"prompts": (gaussian_mixture.conditioning(0.5), gaussian_mixture.conditioning(0.2))},
        {"seed": 5},
    ):
        told.clear()
        trained(model, settings(model, steps=3), kept, progress=lambda p: told.append(p.iteration), **other)
        assert told == [1, 2, 3, 4]
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"Train AMED Predictor: .*cut short"):
        trained(model, settings(model, steps=3), kept)


def test_epochs_use_each_trajectory_and_its_teacher_again(model: Any) -> None:
    chosen = settings(model, steps=1, points=20)
    calls = []
    for epochs in (1, 2):
        before = model.model.calls
        _, history = trained(model, chosen, trajectories=32, epochs=epochs)
        calls.append(model.model.calls - before)
        assert len(history.losses) == 2 * epochs
    assert calls[1] - calls[0] < 2 * 2 * 21  # the teacher's calls for two batches


def test_prompts_take_turns_in_a_batch(model: Any) -> None:
    several = [entry for shift in (0.0, 0.4, 0.8) for entry in gaussian_mixture.conditioning(shift)]
    (entry,) = training._of_samples(several, [0, 4, 5, 3])
    assert entry[0][:, 0, 0].tolist() == pytest.approx([0.0, 0.4, 0.8, 0.0])
    chosen = settings(model, steps=2)
    _, history = trained(model, chosen, prompts=(several, gaussian_mixture.conditioning(0.0)))
    _, alone = trained(model, chosen, prompts=(gaussian_mixture.conditioning(0.0), gaussian_mixture.conditioning(0.0)))
    assert history.losses[0] != alone.losses[0]
    short, long = torch.randn(1, 2, 4), torch.randn(1, 3, 4)
    (entry,) = training._of_samples([[short, {}], [long, {}]], [0, 1])
    assert torch.equal(entry[0], torch.cat([short.repeat(1, 3, 1), long.repeat(1, 2, 1)]))
    pooled = [[short, {"pooled_output": torch.full((1, 2), float(i)), "guidance": 3.5}] for i in range(2)]
    (entry,) = training._of_samples(pooled, [1, 0])
    assert entry[1]["pooled_output"].tolist() == [[1, 1], [0, 0]] and entry[1]["guidance"] == 3.5
    with pytest.raises(ValueError, match="differ in 'guidance'"):
        training._of_samples([[short, {"guidance": 1.0}], [short, {"guidance": 2.0}]], [0, 1])
    with pytest.raises(ValueError, match="37 to 53 tokens"):
        training._of_samples([[torch.zeros(1, length, 4), {}] for length in (37, 53)], [0, 1])
    edited = [[short, {"reference_latents": [torch.full((1, 2), float(i))]}] for i in range(2)]
    with pytest.raises(ValueError, match="differ in 'reference_latents'"):
        training._of_samples(edited, [0, 1])
    with pytest.raises(ValueError, match="different kinds"):
        training._of_samples([[short, {}], [short, {"area": (1, 1, 0, 0)}]], [0, 1])


def test_a_missing_prompt_is_refused(model: Any) -> None:
    one = gaussian_mixture.conditioning(0.0)
    with pytest.raises(ValueError, match=r"there is no positive prompt\. Connect one"):
        trained(model, settings(model), prompts=([], one))
    with pytest.raises(ValueError, match=r"there is no negative prompt\. Connect one"):
        trained(model, settings(model, cfg=2.0), prompts=(one, []))
    trained(model, settings(model), prompts=(one, []), trajectories=16)  # cfg 1 asks it nothing


def test_plans_without_a_step_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"8 trajectories are less than one batch of 16\. Raise"):
        trained(model, settings(model), trajectories=8)
    with pytest.raises(ValueError, match="no share of 0 epochs in batches of 16 for each of 1 processes"):
        trained(model, settings(model), epochs=0)


def test_a_model_that_gives_no_numbers_is_said_and_nothing_is_learnt_from_it(model: Any, tmp_path: Path) -> None:
    apply, broken = model.model.apply_model, []

    def once(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        return apply(x, t, **kwargs) * (math.nan if broken else 1)

    kept = tmp_path / "mine.training.safetensors"
    model.model.apply_model = once
    try:
        with pytest.raises(RuntimeError, match=r"Train AMED Predictor: the loss at sigma .* not finite"):
            trained(model, settings(model, steps=2), kept, progress=lambda told: broken.append(told))
    finally:
        del model.model.apply_model
    assert files.load(kept).settings.trajectories == 16  # and is finite, or it would not load


def test_a_model_without_gradients_is_not_trained_on(model: Any) -> None:
    model.model.apply_model = torch.no_grad()(model.model.apply_model)
    try:
        with pytest.raises(
            RuntimeError, match=r"Train AMED Predictor: this model runs without gradients here\. Train wi"
        ):
            trained(model, settings(model, steps=2))
    finally:
        del model.model.apply_model


def test_a_model_in_half_precision_gets_a_gradient_that_it_can_hold() -> None:
    """The mean over the numbers of large latents begins at 1e-6 and less, below what float16 multiplies."""
    network = torch.nn.Linear(1, 1, bias=False)
    training = SimpleNamespace(network=network, optimizer=torch.optim.SGD(network.parameters()), _step=lambda *_: None)
    _Training._descend(training, network.weight.half().float().sum() * 1e-9, 1.0, 2.0**26)
    torch.testing.assert_close(network.weight.grad, torch.full((1, 1), 1e-9), rtol=1e-3, atol=0)


def test_timesteps_have_a_slope_and_keep_their_value() -> None:
    sampling = tiny_models.sd15().model.model_sampling
    sigma = torch.tensor([0.1, 0.7, 3.0, 12.0])
    with training._smooth_timesteps(sampling):
        wanted = sigma.clone().requires_grad_()
        value = sampling.timestep(wanted)
        assert torch.equal(value, sampling.timestep(sigma).to(value))
        (slope,) = torch.autograd.grad(value.sum(), wanted)
    # log σ over the timestep, from the table
    table = sampling.log_sigmas
    steps = sampling.timestep(sigma)
    expected = 1 / (table[steps + 1] - table[steps - 1]) * 2 / sigma
    torch.testing.assert_close(slope, expected, rtol=0.25, atol=0)
    assert "timestep" not in vars(sampling)


def test_the_gradient_of_the_loss_is_that_of_finite_differences() -> None:
    """With respect to r, through all model calls of a trajectory."""
    model = gaussian_mixture.patcher()
    chosen = settings(model, "ipndm", steps=2, points=3)
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(model)
        prompts = (gaussian_mixture.conditioning(0.3), gaussian_mixture.conditioning(-0.2))
        run = training._Training(guider, prompts, SHAPE, chosen, Plan(16), None, lambda _: None)
    bias = run.predictor.network.heads["r"].bias
    gradients = []
    run._step = lambda loss, sigma: gradients.append(float(bias.grad))  # type: ignore[method-assign]

    def loss(at: float) -> float:
        with torch.inference_mode(False), torch.no_grad():
            bias.fill_(at)
        with torch.inference_mode():
            return run._iterate(list(range(16)))[0][-1]

    h = 1e-2
    expected = (loss(0.2 + h) - loss(0.2 - h)) / (2 * h)
    loss(0.2)
    assert gradients[-1] == pytest.approx(expected, rel=0.03) and abs(expected) > 1e-3


def shell(*arguments: str, processes: int, out: Path) -> list[float]:
    """The losses that `python -m samplers.amed` prints."""
    command = ["-m", "samplers.amed", "--toy", "--cpu", "--out", str(out), *arguments]
    if processes > 1:
        command = [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(processes),
            "--master_port",
            "29517",
            *command,
        ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = re.search(r"^losses (.*)$", run.stdout, re.MULTILINE)
    assert found, run.stdout
    return [float(value) for value in found[1].split()]


def test_a_shell_takes_a_diffusion_model_and_its_text_encoders_from_files_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr("comfy.sd.load_unet", lambda path: asked.append(path) or toy_portraits.load_model())
    monkeypatch.setattr(
        "comfy.sd.load_clip", lambda paths, clip_type: asked.extend([paths, clip_type]) or toy_portraits.load_clip()
    )
    given = ["--diffusion-model", "unet.safetensors", "--clip", "l.safetensors", "g.safetensors", "--clip-type", "sd3"]
    monkeypatch.setattr(sys, "argv", ["", *given, "--prompt", "a", "--prompt", "b", "--out", "x"])
    with torch.inference_mode():
        _, positive, negative, shape = from_shell.load(from_shell.arguments())
    assert asked == ["unet.safetensors", ["l.safetensors", "g.safetensors"], comfy.sd.CLIPType.SD3]
    assert len(positive) == 2 and len(negative) == 1 and shape == (4, 64, 64)
    monkeypatch.setattr(sys, "argv", ["", *given[:2], "--out", "x"])
    with pytest.raises(SystemExit):
        from_shell.arguments()


@pytest.mark.slow
@pytest.mark.parametrize("student", ["ipndm", "epd"])
def test_two_processes_learn_what_one_learns_from_a_shell(tmp_path: Path, student: str) -> None:
    arguments = (
        "--student",
        student,
        "--trajectories",
        "8",
        "--batch-size",
        "4",
        "--epochs",
        "1",
        "--steps",
        "2",
        "--teacher",
        "heun",
        "--cfg",
        "2",
    )
    arguments += ("--teacher-points", "1", "--prompt", "a smiling person", "--prompt", "a sad person")
    one = shell(*arguments, processes=1, out=tmp_path / "one.safetensors")
    two = shell(*arguments, processes=2, out=tmp_path / "two.safetensors")
    assert len(one) == 2 and two == pytest.approx(one, rel=1e-4)
    single, double = (files.load(tmp_path / f"{name}.safetensors").settings for name in ("one", "two"))
    assert single.trajectories == double.trajectories == 8 and single.error == pytest.approx(double.error, rel=1e-4)
    # what Adam reached, which need not be the best
    states = [files.read(tmp_path / f"{name}.training.safetensors", "")[0] for name in ("one", "two")]
    for name, before in AMEDPredictor.untrained(single).network.named_parameters():
        one_state, two_state = (state[f"network.{name}"] for state in states)
        torch.testing.assert_close(one_state, two_state, rtol=1e-3, atol=1e-4)
        assert not torch.equal(one_state, before)


# -- the nodes ---------------------------------------------------------------------------------------------------------


def node_settings(**changed: Any) -> dict[str, Any]:
    required = nodes.AMEDTrain.INPUT_TYPES()["required"]
    widgets = {
        name: options["default"] if "default" in options else kind[0]
        for name, (kind, options) in required.items()
        if isinstance(kind, list) or "default" in options
    }
    return widgets | {"cfg": 1.0, "trajectories": 32, "epochs": 1, "name": "", "steps": 2} | changed


def run_node(model: Any, **changed: Any) -> dict[str, Any]:
    with torch.inference_mode():
        wires = {
            "model": model,
            "positive": gaussian_mixture.conditioning(0.3),
            "negative": gaussian_mixture.conditioning(-0.2),
            "latent": {"samples": torch.zeros(1, *SHAPE)},
        }
        return nodes.AMEDTrain().train(**(wires | node_settings(**changed)))


def test_the_node_trains_draws_and_says_what_came_of_it(model: Any) -> None:
    result = run_node(model, teacher=training.PUBLISHED)
    predictor, curves, report = result["result"]
    assert curves.shape == (1, 400, 1000, 3) and float(curves.std()) > 0.05
    assert result["ui"]["text"] == [report] and "ipndm with 4 model calls" in report
    assert predictor.settings.teacher == "ipndm" and predictor.settings.teacher_points == 2  # as published
    assert predictor.settings.max_order == 4 and predictor.settings.rho == 7.0
    worse = replace(predictor.settings, error=2.0, student_error=1.0)
    assert "don't use this one" in nodes.said(replace(predictor, settings=worse))


def test_what_was_trained_is_saved_and_loaded(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes.folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(nodes.folder_paths, "get_folder_paths", lambda name: [str(tmp_path / name)])
    monkeypatch.setattr(nodes.folder_paths, "get_full_path", lambda name, file: str(tmp_path / name / file))
    predictor, *_ = run_node(model, name="mine")["result"]
    assert nodes.AMEDLoad.INPUT_TYPES()["required"]["name"][0] == ["mine.training.safetensors"]
    nodes.AMEDSave().save(predictor, "sub/mine")
    assert "sub/mine.safetensors" in nodes.AMEDLoad.INPUT_TYPES()["required"]["name"][0]
    before = nodes.AMEDLoad.IS_CHANGED("sub/mine.safetensors")
    nodes.AMEDSave().save(predictor, "sub/mine")
    assert nodes.AMEDLoad.IS_CHANGED("sub/mine.safetensors") != before
    for name in ("sub/mine.safetensors", "mine.training.safetensors"):
        loaded, about = nodes.AMEDLoad().load(name)
        assert loaded.settings == predictor.settings and "ipndm, 4 model calls, cfg 1, 32 trajectories" in about
    for bad in ("", "../outside", "/etc/outside", "a:b", "a\\b", "nul\0", "long" * 60):
        with pytest.raises(ValueError, match=r"Save AMED Predictor: .*no name for a file"):
            nodes.AMEDSave().save(predictor, bad)
    with pytest.raises(FileNotFoundError, match="Train AMED Predictor"):
        nodes.AMEDLoad().load("gone.safetensors")


def test_the_node_trains_with_its_cfg_and_seed_and_probes_with_its_prompts(model: Any, monkeypatch: Any) -> None:
    told: dict[str, Any] = {}

    def spy(guider: Any, prompts: Any, shape: Any, settings: AMEDSettings, plan: Plan, *rest: Any) -> Any:
        told.update(cfg=guider.cfg, settings=settings, plan=plan)
        return train(guider, prompts, shape, settings, plan, *rest)

    monkeypatch.setattr(nodes, "train", spy)
    predictor, *_ = run_node(model, cfg=3.0, training_seed=11)["result"]
    assert told["cfg"] == told["settings"].cfg == 3.0 and told["plan"].seed == 11

    def probe(predictor: Any, guider: Any, latent: Any) -> Any:
        shifts = {name: float(conds[0]["cross_attn"].mean()) for name, conds in guider.original_conds.items()}
        told.update(probed=guider.cfg, **shifts)
        return predictor.settings.midpoints

    monkeypatch.setattr(nodes, "probed_midpoints", probe)
    with torch.inference_mode():
        prompts = gaussian_mixture.conditioning(0.3), gaussian_mixture.conditioning(-0.2)
        latent = {"samples": torch.zeros(1, *SHAPE)}
        nodes.AMEDScheduler().sigmas(predictor, model, "expanded", *prompts, latent)
    assert told["probed"] == 3.0
    assert (told["positive"], told["negative"]) == pytest.approx((0.3, -0.2))


def test_the_scheduler_gives_both_kinds_of_points(model: Any) -> None:
    predictor, *_ = run_node(model)["result"]
    with torch.inference_mode():
        scheduler = nodes.AMEDScheduler()
        (base,) = scheduler.sigmas(predictor, model, "base")["result"]
        (mean,) = scheduler.sigmas(predictor, model, "expanded")["result"]
        latent = {"samples": torch.zeros(32, *SHAPE)}
        probe = (gaussian_mixture.conditioning(0.3), gaussian_mixture.conditioning(-0.2), latent)
        (probed,) = scheduler.sigmas(predictor, model, "expanded", *probe)["result"]
        with pytest.raises(ValueError, match="Connect all three"):
            scheduler.sigmas(predictor, model, "expanded", *probe[:2])
    assert base.tolist() == pytest.approx([*predictor.settings.sigmas[:-1], 0.0])
    assert len(mean) == len(probed) == 2 * len(base) - 1 and (mean.diff() < 0).all()
    torch.testing.assert_close(mean[::2], base)
    torch.testing.assert_close(probed, mean, rtol=0.2, atol=0.01)


def test_the_scheduler_says_on_its_node_whether_the_predictor_is_for_this_model(model: Any) -> None:
    predictor = fixed(settings(model))
    other = gaussian_mixture.patcher()
    with torch.inference_mode():
        other.model.diffusion_model.means += 1
    said = {of: nodes.AMEDScheduler().sigmas(predictor, of, "base")["ui"]["text"][0] for of in (model, other)}
    assert "6 model calls" in said[model] and "It was trained for this model." in said[model]
    assert "this model has another model, or the same with other LoRAs" in said[other]
    with pytest.raises(ValueError, match=r"begins at sigma 14\.6\d, and this model ends at 1:.*another kind of model"):
        nodes.AMEDScheduler().sigmas(predictor, gaussian_mixture.patcher("FLOW"), "base")


def test_the_page_is_told_how_far_the_training_is(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(
        nodes.comfy.utils.ProgressBar,
        "update_absolute",
        lambda self, value, total=None, preview=None: told.append((value, total, preview)),
    )
    run_node(model, trajectories=48)
    assert [entry[:2] for entry in told] == [(1, 3), (2, 3), (3, 3)]
    kind, picture, _ = told[-1][2]
    assert kind == "JPEG" and picture.width == 256 and np.asarray(picture)[-30:].max() > 200  # the text


def test_refused_at_the_node(model: Any) -> None:
    with pytest.raises(ValueError, match="no name for a file"):
        run_node(model, name="../mine")
    latent = {"samples": torch.zeros(1, 16, 2, 2)}
    latent["samples"][0, 0, 0, 0] = 1  # an empty one is fitted
    with pytest.raises(ValueError, match="16 channels, and the model's have 4"):
        run_node(model, latent=latent)
    with pytest.raises(ValueError, match=r"rho is -1\.0, and must be a number from 0 to 20"):
        run_node(model, rho=-1.0)


def test_the_predictors_of_toy_portraits_are_of_their_recipe_and_ahead_of_their_student() -> None:
    with torch.inference_mode():
        portraits = toy_portraits.load_model(toy_portraits.WEIGHTS)
    assert {path.stem for path in train_amed.FOLDER.iterdir()} == {
        f"toy_portraits_{name}" for name in train_amed.SHIPPED
    }
    for name in train_amed.SHIPPED:
        student, nfe = name.split("_")
        found = files.load(train_amed.FOLDER / f"toy_portraits_{name}.safetensors").settings
        assert found == settings_for(portraits, **train_amed.recipe(student, int(nfe)))
        assert found.nfe == int(nfe) and found.ratio < 1
