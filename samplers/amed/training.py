"""The distillation that trains a predictor (arXiv 2312.00094, algorithm 1).

A teacher with `teacher_points` more points in each interval gives the state at each time point.

    each point   At each of them the predictor takes a step of Adam on how far its student's state is off the teacher's:
                 as published. A student of one step begins each interval at the teacher's state, one of several steps
                 goes on from its own.
    endpoint     One step of Adam on how far the last state is off, through all of the student's model calls. What is
                 best for one time point is not for those that follow, least where directions are remembered.

EPD's authors (arXiv 2507.14797) too go through all calls where their time points are few, by what Inception sees in the
image; at each point their students go on from their own state, and so do they here.

The last state is taken on to sigma 0, where ComfyUI's samplers end: the teacher's with a model call, the student's
along its last direction.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_flatten

from ... import host
from ..autograd import wants_lenience
from ..kernel import noise_of, per_sample, prepared
from .bottleneck import watched
from .predictor import DELETE, AMEDPredictor, AMEDSettings, fingerprint, load, read, write
from .sampling import base_sigmas, intervals, look, sampled
from .schedules import RHO, time_points
from .students import ORDERS, PARALLEL, AdamsBashforth, Choice, DPMSolverPP, Solver, Student, classical, heun

__all__ = [
    "OBJECTIVES",
    "PUBLISHED",
    "TEACHERS",
    "History",
    "Plan",
    "Progress",
    "settings_for",
    "teacher_states",
    "train",
]

log = logging.getLogger("sphereguide")

TITLE = "Train AMED Predictor"
REMEDY = "Train with a workflow that has none of it."
TEACHERS = ("heun", "ipndm", "dpmpp")
PUBLISHED = "as published"
"""The authors' teacher: Heun with one point more, of ipndm and dpmpp themselves with two. For parallel directions eight
steps of Heun in each interval: theirs has three points more, and takes two steps to each."""
OBJECTIVES = ("endpoint", "each point")
JUDGED = 64
"""Trajectories that are not trained on, by which the best predictor is known; no more than those that are."""
SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Plan:
    """How long and with what to train.

    trajectories    how many different noises; 10 000 in the paper, 5 000 for Stable Diffusion
    epochs          passes over them; with several, the teacher's states are kept in memory
    batch_size      trajectories a step of Adam
    objective       one of OBJECTIVES: a step of Adam for a whole trajectory, or one for each time point
    """

    trajectories: int = 192
    epochs: int = 6
    batch_size: int = 16
    objective: str = "endpoint"
    learning_rate: float = 0.02
    seed: int = 0
    checkpointing: bool = False

    @property
    def iterations(self) -> int:
        return self.epochs * max(1, self.trajectories // self.batch_size)

    @property
    def looks(self) -> int:
        """Iterations between two looks at trajectories that are not trained on."""
        return max(10, self.iterations // 10)


@dataclass
class History:
    """What happened so far.

    losses    of each iteration, the mean RMSE of a sample at each time point
    errors    `(iteration, the same at the end)` on trajectories that are not trained on
    student_error   the same of the student without a predictor
    """

    losses: list[list[float]] = field(default_factory=list)
    errors: list[tuple[int, float]] = field(default_factory=list)
    student_error: float = math.nan


@dataclass(frozen=True)
class Progress:
    """Told after each iteration. `latents`: the student's latest, `[B, …]`."""

    iteration: int
    iterations: int
    history: History
    seconds_left: float
    latents: Tensor

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.seconds_left), 60)
        return (
            f"loss {self.history.losses[-1][-1]:.4g}   {minutes}:{seconds:02} left\n"
            f"error {self.history.errors[-1][1]:.4g}, without predictor {self.history.student_error:.4g}"
        )

    def log(self) -> None:
        if self.iteration % 10 == 0 or self.iteration == self.iterations:
            text = str(self).replace("\n", "   ")
            log.info("%s: %d of %d   %s", TITLE, self.iteration, self.iterations, text)


