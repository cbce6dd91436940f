"""EPD-Solver and its plugin: students of AMED's training whose steps follow the mean of several directions."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import comfy.samplers
import gaussian_mixture
import pytest
import tiny_models
import torch
from safetensors.torch import save_file
from sphereguide.demo import train_amed
from sphereguide.nodes import amed as nodes
from sphereguide.samplers.amed import predictor as files
from sphereguide.samplers.amed import training
from sphereguide.samplers.amed.predictor import AMEDPredictor, AMEDSettings, PredictorTable
from sphereguide.samplers.amed.sampling import amed_sampler, base_sigmas, expanded_sigmas
from sphereguide.samplers.amed.schedules import time_points
from sphereguide.samplers.amed.students import PARALLEL, classical
from sphereguide.samplers.amed.training import Plan
from sphereguide.samplers.kernel import noise_of
from test_amed import KINDS, SHAPE, Interrupted, fixed, run_node, sample, settings, stock, stop_at, trained
from torch import Tensor

WEIGHT = 3
"""Where the weights are in a table."""


@pytest.fixture(scope="module")
def model() -> Any:
    return gaussian_mixture.patcher()


def of(model: Any, student: str = "epd", parallel: int = 2, **changed: Any) -> AMEDSettings:
    return settings(model, student, **{"parallel": parallel, "scale_dir": 0.1, "scale_time": 0.2, **changed})


def untrained(settings: AMEDSettings) -> AMEDPredictor:
    return AMEDPredictor.untrained(settings)


def learnt(settings: AMEDSettings, seed: int = 0) -> AMEDPredictor:
    """A predictor with a table of any numbers."""
    predictor, generator = untrained(settings), torch.Generator().manual_seed(seed)
    with torch.inference_mode(False):
        predictor.network.table += 0.1 * torch.randn(predictor.network.table.shape, generator=generator)
    return predictor


def numbers(predictor: AMEDPredictor) -> tuple[Tensor, ...]:
    """r, scale_dir, scale_time and λ, `[steps, K]` each."""
    t = torch.tensor(predictor.settings.sigmas)
    return predictor.network(torch.zeros(len(t) - 1, 64), t[:-1], t[1:])


# -- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [1, 2, 3, 4])
def test_its_numbers_stay_within_their_ranges_and_are_those_of_each_interval(model: Any, parallel: int) -> None:
    predictor = learnt(of(model, parallel=parallel, steps=4))
    with torch.inference_mode(False):
        predictor.network.table *= 5
    r, scale_dir, scale_time, weight = numbers(predictor)
    assert r.shape == scale_dir.shape == scale_time.shape == weight.shape == (4, parallel)
    assert ((r >= 0) & (r <= 1)).all() and len(set(r[:, 0].tolist())) == 4
    assert ((scale_dir - 1).abs() <= 0.1).all() and ((scale_time - 1).abs() <= 0.2).all()
    torch.testing.assert_close(weight.sum(1), torch.ones(4))
    assert [values.shape for values in predictor.network.parameters()] == [(4, 4, parallel)]
    # sigmas that went through another precision are of the same interval
    near = torch.tensor(predictor.settings.sigmas[1:2]) * 1.0005
    torch.testing.assert_close(predictor.network(torch.zeros(1, 64), near, near)[0], r[1:2])


@pytest.mark.parametrize("parallel", [1, 2, 3, 4])
def test_it_begins_as_the_classical_solver(model: Any, parallel: int) -> None:
    start, solver = numbers(untrained(of(model, parallel=parallel))), classical(torch.ones(3), parallel)
    for value, expected in zip(start, (solver.r, solver.scale_dir, solver.scale_time, solver.weight), strict=True):
        torch.testing.assert_close(value, expected)
    between = [k / (parallel + 1) for k in range(1, parallel + 1)]
    assert solver.r[0].tolist() == pytest.approx(between) and solver.weight is not None


# -- the student -------------------------------------------------------------------------------------------------------

ADAMS = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


def plain_loop(model: Any, predictor: AMEDPredictor, x: Tensor) -> list[Tensor]:
    """The states at the time points, by the paper's formula on the mixture's own denoiser."""
    s, network, sampling = predictor.settings, model.model.diffusion_model, model.model.model_sampling
    flow = float(sampling.sigma_max) == 1

    def epsilon(x: Tensor, told: float, t: float) -> Tensor:
        """(x − D(x, told))/t."""
        one = torch.ones(len(x))
        return (x - network(x, told * one, 0.3 * one, (1 - told if flow else 1.0) * one)) / t

    states, past = [x], []
    table = [value.tolist() for value in numbers(predictor)]
    for i, (t, t_next) in enumerate(pairwise(s.sigmas)):
        d = epsilon(x, t, t)
        if s.afs and i == 0:
            d = x / math.hypot(1 - t if flow else 1, t)
        past.insert(0, d)
        order = min(len(past), s.max_order)
        slope = sum(a * d for a, d in zip(ADAMS[order], past, strict=False))
        moved = x
        for r, scale_dir, scale_time, weight in zip(*(value[i] for value in table), strict=True):
            tau = t_next**r * t ** (1 - r)
            there = x + (tau - t) * slope
            moved = moved + (t_next - t) * weight * scale_dir * epsilon(there, scale_time * tau, tau)
        x = moved
        states.append(x)
    return states


@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
@pytest.mark.parametrize("student", PARALLEL)
@pytest.mark.parametrize("parallel", [1, 2, 4])
@pytest.mark.parametrize("afs", [False, True])
def test_it_is_the_papers_formula(kind: str, student: str, parallel: int, afs: bool) -> None:
    model = gaussian_mixture.patcher(kind)
    predictor = learnt(of(model, student, parallel, steps=5, afs=afs))
    states: list[Tensor] = []
    last = sample(
        model,
        amed_sampler(predictor),
        torch.tensor(predictor.settings.sigmas),
        callback=lambda step, denoised, x, total: states.append(x.clone()),
    )
    with torch.inference_mode():
        expected = plain_loop(model, predictor, states[0])
    for state, own in zip(expected[:-1], states, strict=True):
        torch.testing.assert_close(own, state, rtol=1e-4, atol=1e-4)
    # what KSAMPLER gives back of a run that does not end at 0
    scale = 1 / (1 - predictor.settings.sigmas[-1]) if kind == "FLOW" else 1
    torch.testing.assert_close(last, scale * expected[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_one_direction_at_the_geometric_mean_is_dpm_solver_2(kind: str, cfg: float) -> None:
    model = gaussian_mixture.patcher(kind)
    predictor = untrained(of(model, parallel=1))
    sigmas = torch.tensor(predictor.settings.sigmas)
    own = sample(model, amed_sampler(predictor), sigmas, cfg=cfg)
    torch.testing.assert_close(own, sample(model, stock("dpm_2"), sigmas, cfg=cfg), rtol=1e-4, atol=1e-4)


def test_one_direction_of_all_weight_is_amed(model: Any) -> None:
    predictor = learnt(of(model, parallel=3, steps=1))
    with torch.inference_mode(False):
        predictor.network.table[WEIGHT] = torch.tensor([-9.0, 9.0, -9.0])
    values = [float(value[0, 1]) for value in numbers(predictor)[:3]]
    own = sample(model, amed_sampler(predictor), base_sigmas(predictor))
    amed = fixed(settings(model, "amed", steps=1), *values)
    torch.testing.assert_close(own, sample(model, amed_sampler(amed), base_sigmas(amed)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("student", PARALLEL)
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("parallel", [1, 2, 4])
def test_parallel_calls_count_as_what_they_cost(model: Any, student: str, afs: bool, parallel: int) -> None:
    predictor = learnt(of(model, student, parallel, afs=afs))
    before = model.model.calls
    latents = sample(model, amed_sampler(predictor), base_sigmas(predictor))
    assert model.model.calls - before == predictor.settings.nfe == 3 * (1 + parallel) - afs
    assert latents.isfinite().all()


@pytest.mark.parametrize("student", PARALLEL)
def test_each_of_a_batch_is_as_it_is_alone(model: Any, student: str) -> None:
    predictor, noise = learnt(of(model, student)), noise_of((3, *SHAPE), 5)
    together = sample(model, amed_sampler(predictor), base_sigmas(predictor), cfg=3.0, noise=noise)
    for i in range(3):
        one = {"batch": 1, "noise": noise[i : i + 1], "cfg": 3.0}
        alone = sample(model, amed_sampler(predictor), base_sigmas(predictor), **one)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("student", PARALLEL)
def test_a_mask_keeps_what_it_covers(kind: str, student: str, afs: bool) -> None:
    model = gaussian_mixture.patcher(kind)
    predictor = learnt(of(model, student, 3, afs=afs))
    latent = torch.linspace(-1, 1, 2 * math.prod(SHAPE)).reshape(2, *SHAPE)
    mask = torch.zeros(2, 1, 2, 2)
    mask[0, ..., 0] = mask[1, ..., 1] = 1
    found = sample(model, amed_sampler(predictor), base_sigmas(predictor), 2, latent=latent, denoise_mask=mask)
    kept = (mask == 0).expand_as(found)
    torch.testing.assert_close(found[kept], latent[kept], rtol=0, atol=2e-5)
    assert (found - latent)[~kept].abs().mean() > 0.1


@pytest.mark.parametrize("student", PARALLEL)
def test_a_part_of_its_schedule_is_sampled_as_it_was_learnt(model: Any, student: str, caplog: Any) -> None:
    whole = learnt(of(model, student))
    alone = learnt(replace(whole.settings, sigmas=whole.settings.sigmas[1:]))
    with torch.inference_mode(False):
        alone.network.table[:] = whole.network.table[:, 1:]
    run = {"sigmas": base_sigmas(whole)[1:], "latent": torch.ones(3, *SHAPE)}
    with caplog.at_level(logging.WARNING, "sphereguide"):
        part = sample(model, amed_sampler(whole), **run)
    assert not caplog.records
    assert torch.equal(part, sample(model, amed_sampler(alone), **run))
    assert (part - sample(model, amed_sampler(untrained(whole.settings)), **run)).abs().max() > 1e-3


def test_steps_of_another_schedule_are_those_of_the_classical_solver(model: Any, caplog: Any) -> None:
    predictor = learnt(of(model))
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "normal", 4)
    before = model.model.calls
    with caplog.at_level(logging.WARNING, "sphereguide"):
        found = sample(model, amed_sampler(predictor), sigmas)
    assert "these steps are not the predictor's" in caplog.text and model.model.calls - before == 4 * 3
    assert torch.equal(found, sample(model, amed_sampler(untrained(predictor.settings)), sigmas))


def test_expanded_sigmas_have_the_weighted_mean_of_its_times(model: Any) -> None:
    predictor = learnt(of(model, parallel=3))
    with torch.inference_mode():
        latent = torch.zeros(2, *SHAPE)
        probe = (gaussian_mixture.conditioning(0.3), gaussian_mixture.conditioning(-0.2), {"samples": latent})
        (sigmas,) = nodes.AMEDScheduler().sigmas(predictor, model, "expanded", *probe)["result"]
    r, _, _, weight = numbers(predictor)
    t, t_next = (
        torch.tensor(part)[:, None] for part in (predictor.settings.sigmas[:-1], predictor.settings.sigmas[1:])
    )
    means = (weight * t_next**r * t ** (1 - r)).sum(1)
    torch.testing.assert_close(sigmas, expanded_sigmas(predictor, tuple(means.tolist())))
    assert (sigmas.diff() < 0).all()


def test_it_looks_at_no_bottleneck(caplog: Any) -> None:
    """So that it has nothing to say where the model is called in pieces."""
    unet = tiny_models.sd15()

    def tiles(apply_model: Any, parameters: dict[str, Any]) -> Tensor:
        x, timestep, c = parameters["input"], parameters["timestep"], parameters["c"]
        assert not unet.model.diffusion_model.middle_block[-1]._forward_hooks
        return torch.cat([apply_model(part.contiguous(), timestep, **c) for part in x.chunk(2, -1)], -1)

    unet.set_model_unet_function_wrapper(tiles)
    predictor = learnt(of(unet, cfg=3.0))
    conds = (tiny_models.conditioning(), tiny_models.conditioning(seed=2))
    with caplog.at_level(logging.WARNING, "sphereguide"):
        found = sample(unet, amed_sampler(predictor), base_sigmas(predictor), 2, 3.0, lambda: conds, (4, 16, 16))
    assert "pieces" not in caplog.text and found.isfinite().all()


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("student", PARALLEL)
def test_a_file_holds_all_that_sampling_needs(model: Any, tmp_path: Path, student: str) -> None:
    path = tmp_path / "mine.safetensors"
    predictor = learnt(replace(of(model, student, 3), error=0.1, student_error=0.4))
    files.save(predictor, path)
    with torch.inference_mode():
        loaded = files.load(path)
    assert loaded.settings == predictor.settings and isinstance(loaded.network, PredictorTable)
    sigmas = base_sigmas(predictor)
    assert torch.equal(sample(model, amed_sampler(predictor), sigmas), sample(model, amed_sampler(loaded), sigmas))
    assert (
        loaded.about() == f"{student} of 3, 12 model calls, cfg 1, 0 trajectories, error 0.1 (25% of {student}'s own)"
    )


def test_files_of_before_still_load() -> None:
    path = train_amed.FOLDER / "toy_portraits_ipndm_6.safetensors"
    header = json.loads(files._open(path, "", training=False)[1]["settings"])
    assert "parallel" not in header and files.load(path).settings.parallel == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallel": 0}, "parallel is 0, and for epd must be from 1 to 4"),
        ({"parallel": -1}, "parallel is -1"),
        ({"parallel": 5}, "parallel is 5"),
        ({"parallel": 10**30}, "parallel is 10{30}, and for epd"),
        ({"parallel": math.inf}, "infinity"),
        ({"parallel": "two"}, "invalid literal"),
        ({"parallel": None}, "NoneType"),
        ({"student": "ipndm"}, "parallel is 2, and for ipndm must be from 0 to 0"),
        ({"student": "ipndm", "parallel": 0}, "Missing key"),  # a table for a network
        ({"parallel": 3}, "size mismatch"),
        ({"sigmas": [9.0, 3.0, 1.0]}, "size mismatch"),
        ({"max_order": 4}, "the order of epd is 1 to 1, and not 4"),
    ],
    ids=str,
)
def test_headers_that_do_not_fit_are_refused(model: Any, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path, predictor = tmp_path / "mine.safetensors", learnt(of(model))
    weights = {name: value.contiguous() for name, value in predictor.network.state_dict().items()}
    text = json.dumps(asdict(predictor.settings) | changes)
    save_file(weights, path, {"format": files.FORMAT, "settings": text})
    with pytest.raises(ValueError, match=rf"Load AMED Predictor: .* does not fit this version .*{words}"):
        files.load(path)


def test_a_table_without_numbers_is_refused(model: Any, tmp_path: Path) -> None:
    path, predictor = tmp_path / "mine.safetensors", learnt(of(model))
    with torch.inference_mode(False):
        predictor.network.table[WEIGHT, 1, 0] = math.nan
    files.save(predictor, path)
    with pytest.raises(ValueError, match="not finite"):
        files.load(path)


# -- training ----------------------------------------------------------------------------------------------------------


def errors(model: Any, *predictors: AMEDPredictor) -> list[float]:
    """RMSE to 300 steps of Heun's method, without the tenth that is sent to another mode of the mixture."""
    sampling = model.model.model_sampling
    ends = (float(sampling.sigma_min), float(sampling.sigma_max))
    fine = torch.tensor([*time_points(sampling, "polynomial", 300, 7.0, *ends), 0.0])
    truth = sample(model, stock("heun"), fine, 256)
    found = []
    for one in predictors:
        distances = (sample(model, amed_sampler(one), base_sigmas(one), 256) - truth).square().flatten(1).mean(1).sqrt()
        found.append(float(distances.sort()[0][:-25].mean()))
    return found


