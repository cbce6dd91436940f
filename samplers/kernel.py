"""What guidance methods share: a sampler whose model calls come with the gradient of a loss.

A sampler asks its model for x̂₀ at each step. `GuidedModel` answers, and keeps L(x̂₀) and ∇L of its latest call, per
sample, for the method that builds on it: `dsg` turns the noise that the sampler draws next, `dps` and `tfg` move the
state that the step leads to, `diffrgd` descends from there.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import comfy.model_management
import comfy.samplers
import numpy as np
import torch
from comfy.conds import CONDConstant
from torch import Tensor, nn

from .. import host
from ..losses.base import Loss, Step
from .autograd import Recording, differentiable, normal, one_by_one, staying_out_of_inference_mode, wants_lenience
from .trace import Evaluation, GuidanceTrace

__all__ = [
    "GRADIENTS",
    "GuidedModel",
    "Objective",
    "ShiftedModel",
    "deterministic_sampler_message",
    "deviation",
    "levels",
    "mask_at",
    "noise_of",
    "per_sample",
    "prepared",
    "progress",
    "steered",
    "with_function",
]

log = logging.getLogger("sphereguide")

Gradient = Literal["full", "cond only", "fast"]
GRADIENTS: tuple[Gradient, ...] = ("full", "cond only", "fast")

#: Marks the conditionings that get no graph. It goes through ComfyUI's batching, which keeps unlike ones apart.
_CONSTANT = "sphereguide_constant"

#: Bytes that autograd keeps of a model call, as a multiple of what the host reserves for the call alone. Measured on
#: the layout of SD1.5 (`quickstart.py bench cost`).
_KEPT = {False: 2.5, True: 1.5}

FAST = (
    "Set gradient to 'fast', which needs no backward pass through the model, and guides with the rest of the workflow "
    "as it is."
)


@dataclass(frozen=True)
class Objective:
    """What to guide by, and where.

    loss            sees the estimate x̂₀
    decode          latents to images (`models.decoder.Decoder`); None for losses on latents
    interval        guide one step in so many
    start_percent, end_percent   the part of the schedule that is guided, as in ComfyUI's own nodes
    gradient        "full": through the network and the CFG combination. "cond only": the negative half is a constant.
                    "fast": with respect to x̂₀ instead of x, without a backward pass through the network.
    checkpointing   compute activations again instead of keeping them: the blocks' of the network, and with several
                    samples the decoder's, which has one of them at a time
    """

    METHOD: ClassVar[str] = "Guidance"

    loss: Loss
    decode: Any = None
    interval: int = 1
    start_percent: float = 0.0
    end_percent: float = 1.0
    gradient: Gradient = "full"
    checkpointing: bool = False

    @property
    def off(self) -> bool:
        """Whether nothing is guided, so that the sampler runs as it is, bit for bit."""
        raise NotImplementedError

    @property
    def moves_state(self) -> bool:
        """Whether it changes the sampler's state, and not its noise alone."""
        return True


def deterministic_sampler_message(method: str, what: str) -> str:
    return (
        f"{method} steers samplers that add noise, and this sampler {what}: there is nothing to guide. "
        f"Samplers of this ComfyUI that add noise: {', '.join(host.stochastic_samplers())}. "
        "Where a sampler has eta or s_noise, set them above 0."
    )


def lost_changes_message(title: str, sampler: comfy.samplers.KSAMPLER, instead: str) -> str:
    name = getattr(sampler.sampler_function, "__name__", "").removeprefix("sample_")
    return (
        f"{title} changes the state of a sampler from step to step, and this sampler ({name}) does not go on from it: "
        "it takes the state from its own records, or asks the model at other noise levels than those of the schedule. "
        f"Connect another, such as {instead}."
    )