def settings_for(
    patcher: Any,
    teacher: str,
    teacher_points: int,
    *,
    student: str,
    steps: int,
    schedule: str,
    rho: float,
    max_order: int,
    parallel: int = 2,
    **given: Any,
) -> AMEDSettings:
    """Settings of a predictor for a MODEL, between its sigmas.

    teacher     one of TEACHERS, or "as published", which has points of its own
    rho         0 for that of the schedule
    max_order   at most; a solver has an order of its own
    parallel    1 to 4 directions in an interval, of the students that have several

    Raises ValueError for a schedule that does not fall, and for what else `AMEDSettings` and `time_points` refuse.
    """
    if teacher == PUBLISHED:
        teacher, teacher_points = (student, 2) if student in TEACHERS else ("heun", 7 if student in PARALLEL else 1)
    sampling = patcher.get_model_object("model_sampling")
    rho = rho or RHO.get(schedule, 1.0)
    points = time_points(sampling, schedule, steps, rho, float(sampling.sigma_min), float(sampling.sigma_max))
    return AMEDSettings(
        student,
        schedule,
        rho,
        tuple(points),
        max_order=min(max_order, ORDERS.get(student, max_order)),
        teacher=teacher,
        teacher_points=teacher_points,
        model_hash=fingerprint(patcher),
        parallel=parallel if student in PARALLEL else 0,
        **given,
    )