@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
@pytest.mark.parametrize("student", PARALLEL)
def test_a_trained_table_is_nearer_to_the_true_ode(kind: str, student: str) -> None:
    model = gaussian_mixture.patcher(kind)
    chosen = of(model, student, 2, steps=2, points=7)
    predictor, _ = trained(model, chosen, trajectories=768, batch_size=32, learning_rate=0.02)
    before, after = errors(model, untrained(chosen), predictor)
    assert after < 0.4 * before, (before, after)
    r, _, _, weight = numbers(predictor)
    assert ((r > 0) & (r < 1)).all() and (weight > 0).all()


@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
def test_students_of_six_model_calls(kind: str) -> None:
    """What the help page says of them. Parallel calls count as what they cost."""
    model = gaussian_mixture.patcher(kind)
    students = {
        "amed": settings(model, "amed", points=7, scale_dir=0.1, scale_time=0.2),
        "ipndm": settings(model, "ipndm", points=7, scale_dir=0.1, scale_time=0.2),
        "one": of(model, parallel=1, points=7),
        "two": of(model, parallel=2, steps=2, points=7),
    }
    assert {chosen.nfe for chosen in students.values()} == {6}
    plan = {"trajectories": 1536, "batch_size": 32, "learning_rate": 0.02}
    found = errors(model, *(trained(model, chosen, **plan)[0] for chosen in students.values()))
    error = dict(zip(students, found, strict=True))
    assert error["one"] < 1.3 * error["amed"], error
    if kind == "EPS":
        assert error["ipndm"] < 0.4 * min(error["one"], error["two"]), error
    else:
        assert error["one"] < 0.8 * min(error["amed"], error["two"]), error