def steered(
    sampler: comfy.samplers.KSAMPLER, objective: Objective, trace: GuidanceTrace, method: type[GuidedModel]
) -> comfy.samplers.KSAMPLER:
    """`sampler`, guided. It keeps its options, and its function's signature stays visible to other packs.

    Raises ValueError for a sampler that takes no notice of what a method does to its state.
    """
    function = sampler.sampler_function
    if objective.moves_state and not objective.off and host.keeps_changes(sampler) is False:
        raise ValueError(lost_changes_message(objective.METHOD, sampler, "euler_ancestral"))

    def sample(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
        **options: Any,
    ) -> Tensor:
        trace.begin(objective.METHOD, len(sigmas) - 1)
        arguments: dict[str, Any] = {"callback": callback, "disable": disable, **options}
        if objective.off or len(sigmas) < 2:
            x = function(model, x, sigmas, extra_args=extra_args, **arguments)
            trace.finished = True
            return x
        refuse_several_latents(objective.METHOD, model)
        extra_args = extra_args or {}
        seed = extra_args.get("seed")
        source = options.get("noise_sampler") or host.noise_source(function, x, sigmas, seed)
        mode = torch.inference_mode(torch.is_inference_mode_enabled())
        with _prepared_for(objective, model, x, extra_args) as (recording, extra_args, stay_loaded):
            guided_model = method(model, sigmas, objective, trace, recording, seed)
            guided_model.rehearsal = host.rehearsed(function, model, sigmas, options)
            guided_model.decodes_apart = _decodes_apart(objective, x)
            arguments["noise_sampler"] = guided_model.noise_sampler(source)
            arguments["callback"] = guided_model.callback(mode(callback) if callback else None, stay_loaded)
            x = function(guided_model, normal(x), normal(sigmas), extra_args=extra_args, **arguments)
            x = guided_model.finished(x)
        trace.finished = True
        if guided_model.guided_calls and not (trace and (guided_model.draws or len(sigmas) == 2)):
            if not host.adds_noise(sampler):
                raise ValueError(
                    deterministic_sampler_message(objective.METHOD, "drew none in the steps that were to be guided")
                )
            log.warning(  # sa_solver, on a schedule without steps in the middle noise levels
                "%s: the sampler drew no noise in the steps that were to be guided, so none was. It adds noise "
                "elsewhere: take more steps, another scheduler, or another sampler.",
                objective.METHOD,
            )
        if not guided_model.guided_calls:
            log.warning(
                "%s: no step of this run lies where start_percent, end_percent and the schedule of the loss allow "
                "guidance, so none was guided. Widen them, or take more steps.",
                objective.METHOD,
            )
        trace.warn_of_skipped_steps()
        return x

    return with_function(sampler, sample)


def refuse_several_latents(method: str, model: Any) -> None:
    """Raises ValueError for the node of that title where newer hosts sample several latents as one."""
    if len(getattr(host.base_model(model), "latent_shapes", None) or ()) > 1:
        raise ValueError(
            f"{method}: this model samples several latents as one (a video and its sound), and guidance knows one. "
            "Take a model of images."
        )


def with_function(sampler: comfy.samplers.KSAMPLER, function: Callable[..., Tensor]) -> comfy.samplers.KSAMPLER:
    """`sampler` with `function` around its own: the options stay, and the signature that other packs look at."""
    functools.update_wrapper(function, sampler.sampler_function)
    return comfy.samplers.KSAMPLER(function, dict(sampler.extra_options), dict(sampler.inpaint_options))