def train(
    guider: Any,
    prompts: tuple[Any, Any],
    shape: tuple[int, ...],
    settings: AMEDSettings,
    plan: Plan,
    kept: Path | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> tuple[AMEDPredictor, History]:
    """The predictor that did best on trajectories that it was not trained on.

    guider      of the model, with its cfg; its prompts are those of `prompts`
    prompts     positive and negative CONDITIONING; of several entries trajectory i takes entry i mod n
    shape       of one latent, without the batch
    kept        a file for what was reached: a run that was stopped goes on from it, if its settings are the same

    In a process group (`torch.distributed`) each process takes its share of each batch. Raises ValueError for prompts
    that can't share a batch and for plans without a step, RuntimeError where the loss is not finite or the model has no
    gradient; ComfyUI's InterruptProcessingException passes through, and leaves `kept` behind.
    """
    return _Training(guider, prompts, shape, settings, plan, kept, progress).run()


class _Training:
    def __init__(
        self,
        guider: Any,
        prompts: tuple[Any, Any],
        shape: tuple[int, ...],
        settings: AMEDSettings,
        plan: Plan,
        kept: Path | None,
        progress: Callable[[Progress], None],
    ) -> None:
        together = distributed.is_available() and distributed.is_initialized()
        self.rank, self.world = (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)
        if plan.trajectories < plan.batch_size:
            raise ValueError(
                f"{TITLE}: {plan.trajectories} trajectories are less than one batch of {plan.batch_size}. Raise "
                "trajectories, or lower batch_size."
            )
        if plan.epochs < 1 or plan.batch_size % self.world:
            raise ValueError(
                f"no share of {plan.epochs} epochs in batches of {plan.batch_size} for each of {self.world} processes"
            )
        if plan.objective not in OBJECTIVES:
            raise ValueError(f"{TITLE}: there is no objective '{plan.objective}'. There are: {', '.join(OBJECTIVES)}.")
        positive, negative = prompts
        if not positive or (not negative and settings.cfg != 1):
            raise ValueError(f"{TITLE}: there is no {'negative' if positive else 'positive'} prompt. Connect one.")
        self.judged = min(JUDGED, plan.trajectories)
        kept_states = (plan.trajectories if plan.epochs > 1 else 0) + self.judged
        size = kept_states // self.world * settings.steps * math.prod(shape) * 4
        free = comfy.model_management.get_free_memory(torch.device("cpu"))
        if size > free:
            raise ValueError(
                f"{TITLE}: what the teacher gives for {kept_states} trajectories takes {size / 2**30:.3g} GB, and "
                f"{free / 2**30:.3g} GB of memory are free. Lower trajectories, or set epochs to 1, which keeps "
                "nothing."
            )
        self.guider, self.prompts, self.shape, self.plan = guider, prompts, shape, plan
        self.settings, self.kept, self.progress = settings, kept, progress
        self.sigmas = base_sigmas(AMEDPredictor.untrained(settings))
        self.history, self.iteration = History(), 0
        self.endpoint = plan.objective == "endpoint"
        self.lenient = False
        self.seconds = 0.0
        self.teacher_cache: dict[tuple[int, int], list[Tensor]] = {}
        with torch.inference_mode(False):
            self.predictor = AMEDPredictor.untrained(settings, plan.seed)
            self.best = AMEDPredictor.untrained(settings, plan.seed)
            network = self.predictor.network.requires_grad_(True)
            self.optimizer = torch.optim.Adam(network.parameters(), lr=plan.learning_rate, betas=(0.9, 0.999))
            self.network = nn.parallel.DistributedDataParallel(network) if self.world > 1 else network

    # -- the loop

    def run(self) -> tuple[AMEDPredictor, History]:
        self._resume()
        self.reached = self._state()
        try:
            if not self.history.errors:
                self._judge()
                self._keep()  # a folder that can't be written to is known now
            elif self.iteration % self.plan.looks == 0 and self.history.errors[-1][0] != self.iteration:
                self._judge()  # it was stopped in this look
            started, first, saved, earlier = time.monotonic(), self.iteration, time.monotonic(), self.seconds
            while self.iteration < self.plan.iterations:
                losses, latents = self._iterate(self._batch(self.iteration))
                self.history.losses.append(losses)
                self.iteration += 1
                self.reached = self._state()
                if self.iteration % self.plan.looks == 0:
                    self._judge()
                passed = time.monotonic() - started
                self.seconds = earlier + passed
                left = passed / (self.iteration - first) * (self.plan.iterations - self.iteration)
                self.progress(Progress(self.iteration, self.plan.iterations, self.history, left, latents))
                if time.monotonic() - saved > SAVE_SECONDS:
                    self._keep()
                    saved = time.monotonic()
            if self.history.errors[-1][0] != self.iteration:
                self._judge()
        finally:
            if self.history.errors:
                self._keep()
        return self._result(), self.history

    def _result(self) -> AMEDPredictor:
        trained = min(self.iteration, self.plan.iterations // self.plan.epochs) * self.plan.batch_size
        return replace(self.best, settings=replace(self.best.settings, trajectories=trained, seconds=self.seconds))

    def _batch(self, iteration: int) -> list[int]:
        """Which trajectories: each of those that fill batches once an epoch; of those this process's part."""
        each = self.plan.iterations // self.plan.epochs
        epoch, place = divmod(iteration, each)
        generator = torch.Generator().manual_seed(self.plan.seed * 1000 + epoch)
        order = torch.randperm(each * self.plan.batch_size, generator=generator).tolist()
        return order[place * self.plan.batch_size : (place + 1) * self.plan.batch_size][self.rank :: self.world]

    def _iterate(self, batch: list[int]) -> tuple[list[float], Tensor]:
        """The loss at each time point, and the student's latents."""
        try:
            losses, latents = self._run(0, batch, self._learn)
        except RuntimeError as error:
            if self.lenient or not wants_lenience(error):
                raise
            self.lenient = True  # as guidance does: slower, but works
            self._restore(self.reached)
            losses, latents = self._run(0, batch, self._learn)
        return [self._mean(loss) for loss in losses], latents

    def _run(self, stage: int, batch: list[int], function: Callable[..., Any]) -> Any:
        """`function(model, x, extra_args, recording, targets)` where a sampler would run, on noises of the stage."""
        noise = torch.stack([noise_of(self.shape, self.plan.seed, stage, i) for i in batch])
        self.guider.set_conds(*(_of_samples(conditioning, batch) for conditioning in self.prompts))
        result = []

        def sample(
            model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any = None, disable: Any = None
        ) -> Tensor:
            calls = self.settings.calls
            graphs = calls * self.settings.steps - 1 if self.endpoint else calls - 1
            options = (TITLE, REMEDY, "full", self.plan.checkpointing)
            with prepared(model, x, extra_args, *options, graphs=graphs) as (recording, extra_args, _):
                x = x.clone()  # no inference tensor, out here
                targets = self._targets(stage, batch, model, x, extra_args)
                result.append(function(model, x, extra_args, recording, targets))
            return x

        latent = torch.zeros_like(noise)
        self.guider.sample(noise, latent, host.Probe(sample), self.sigmas, disable_pbar=True, seed=self.plan.seed)
        return result[0]

    def _targets(self, stage: int, batch: list[int], model: Any, x: Tensor, extra_args: Any) -> list[Tensor]:
        keys = [(stage, i) for i in batch]
        if not all(key in self.teacher_cache for key in keys):
            states = teacher_states(self.settings, model, x, extra_args)
            if self.plan.epochs == 1 and stage == 0:
                return states
            for i, key in enumerate(keys):
                self.teacher_cache[key] = [state[i].cpu() for state in states]
        kept = [self.teacher_cache[key] for key in keys]
        return [torch.stack(states).to(x) for states in zip(*kept, strict=True)]

    def _learn(
        self, model: Any, x: Tensor, extra_args: Any, recording: Any, targets: list[Tensor]
    ) -> tuple[list[float], Tensor]:
        settings, losses = self.settings, []
        steps = intervals(self.sigmas.tolist(), self.predictor)
        student = Student(settings.student, settings.max_order, len(steps))
        base_model, prompts = host.base_model(model), host.guider(model).conds
        seen = None if settings.parallel else base_model.diffusion_model
        checkpointed = base_model.diffusion_model if self.plan.checkpointing else None
        with (
            watched(seen, extra_args.get("model_options", {}), prompts) as (bottleneck, options),
            _smooth_timesteps(base_model.model_sampling),
        ):
            ask = functools.partial(model, **{**extra_args, "model_options": options})
            scope = functools.partial(recording, self.lenient, checkpointed)
            # The graph of a whole trajectory, or of one interval after the other.
            whole, one = (scope, contextlib.nullcontext) if self.endpoint else (contextlib.nullcontext, scope)
            with whole():
                for i, (step, target) in enumerate(zip(steps, targets, strict=True)):
                    comfy.model_management.throw_exception_if_processing_interrupted()
                    t, t_next = (x.new_full((len(x),), value, dtype=torch.float32) for value in (step.t, step.t_next))
                    denoised, features = look(base_model, bottleneck, ask, x, t, settings.afs and i == 0)
                    with one():
                        chosen = self.network(features.cpu(), t.cpu(), t_next.cpu())
                        choice = Choice(*(value.to(x.device) for value in chosen))
                        x, d_mid = student.advance(x, t, t_next, choice, denoised, ask)
                        if step.last:
                            x = x - per_sample(t_next, x) * d_mid
                        loss = _distances(x, target).mean()
                        if not self.endpoint or step.last:
                            self._descend(loss, step.t, 2.0 ** round(math.log2(x.numel())))
                    losses.append(float(loss.detach()))
                    drawn = x.detach()
                    if not self.endpoint:
                        student.detach()
                        x = drawn if settings.student in ("ipndm", "dpmpp", *PARALLEL) else target
        return losses, drawn

    def _descend(self, loss: Tensor, sigma: float, scale: float) -> None:
        if not loss.requires_grad:
            raise RuntimeError(f"{TITLE}: this model runs without gradients here. {REMEDY}")
        self.optimizer.zero_grad()
        (loss * scale).backward()  # or half precision would lose it: a mean over so many numbers begins that small
        for parameter in self.network.parameters():
            parameter.grad /= scale
        self._step(float(loss.detach()), sigma)

    def _step(self, loss: float, sigma: float) -> None:
        gradients = [parameter.grad for parameter in self.predictor.network.parameters()]
        if not math.isfinite(loss) or not all(gradient.isfinite().all() for gradient in gradients):
            raise RuntimeError(
                f"{TITLE}: the loss at sigma {sigma:.3g} or its gradient is not finite (loss {loss:g}). Look at what "
                "the model gives with the same prompts and cfg in a KSampler; run it in fp32 or bf16 if that is black."
            )
        # Falls to 0 as a cosine: at a constant rate the noise of small batches stays in the choices.
        way = self.iteration / self.plan.iterations
        self.optimizer.param_groups[0]["lr"] = self.plan.learning_rate * (1 + math.cos(math.pi * way)) / 2
        self.optimizer.step()

    # -- what it is judged by

    def _judge(self) -> None:
        """On trajectories that are not trained on; keeps the predictor if it is the best."""
        if not self.history.errors:
            self.history.student_error, _ = self._error(None)
        error, midpoints = self._error(self.predictor)
        if not self.history.errors or error < min(e for _, e in self.history.errors):
            with torch.inference_mode(False):
                self.best.network.load_state_dict(self.predictor.network.state_dict())
            changed = {"error": error, "student_error": self.history.student_error, "midpoints": midpoints}
            self.best = replace(self.best, settings=replace(self.settings, **changed))
        self.history.errors.append((self.iteration, error))

    def _error(self, chooser: Callable[..., Choice] | None) -> tuple[float, tuple[float, ...]]:
        """Mean distance at the end, mean t_mid of each interval; without a chooser those of the student alone."""
        mine = list(range(max(1, self.judged // self.world) * self.world))[self.rank :: self.world]
        found, middles = [], []

        def function(model: Any, x: Tensor, extra_args: Any, recording: Any, targets: list[Tensor]) -> None:
            def choose(features: Tensor, t: Tensor, t_next: Tensor) -> Choice:
                choice = chooser(features, t, t_next) if chooser is not None else classical(x, self.settings.parallel)
                middles.append(choice.middle(t, t_next))
                return choice

            latents = sampled(self.predictor, choose, model, x, self.sigmas, extra_args)
            found.append(_distances(latents, targets[-1]))

        for start in range(0, len(mine), self.plan.batch_size):
            self._run(1, mine[start : start + self.plan.batch_size], function)
        each = [torch.cat(middles[i :: self.settings.steps]) for i in range(self.settings.steps)]
        means = tuple(self._mean(float(middle.mean())) for middle in each)
        return self._mean(float(torch.cat(found).mean())), means

    def _mean(self, value: float) -> float:
        """Over the processes."""
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        distributed.all_reduce(total)
        return float(total) / self.world

    # -- what stays when it is stopped

    def _state(self) -> dict[str, Tensor]:
        """The network, and Adam's moments: after an iteration, never within one."""
        state = {f"network.{name}": value for name, value in self.predictor.network.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"adam.{i}.{name}": value for name, value in moments.items()}
        return {name: value.detach().clone() for name, value in state.items()}

    def _restore(self, state: dict[str, Tensor]) -> None:
        with torch.inference_mode(False):
            network = {name[8:]: value for name, value in state.items() if name.startswith("network.")}
            self.predictor.network.load_state_dict(network)
            moments: dict[int, dict[str, Tensor]] = {}
            for name, value in state.items():
                if name.startswith("adam."):
                    _, i, what = name.split(".")
                    moments.setdefault(int(i), {})[what] = value.clone()  # no inference tensor, out here
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})

    def _keep(self) -> None:
        if self.kept is not None and self.rank == 0:
            header = {"what": self._what(), "iteration": self.iteration, "history": asdict(self.history)}
            write(self._result(), self.kept, self.reached, header)

    def _what(self) -> dict[str, Any]:
        """What is trained beside the settings of the predictor: another is another training."""
        return {"plan": asdict(self.plan), "shape": list(self.shape), "prompts": digest(self.prompts)}

    def _resume(self) -> None:
        if self.kept is None or not self.kept.exists():
            return
        best = load(self.kept, TITLE)
        state, header = read(self.kept, TITLE)
        if best.settings != self.settings or header.get("what") != self._what():
            aside = self.kept.with_suffix(".before")
            log.warning(
                "%s: %s is of a training with other settings, prompts or size, and goes to %s. This one begins anew.",
                TITLE,
                self.kept.name,
                aside.name,
            )
            if self.rank == 0:
                self.kept.replace(aside)
            return
        try:
            history = header["history"]
            errors = [(int(i), float(error)) for i, error in history["errors"]]
            losses = [[float(loss) for loss in each] for each in history["losses"]]
            self.history = History(losses, errors, float(history["student_error"]))
            self.iteration = len(losses)
            if not errors or header["iteration"] != self.iteration or not 0 <= self.iteration <= self.plan.iterations:
                raise ValueError(f"it says that it is at iteration {header['iteration']}")
            self._restore(state)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
            raise ValueError(
                f"{TITLE}: the training in {self.kept} can't be gone on with. {DELETE} ({' '.join(str(error).split())})"
            ) from error
        self.best, self.seconds = best, best.settings.seconds
        log.info("%s: goes on at iteration %d of %d.", TITLE, self.iteration, self.plan.iterations)


def digest(value: Any) -> str:
    """A hash of a CONDITIONING, or of what else is made of containers, tensors and numbers."""
    sha = hashlib.sha256()
    leaves, structure = tree_flatten(value)
    sha.update(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            sha.update(f"{tuple(leaf.shape)}".encode())
            sha.update(leaf.detach().float().cpu().contiguous().numpy().tobytes())
        elif isinstance(leaf, str | int | float | bool | None):
            sha.update(repr(leaf).encode())
        else:
            sha.update(type(leaf).__name__.encode())  # a ControlNet and its like
    return sha.hexdigest()[:16]


def teacher_states(settings: AMEDSettings, model: Any, x: Tensor, extra_args: dict[str, Any]) -> list[Tensor]:
    """The teacher's states `[B, …]` at the time points after the first, for x at the first; the last at sigma 0."""
    per = settings.teacher_points + 1
    sampling = host.base_model(model).model_sampling
    ends = (settings.sigmas[-1], settings.sigmas[0])
    fine = time_points(sampling, settings.schedule, settings.steps * per, settings.rho, *ends)
    ask = functools.partial(model, **extra_args)
    solver: Solver | None = None
    if settings.teacher != "heun":
        solver = AdamsBashforth(4) if settings.teacher == "ipndm" else DPMSolverPP(3, settings.steps * per)
    states = []
    with torch.no_grad():
        for i, (sigma, sigma_next) in enumerate(itertools.pairwise(fine), 1):
            comfy.model_management.throw_exception_if_processing_interrupted()
            t, t_next = (x.new_full((len(x),), value, dtype=torch.float32) for value in (sigma, sigma_next))
            x = heun(x, t, t_next, ask) if solver is None else solver.advance(x, t, t_next, ask(x, t))
            if i % per == 0:
                states.append(x)
        states[-1] = ask(x, t_next)
    return states


def _distances(x: Tensor, target: Tensor) -> Tensor:
    """RMSE of each sample `[B]`: not squared, or a few that end in another picture would outweigh all others."""
    return ((x - target).square().flatten(1).mean(1) + 1e-12).sqrt()


def _of_samples(conditioning: Any, batch: list[int]) -> Any:
    """The CONDITIONING in which sample k has the prompt of trajectory `batch[k]`.

    Raises ValueError for prompts that can't share a batch.
    """
    if len(conditioning) < 2:
        return conditioning
    chosen = [conditioning[i % len(conditioning)] for i in batch]
    lengths = [tokens.shape[1] for tokens, _ in chosen]
    longest = math.lcm(*lengths)
    if longest > 4 * min(lengths):  # ComfyUI's own limit
        raise ValueError(
            f"{TITLE}: the prompts are of {min(lengths)} to {max(lengths)} tokens, and can't share a batch. Take "
            "prompts of one length, or a single one."
        )
    # Repeated tokens change nothing for cross-attention: ComfyUI itself brings prompts to one length so.
    tokens = torch.cat([tokens.repeat(1, longest // tokens.shape[1], 1) for tokens, _ in chosen])
    options: dict[str, Any] = {}
    for name, first in chosen[0][1].items():
        values = [entry.get(name) for _, entry in chosen]
        if isinstance(first, Tensor) and all(isinstance(v, Tensor) and v.shape == first.shape for v in values):
            options[name] = torch.cat(values)
        elif len({digest(value) for value in values}) == 1:
            options[name] = first
        else:
            raise ValueError(
                f"{TITLE}: the prompts differ in '{name}', and can't share a batch. Combine prompts of the same kind, "
                "without areas, masks or ControlNets of their own."
            )
    if any(entry.keys() != options.keys() for _, entry in chosen):
        raise ValueError(
            f"{TITLE}: the prompts are of different kinds, and can't share a batch. Make all with the same nodes."
        )
    return [[tokens, options]]


@contextlib.contextmanager
def _smooth_timesteps(sampling: Any) -> Iterator[None]:
    """Within the block the model's timestep has a gradient with respect to sigma.

    Models with discrete noise levels round it to whole steps. Its value stays as they see it while sampling; its slope
    is that over a tenth of log sigma on both sides.
    """
    rounded, own = sampling.timestep, vars(sampling).get("timestep")

    def timestep(sigma: Tensor) -> Tensor:
        value = rounded(sigma)
        if not sigma.requires_grad or value.requires_grad:
            return value
        width, log_sigma = 0.1, sigma.log()
        above, below = (rounded(sigma.detach() * math.exp(side)) for side in (width, -width))
        return value + (above - below) / (2 * width) * (log_sigma - log_sigma.detach())

    sampling.timestep = timestep
    try:
        yield
    finally:
        del sampling.timestep
        if own is not None:
            sampling.timestep = own