def test_each_point_is_learnt_too(model: Any) -> None:
    chosen = of(model, points=7)
    _, history = trained(model, chosen, trajectories=1024, batch_size=32, objective="each point")
    assert history.errors[-1][1] < 0.8 * history.student_error


def test_the_gradient_of_the_loss_is_that_of_finite_differences() -> None:
    """With respect to a number of each kind, through all model calls of a trajectory."""
    model = gaussian_mixture.patcher()
    chosen = of(model, "epd_ipndm", points=3)
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(model)
        prompts = (gaussian_mixture.conditioning(0.3), gaussian_mixture.conditioning(-0.2))
        run = training._Training(guider, prompts, SHAPE, chosen, Plan(16), None, lambda _: None)
    table, found = run.predictor.network.table, []
    run._step = lambda loss, sigma: found.append(table.grad[:, 1, 0].tolist())

    def loss(row: int, moved: float) -> float:
        with torch.inference_mode(False), torch.no_grad():
            table[row, 1, 0] += moved
        with torch.inference_mode():
            return run._iterate(list(range(16)))[0][-1]

    h = 1e-3
    for row in range(4):
        above, below, _ = loss(row, h), loss(row, -2 * h), loss(row, h)
        slope = (above - below) / (2 * h)
        assert found[-1][row] == pytest.approx(slope, rel=0.05) and abs(slope) > 1e-3, row