@contextlib.contextmanager
def prepared(
    model: Any,
    x: Tensor,
    extra_args: dict[str, Any],
    method: str,
    remedy: str,
    gradient: Gradient = "full",
    checkpointing: bool = False,
    modules: Sequence[nn.Module] = (),
    patchers: Sequence[Any] = (),
    memory: float = 0.0,
    graphs: int = 1,
) -> Iterator[tuple[Recording, dict[str, Any], Callable[[], None]]]:
    """All that a run differentiates, loaded and differentiable. Yields `recording`, the arguments of the model, and
    `stay_loaded`, which loads again what another pack has unloaded between two steps.

    method, remedy      whose run it is and what to do instead, for errors
    modules, patchers   what is differentiated and loaded beside the model
    memory              bytes that they take
    graphs              of how many model calls autograd keeps what it needs, at a time
    """
    base_model, guider = host.base_model(model), host.guider(model)
    options = extra_args.get("model_options", {})
    fast = gradient == "fast"
    if not fast:
        _refuse_what_has_no_gradient(method, remedy, guider, options)

    patchers = [guider.model_patcher, *host.additional_models(guider), *patchers]
    calls = guider.model_patcher.memory_required([2 * x.shape[0], *x.shape[1:]])
    memory += calls * (1 if fast else graphs * _KEPT[checkpointing])
    # In one call: a call for the VAE alone could evict the model that is about to run.
    comfy.model_management.load_models_gpu(patchers, memory)
    loaded = host.loaded(patchers)

    def stay_loaded() -> None:
        # An unloaded model has lost its LoRAs, and its weights may be inference tensors again.
        if host.loaded(patchers) < loaded:
            with recording.put_back():
                comfy.model_management.load_models_gpu(patchers, memory)

    holders = [link for link in host.chain(model) if not isinstance(link, nn.Module)]
    holders += [base_model.latent_format, *host.controls(guider)]
    wrapper = options.get("model_function_wrapper")
    if (owner := _owner(wrapper)) is not None:
        holders.append(owner)
    if not fast:
        modules = [*modules, *host.networks(guider)]
        options = host.with_differentiable_attention(options)
        options = {**options, "model_function_wrapper": _model_calls(method, remedy, wrapper)}
    with differentiable(*modules, holders=holders) as recording:
        conds = guider.conds
        if gradient == "cond only" and "negative" in conds:
            guider.conds = {**conds, "negative": _marked_constant(conds["negative"])}
        try:
            yield recording, normal({**extra_args, "model_options": options}), stay_loaded
        finally:
            guider.conds = conds
            _drop_graphs(owner)


def _prepared_for(
    objective: Objective, model: Any, x: Tensor, extra_args: dict[str, Any]
) -> contextlib.AbstractContextManager[tuple[Recording, dict[str, Any], Callable[[], None]]]:
    modules, patchers, memory = [objective.loss], [*objective.loss.patchers], 0.0
    if (decode := objective.decode) is not None:
        modules.append(decode.module)
        patchers.append(decode.patcher)
        batch = 1 if _decodes_apart(objective, x) else len(x)
        memory = decode.memory_required(torch.Size((batch, *x.shape[1:])))
    return prepared(
        model,
        x,
        extra_args,
        objective.METHOD,
        FAST,
        objective.gradient,
        objective.checkpointing,
        modules,
        patchers,
        memory,
    )


def _decodes_apart(objective: Objective, x: Tensor) -> bool:
    """Whether the images of a batch are decoded one by one: all at once they may need more memory than there is."""
    if objective.checkpointing or objective.decode is None:
        return objective.checkpointing
    management = comfy.model_management
    return objective.decode.memory_required(x.shape) > management.get_total_memory(management.get_torch_device())


def _refuse_what_has_no_gradient(method: str, remedy: str, guider: Any, model_options: dict[str, Any]) -> None:
    if "multigpu_clones" in model_options:
        raise RuntimeError(
            f"{method}: ComfyUI spreads this model over several GPUs, where it takes no gradients. {remedy}"
        )
    hooks = [cond.get("hooks") for conds in guider.conds.values() for cond in conds or ()]
    if any(hook is not hooks[0] for hook in hooks):
        raise RuntimeError(
            f"{method}: the prompts carry different hooks (LoRAs of their own), which rewrite the model's weights. "
            f"{remedy}"
        )