def test_a_training_that_was_cancelled_goes_on_to_the_same_bits(model: Any, tmp_path: Path) -> None:
    chosen, kept = of(model, "epd_ipndm", steps=2), tmp_path / "mine.training.safetensors"
    whole, history = trained(model, chosen, trajectories=240)
    with pytest.raises(Interrupted):
        trained(model, chosen, kept, trajectories=240, progress=stop_at(12))
    assert files.load(kept).settings.trajectories == 12 * 16
    again, resumed = trained(model, chosen, kept, trajectories=240)
    assert resumed == history and again.settings == whole.settings
    for a, b in zip(again.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(a, b) and not a.requires_grad


@pytest.mark.parametrize("objective", training.OBJECTIVES)
def test_a_transformer_is_taught_and_drawn_with(tmp_path: Path, objective: str) -> None:
    """An MMDiT, with CFG and two prompts that take turns."""
    architecture = tiny_models.ARCHITECTURES["SD 3"]
    dit = architecture.patcher()
    chosen = of(dit, "epd", 2, steps=2, points=2, cfg=3.0)
    prompts = ([*architecture.prompt(1), *architecture.prompt(2)], architecture.prompt(3))
    kept = tmp_path / "kept.safetensors"
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(dit)
        guider.set_cfg(3.0)
        plan = Plan(trajectories=16, epochs=2, batch_size=4, objective=objective)
        predictor, history = training.train(guider, prompts, architecture.shape, chosen, plan, kept)
    assert predictor.settings.error < history.student_error
    assert any((v - u).abs().max() > 0 for v, u in zip(numbers(predictor), numbers(untrained(chosen)), strict=True))
    conds: Callable[[], Any] = lambda: (architecture.prompt(1), architecture.prompt(3))  # noqa: E731
    found = sample(dit, amed_sampler(files.load(kept)), base_sigmas(predictor), 2, 3.0, conds, architecture.shape)
    assert found.isfinite().all()


# -- the node ----------------------------------------------------------------------------------------------------------


def test_the_node_teaches_as_many_directions_as_it_is_told(model: Any) -> None:
    predictor, _, report = run_node(model, student="epd", parallel=3)["result"]
    assert predictor.settings.parallel == 3 and "epd with 8 model calls" in report
    assert run_node(model, student="ipndm", parallel=3)["result"][0].settings.parallel == 0
    published = run_node(model, student="epd", teacher=training.PUBLISHED)["result"][0].settings
    assert (published.teacher, published.teacher_points, published.parallel) == ("heun", 7, 2)
    with pytest.raises(ValueError, match="parallel is 5, and must be a number from 1 to 4"):
        run_node(model, student="epd", parallel=5)