class GuidedModel:
    """A sampler's model that keeps the gradient of its latest call. A method says what becomes of it.

    Called as `model(x [B, …], sigma [B], **extra_args)`, returns denoised `[B, …]`, like the model that it wraps.
    """

    guides_last_step = False  # the one to sigma 0
    by_length = True  # whether the length of the gradient counts, and not its direction alone
    rehearsal = host.Rehearsal({}, {})
    begins_step = False  # whether the current call is the first of its step
    decodes_apart = False

    def __init__(
        self,
        model: Any,
        sigmas: Tensor,
        objective: Any,
        trace: GuidanceTrace,
        recording: Recording,
        seed: int | None,
    ) -> None:
        if any(isinstance(link, GuidedModel) for link in host.chain(model)):
            raise ValueError(f"{objective.METHOD}: this sampler is guided already. Guide it once, with one loss.")
        if any(getattr(link, "refines_state", False) for link in host.chain(model)):
            raise ValueError(
                f"ILVR Reference needs the sampler itself, and here it got one that {objective.METHOD} guides. Connect "
                f"the sampler to ILVR Reference, and that to {objective.METHOD}."
            )
        self.wrapped = model
        self.objective = objective
        self.trace = trace
        self.recording = recording
        self.lenient = False  # see `differentiable`
        self.checkpointing: bool = objective.checkpointing
        self.schedule: list[float] = sigmas.tolist()
        self.model = host.base_model(model)
        model_sampling = self.model.model_sampling
        self.sigma_start = float(model_sampling.percent_to_sigma(objective.start_percent))
        self.sigma_end = float(model_sampling.percent_to_sigma(objective.end_percent))
        self.seed = seed or 0
        self.memory: dict[Any, Any] = {}
        self.step = 0
        self.calls = self.guided_calls = self.draws = 0
        self.latest: Any = None  # what the method keeps of a guided call, an `Evaluation` mostly
        self.repeated = -1  # the latest step that was repeated

    # What a method does with the gradient

    def arrived(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> None:
        """Called before each model call with the sampler's own x, which goes on with what x becomes in place."""

    def drawn(self, noise: Tensor, sigma_next: Tensor) -> Tensor:
        """What the sampler gets for `noise`, which it draws to reach `sigma_next` after a guided call (`latest`)."""
        return noise

    def finished(self, x: Tensor) -> Tensor:
        """The run's result for what the sampler returned."""
        return x

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        if begins := self.rehearsal.begins:
            self.begins_step, self.step = self.calls in begins, begins.get(self.calls, self.step)
        else:
            self.begins_step = math.isclose(float(sigma.max()), self.schedule[self.step], rel_tol=1e-4)
        self.calls += 1
        self.arrived(x, sigma, **extra_args)
        denoised, self.latest = self.evaluated(x, sigma, **extra_args)
        self.guided_calls += self.latest is not None
        return denoised

    def evaluated(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> tuple[Tensor, Evaluation | None]:
        """denoised `[B, …]`, and the loss there with its gradient: None where the run is not guided."""
        weight = self.weight(sigma)
        if weight == 0:
            return self.wrapped(x, sigma, **extra_args), None
        return self.differentiated(x, sigma, weight, **extra_args)

    def weight(self, sigma: Tensor) -> float:
        """That of the loss in this step; 0 where the run is not guided."""
        return self.objective.loss.weight(self._loss_step(sigma)) if self._guides(float(sigma.max())) else 0.0

    def differentiated(self, x: Tensor, sigma: Tensor, weight: float, **extra_args: Any) -> tuple[Tensor, Evaluation]:
        """denoised `[B, …]`, and the loss there with its gradient."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        denoised, loss, gradient = self._evaluate(x, sigma, self._loss_step(sigma), **extra_args)
        free = self._free_coordinates(x, sigma, **extra_args)
        if free is not None:
            gradient = gradient * free
        return denoised, Evaluation(self.step, sigma, loss, gradient, free, weight)

    def _guides(self, sigma: float) -> bool:
        return (
            (self.guides_last_step or self.schedule[self.step + 1] > 0)
            and self.step % self.objective.interval == 0
            and self.sigma_end <= sigma <= self.sigma_start
        )

    def _loss_step(self, sigma: Tensor) -> Step:
        sampling = self.model.model_sampling
        return Step(
            index=self.step,
            progress=lambda: progress(sampling, float(sigma.max())),
            seed=self.seed,
            timestep=sampling.timestep(sigma) if self.objective.loss.space == "noisy" else None,
            memory=self.memory,
        )

    def _evaluate(self, x: Tensor, sigma: Tensor, step: Step, **extra_args: Any) -> tuple[Tensor, Tensor, Tensor]:
        """denoised `[B, …]`, loss `[B]`, and the loss's gradient `[B, …]` with respect to x (fast: to denoised)."""
        while True:
            try:
                return self._differentiate(x, sigma, step, **extra_args)
            except RuntimeError as error:
                if not host.out_of_memory(error):
                    if self.lenient or not wants_lenience(error):
                        raise
                    # Something in the workflow overwrites what autograd needs, as some model patches do, or brings
                    # weights of its own. Slower, but works.
                    self.lenient = True
                    continue
                saves = self.objective.gradient != "fast" or (self.objective.decode is not None and len(x) > 1)
                if self.checkpointing or not saves:
                    raise
                log.warning(
                    "%s: out of memory. Trying again with checkpointing, which stays on for this run; turn it on in "
                    "the node to save the detour.",
                    self.objective.METHOD,
                )
            # Out here the failed attempt's tensors are gone: the exception held them.
            self.checkpointing = True
            comfy.model_management.soft_empty_cache()

    def _differentiate(self, x: Tensor, sigma: Tensor, step: Step, **extra_args: Any) -> tuple[Tensor, Tensor, Tensor]:
        noisy = self.objective.loss.space == "noisy"
        fast = self.objective.gradient == "fast" or noisy
        recomputed = self.model.diffusion_model if self.checkpointing and not fast else None
        with self.recording(self.lenient, recomputed), torch.set_grad_enabled(not fast):
            x = x.detach().clone().requires_grad_(not fast)
            denoised = self.wrapped(x, sigma, **extra_args)
            if not fast and not denoised.requires_grad:
                raise RuntimeError(f"{self.objective.METHOD}: this model runs without gradients here. {FAST}")
            loss, gradient = self._noisy_loss(x, sigma, step) if noisy else self._loss(denoised.detach(), step)
            if not fast:
                size = _size(gradient)
                gradient = self._backward(denoised, x, gradient / size) * size
            elif self.by_length and not noisy:
                # What dx̂₀/dx is for data of unit variance: what it is of a network, only its backward pass tells.
                alpha, noise = levels(self.model.model_sampling, sigma.max())
                alpha = max(alpha, 1e-3)  # 0 where flow models begin: a gradient of zero would count as none
                gradient = gradient * (alpha / (alpha**2 + noise**2))
        return denoised.detach().clone(), loss, gradient

    def _backward(self, denoised: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
        try:
            return torch.autograd.grad(denoised, x, gradient)[0]
        except RuntimeError as error:
            if host.out_of_memory(error) or wants_lenience(error):
                raise
            raise RuntimeError(
                f"{self.objective.METHOD}: no gradient can be taken through this model ({error}). {FAST}"
            ) from error

    def _noisy_loss(self, x: Tensor, sigma: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The same of a loss on x itself."""
        with torch.enable_grad():
            variable = x.detach().clone().requires_grad_()
            scaled = self.model.model_sampling.calculate_input(sigma, variable)
            return _with_gradient(self.objective.loss(scaled, step), variable)

    def _loss(self, denoised: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The loss `[B]` and its gradient with respect to x̂₀ `[B, …]`: sample i gets the gradient of loss i."""
        with torch.enable_grad():
            variable = denoised.detach().clone().requires_grad_()
            decode = self.objective.decode
            if decode is None:
                return _with_gradient(self.objective.loss(variable, step), variable)
            if self.checkpointing or self.decodes_apart:
                decode = one_by_one(decode)
            decoded = decode(self.model.process_latent_out(variable))
            images = decoded.detach().requires_grad_()
            loss, gradient = _with_gradient(self.objective.loss(images, step), images)
            size = _size(gradient)
            return loss, torch.autograd.grad(decoded, variable, gradient / size)[0] * size

    def _free_coordinates(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor | None:
        """Where the denoise mask leaves the sampler a choice, `[B, …]` of bool; None where there is no mask."""
        mask = mask_at(self.wrapped, sigma, **extra_args)
        return None if mask is None else (mask > 0).expand_as(x)

    # Time travel. With x = α·x̂₀ + σ·ε, z = x/α lies at the noise level s = σ/α, and the DDPM step (η = 1) to s' < s is
    # z' = x̂₀ + (z − x̂₀)·s'²/s² + s'·√(1 − s'²/s²)·ε, undone by z'+ √(s² − s'²)·ε.

    def repeat(
        self, x: Tensor, sigma: Tensor, times: int, guide: Callable[..., tuple[Tensor, Any]], **extra_args: Any
    ) -> None:
        """Guides the step and undoes it by fresh noise, `times` times, in place in x: once a step, at its first call.

        `guide(noise, sigma_next, at)` gives ε' of the guided DDPM step, and what is added to x_next.
        """
        if times == 0 or self.repeated >= self.step or not self.begins_step or self.weight(sigma) == 0:
            return
        self.repeated = self.step
        sigma_next = sigma.new_tensor(self.schedule[self.step + 1])
        alpha, noise = levels(self.model.model_sampling, sigma.max())
        if alpha == 0:  # pure noise: whatever is done to it, going back leaves nothing of it
            return
        alpha_next, noise_next = levels(self.model.model_sampling, sigma_next)
        s, s_next = noise / alpha, noise_next / alpha_next
        for repetition in range(times):
            denoised, at = self.evaluated(x, sigma, **extra_args)
            forth, back = self._noise(x, repetition)
            forth, shift = guide(forth, sigma_next, at)
            share = (s_next / s) ** 2
            z = denoised + (x / alpha - denoised) * share
            z += s_next * (1 - share) ** 0.5 * forth + shift / alpha_next
            x.copy_(alpha * (z + (s**2 - s_next**2) ** 0.5 * back))

    def _noise(self, x: Tensor, repetition: int) -> tuple[Tensor, Tensor]:
        """Noise for a repetition and for its undoing: that of the seed, the step and its number."""
        forth, back = noise_of((2, *x.shape), self.seed, self.step, repetition).to(x)
        return forth, back

    # Without a rehearsal two things tell that a step is over: the draw that leads to the next entry of the schedule and
    # the next step's callback. A call's sigma does not: dpm_2_ancestral's second lies on, or below, the next entry.

    def _advance(self, sigma_next: float) -> None:
        ahead = range(self.step + 1, len(self.schedule) - 1)
        self.step = next((i for i in ahead if math.isclose(sigma_next, self.schedule[i], rel_tol=1e-4)), self.step)

    def callback(
        self, callback: Callable[[dict[str, Any]], None] | None, stay_loaded: Callable[[], None]
    ) -> Callable[[dict[str, Any]], None]:
        def called(state: dict[str, Any]) -> None:
            if not self.rehearsal.begins:
                self.step = min(state["i"], len(self.schedule) - 2)
            if callback is not None:
                callback(state)
                stay_loaded()  # other packs draw their previews here, with models of their own

        return called

    def noise_sampler(self, source: host.NoiseSampler) -> host.NoiseSampler:
        """`source`, with what the method makes of each draw that follows a guided call of the model."""

        def draw(sigma: Tensor, sigma_next: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            noise = source(sigma, sigma_next, *args, **kwargs)
            self.draws += 1
            if not self.rehearsal.begins:
                self._advance(float(sigma_next))
            return noise if self.latest is None else self.drawn(noise, sigma_next)

        return draw


class ShiftedModel(GuidedModel):
    """Moves the state that a step led to, by what a method makes of the last call before the draw that ended it."""

    guides_last_step = True
    pending: Any = None  # `latest` of the step that the sampler's draw has ended
    noise: Tensor | None = None

    def shift(self, at: Any, sigma_next: Tensor) -> Tensor:
        """What is added to the state at `sigma_next`, `[B, …]`; not finite where there is no telling."""
        raise NotImplementedError

    def drawn(self, noise: Tensor, sigma_next: Tensor) -> Tensor:
        self.pending, self.noise = self.latest, noise
        return noise

    def arrived(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> None:
        if self.pending is not None:
            x.add_(self.usable_shift(self.pending, sigma.max(), self.noise).to(x))
        self.pending = self.noise = None

    def finished(self, x: Tensor) -> Tensor:
        if self.latest is None:
            return x
        return x + self.usable_shift(self.latest, x.new_tensor(self.schedule[-1]), self.noise).to(x)

    def usable_shift(self, at: Any, sigma_next: Tensor, noise: Tensor | None) -> Tensor:
        """The shift, 0 for the samples where it or the gradient is not finite, or the gradient is zero."""
        shift = self.shift(at, sigma_next)
        usable = at.norm.isfinite() & (at.norm > 0) & shift.flatten(1).isfinite().all(1)
        self.trace.record(at, sigma_next, noise, usable)
        return torch.where(per_sample(usable, shift) > 0, shift, 0)


def _marked_constant(conds: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    mark = {_CONSTANT: CONDConstant(True)}
    return conds and [{**cond, "model_conds": {**cond.get("model_conds", {}), **mark}} for cond in conds]


def _model_calls(method: str, remedy: str, wrapper: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """A `model_function_wrapper` around the workflow's own, if it has one.

    What is marked constant runs without a graph; what is not must leave one.
    """

    owner = _owner(wrapper)

    def apply(apply_model: Callable[..., Tensor], parameters: dict[str, Any]) -> Tensor:
        x, c = parameters["input"], dict(parameters["c"])
        wanted = not c.pop(_CONSTANT, False) and x.requires_grad
        with torch.set_grad_enabled(wanted and torch.is_grad_enabled()), staying_out_of_inference_mode():
            if wrapper is None:
                output = apply_model(x, parameters["timestep"], **c)
            else:
                _drop_graphs(owner)
                output = wrapper(apply_model, {**parameters, "c": c})
        if wanted and not output.requires_grad:
            raise RuntimeError(f"{method}: this model runs without gradients here. {remedy}")
        # A wrapper may return a buffer that it wrote an earlier call's result to, graph and all.
        return output if wanted else output.detach()

    return apply


def _owner(wrapper: Any) -> Any:
    """The object that keeps a wrapper's buffers, if it is one or a method of one."""
    owner = getattr(wrapper, "__self__", wrapper)
    return owner if hasattr(owner, "__dict__") else None


def _drop_graphs(owner: Any) -> None:
    """Lets go of the graphs of earlier calls, which buffers of a wrapper would hold: those of all steps, in a chain."""
    for name, value in list(vars(owner).items()) if owner is not None else ():
        if isinstance(value, Tensor) and value.grad_fn is not None:
            setattr(owner, name, value.detach())


def _size(gradient: Tensor) -> Tensor:
    """About the size of a number in each sample of `[B, …]`, shaped to broadcast over it; 1 where there is none.

    A backward pass begins at a gradient that is divided by it, as half precision would lose that of a weak loss. A
    power of two: in float32 nothing changes, to the bit.
    """
    size = gradient.float().flatten(1).square().mean(1).sqrt()
    return per_sample(torch.where((size > 0) & size.isfinite(), size, 1).log2().round().exp2(), gradient)


def _with_gradient(loss: Tensor, variable: Tensor) -> tuple[Tensor, Tensor]:
    """`loss` `[B]` and its gradient with respect to `variable` `[B, …]`: zero where it does not depend on it."""
    gradient = None
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss.sum(), variable, allow_unused=True)
    return loss.detach(), torch.zeros_like(variable) if gradient is None else gradient


def mask_at(
    model: Any, sigma: Tensor, denoise_mask: Tensor | None = None, model_options: Any = None, **_: Any
) -> Tensor | None:
    """The denoise mask of a call of a sampler's model with these arguments: 0 where it keeps the image, 1 where not."""
    function = (model_options or {}).get("denoise_mask_function")
    if denoise_mask is None or function is None:
        return denoise_mask
    # Differential diffusion
    return function(sigma, denoise_mask, extra_options={"model": model.inner_model, "sigmas": model.sigmas})


def progress(model_sampling: Any, sigma: float) -> float:
    """The percent of the schedule at which it has `sigma`: `percent_to_sigma`, which falls, inverted by bisection."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if float(model_sampling.percent_to_sigma(middle)) > sigma else (low, middle)
    return (low + high) / 2


def noise_of(shape: Iterable[int], *key: int) -> Tensor:
    """Gaussian noise that depends on the key alone (a seed, a step): on the CPU, like the noise of ComfyUI's seeds."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.randn(*shape, generator=torch.Generator().manual_seed(int(state) % 2**63))


def levels(model_sampling: Any, sigma: Tensor) -> tuple[float, float]:
    """α and σ of the model's x = α·x₀ + σ·ε at that sigma, of whatever prediction type it is."""
    zero, one = torch.zeros(1, device=sigma.device), torch.ones(1, device=sigma.device)
    scaling = model_sampling.noise_scaling
    return float(scaling(sigma, zero, one)), float(scaling(sigma, one, zero))


def deviation(model_sampling: Any, sigma: Tensor) -> float:
    """v = √(α² + σ²): that of a state of the model at that sigma. x/v is the state of the papers, of unit variance."""
    return math.hypot(*levels(model_sampling, sigma))


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """`[B]` in the dtype of `like` `[B, …]`, shaped to broadcast over it."""
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))
