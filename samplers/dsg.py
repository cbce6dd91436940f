"""DSG: Diffusion with Spherical Gaussian constraint (Yang et al., ICML 2024, arXiv 2402.03201), in noise space.

A stochastic step of any sampler is x_next = μ + c·ε with ε Gaussian, and a Gaussian of n dimensions lies on a sphere of
radius √n. With g = ∇ₓ L(x̂₀(x)), per sample:

    d* = −√n · g/‖g‖            the steepest descent on that sphere, the paper's closed form
    m  = ε + g_r·(d* − ε)       g_r = guidance_rate; the random part keeps variety
    ε' = √n · m/‖m‖             back onto the sphere

c cancels, so a guided sampler is a sampler with a guided `noise_sampler`. The step to sigma 0 draws no noise and is not
guided.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import comfy.model_management
import comfy.samplers
import torch
from comfy.conds import CONDConstant
from torch import Tensor, nn

from .. import host
from ..losses.base import Loss, Step
from .autograd import Recording, differentiable, normal
from .ilvr import ReferencedModel
from .trace import GuidanceTrace

__all__ = ["GRADIENTS", "Guidance", "deterministic_sampler_message", "guided", "on_sphere"]

log = logging.getLogger("sphereguide")

Gradient = Literal["full", "cond only", "fast"]
GRADIENTS: tuple[Gradient, ...] = ("full", "cond only", "fast")

#: Marks the conditionings that get no graph. It goes through ComfyUI's batching, which keeps unlike ones apart.
_CONSTANT = "sphereguide_constant"


@dataclass(frozen=True)
class Guidance:
    """What to guide by, and how.

    loss            sees the estimate x̂₀
    decode          latents to images (`models.decoder.Decoder`); None for losses on latents
    guidance_rate   g_r in [0, 1]; 0 is the unguided sampler, bit for bit
    interval        guide one step in so many
    start_percent, end_percent   the part of the schedule that is guided, as in ComfyUI's own nodes
    gradient        "full": through the network and the CFG combination. "cond only": the negative half is a constant.
                    "fast": with respect to x̂₀ instead of x, without a backward pass through the network.
    checkpointing   compute the blocks' activations again instead of keeping them
    """

    loss: Loss
    decode: Any = None
    guidance_rate: float = 0.2
    interval: int = 1
    start_percent: float = 0.0
    end_percent: float = 1.0
    gradient: Gradient = "full"
    checkpointing: bool = False


def on_sphere(noise: Tensor, gradient: Tensor, guidance_rate: float, free: Tensor | None = None) -> Tensor:
    """ε' from ε and g, both `[B, …]`, per sample.

    free  `[B, …]` of bool: the coordinates that the sampler is free to choose (a denoise mask). The sphere is then
          theirs, n their number, and the others keep their noise.
    """
    if free is None:
        free = torch.ones_like(noise, dtype=torch.bool)
    n = _per_sample(free.flatten(1).sum(1), noise)
    eps, g = noise * free, gradient * free
    radius = n.sqrt()
    direction = -radius * g / _norm(g)
    mix = eps + guidance_rate * (direction - eps)
    return torch.where(free, radius * mix / _norm(mix), noise)


def guided(sampler: comfy.samplers.KSAMPLER, guidance: Guidance, trace: GuidanceTrace) -> comfy.samplers.KSAMPLER:
    """`sampler`, guided. It keeps its options, and its function's signature stays visible to other packs."""
    function = sampler.sampler_function

    def sample(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
        **options: Any,
    ) -> Tensor:
        trace.clear()
        arguments: dict[str, Any] = {"callback": callback, "disable": disable, **options}
        if guidance.guidance_rate == 0 or len(sigmas) < 2:
            return function(model, x, sigmas, extra_args=extra_args, **arguments)
        extra_args = extra_args or {}
        source = options.get("noise_sampler") or host.noise_source(function, x, sigmas, extra_args.get("seed"))
        mode = torch.inference_mode(torch.is_inference_mode_enabled())
        with _prepared(model, guidance, x, extra_args) as (recording, extra_args):
            guided_model = _GuidedModel(model, sigmas, guidance, trace, recording, extra_args.get("seed"))
            arguments["noise_sampler"] = guided_model.noise_sampler(source)
            arguments["callback"] = guided_model.callback(mode(callback) if callback else None)
            x = function(guided_model, normal(x), normal(sigmas), extra_args=extra_args, **arguments)
        if guided_model.guided_calls and not trace.steps:
            raise ValueError(deterministic_sampler_message("drew none in the steps that were to be guided"))
        if not guided_model.guided_calls:
            log.warning(
                "DSG Guidance: no step of this run lies where start_percent, end_percent and the schedule of the loss "
                "allow guidance."
            )
        trace.warn_of_skipped_steps()
        return x

    functools.update_wrapper(sample, function)
    return comfy.samplers.KSAMPLER(sample, dict(sampler.extra_options), dict(sampler.inpaint_options))


@contextlib.contextmanager
def _prepared(
    model: Any, guidance: Guidance, x: Tensor, extra_args: dict[str, Any]
) -> Iterator[tuple[Recording, dict[str, Any]]]:
    """All that the run differentiates, loaded and differentiable. Yields `recording` and the arguments of the model."""
    base_model, guider = host.base_model(model), host.guider(model)
    options = extra_args.get("model_options", {})
    fast = guidance.gradient == "fast"
    if not fast:
        _refuse_what_has_no_gradient(guider, options)

    patchers = [guider.model_patcher, *host.additional_models(guider), *guidance.loss.patchers]
    memory = guider.model_patcher.memory_required([2 * x.shape[0], *x.shape[1:]])
    modules: list[nn.Module] = [guidance.loss]
    if guidance.decode is not None:
        patchers.append(guidance.decode.patcher)
        modules.append(guidance.decode.module)
        memory += guidance.decode.memory_required(x.shape)
    # In one call: a call for the VAE alone could evict the model that is about to run.
    comfy.model_management.load_models_gpu(patchers, memory)

    holders = [link for link in host.chain(model) if not isinstance(link, nn.Module)]
    holders += [base_model.latent_format, *host.controls(guider)]
    checkpointing = base_model.diffusion_model if guidance.checkpointing and not fast else None
    if not fast:
        modules += host.networks(guider)
        options = host.with_differentiable_attention(options)
        options = {**options, "model_function_wrapper": _model_calls(options.get("model_function_wrapper"))}
    with differentiable(*modules, holders=holders, checkpointing=checkpointing) as recording:
        conds = guider.conds
        if guidance.gradient == "cond only" and "negative" in conds:
            guider.conds = {**conds, "negative": _marked_constant(conds["negative"])}
        try:
            yield recording, normal({**extra_args, "model_options": options})
        finally:
            guider.conds = conds


def _refuse_what_has_no_gradient(guider: Any, model_options: dict[str, Any]) -> None:
    if "multigpu_clones" in model_options:
        raise RuntimeError(_no_gradient("ComfyUI spreads this model over several GPUs, where it takes no gradients"))
    hooks = [cond.get("hooks") for conds in guider.conds.values() for cond in conds or ()]
    if any(hook is not hooks[0] for hook in hooks):
        raise RuntimeError(
            _no_gradient("the prompts carry different hooks (LoRAs of their own), which rewrite the model's weights")
        )


def _no_gradient(why: str) -> str:
    return (
        f"DSG Guidance: {why}. Set gradient to 'fast', which needs no backward pass through the model, and guides with "
        "the rest of the workflow as it is."
    )


@dataclass(frozen=True)
class _Evaluation:
    """A guided model call: what the noise that is drawn after it needs to know."""

    step: int
    sigma: Tensor
    loss: Tensor
    gradient: Tensor
    free: Tensor | None
    guidance_rate: float


def deterministic_sampler_message(what: str) -> str:
    return (
        f"DSG Guidance steers the noise that a sampler adds, and this sampler {what}: there is nothing to guide. "
        f"Samplers of this ComfyUI that add noise: {', '.join(host.stochastic_samplers())}. "
        "Where a sampler has eta or s_noise, set them above 0."
    )


class _GuidedModel:
    """A sampler's model that keeps the gradient of its latest call, for the noise that is drawn after it.

    Called as `model(x [B, …], sigma [B], **extra_args)`, returns denoised `[B, …]`, like the model that it wraps.
    """

    def __init__(
        self,
        model: Any,
        sigmas: Tensor,
        guidance: Guidance,
        trace: GuidanceTrace,
        recording: Recording,
        seed: int | None,
    ) -> None:
        if any(isinstance(link, _GuidedModel) for link in host.chain(model)):
            raise ValueError("DSG Guidance: this sampler is guided already. Guide it once, with one loss.")
        if any(isinstance(link, ReferencedModel) for link in host.chain(model)):
            raise ValueError(
                "ILVR Reference needs the sampler itself, and here it got one that DSG Guidance guides. Connect the "
                "sampler to ILVR Reference, and that to DSG Guidance."
            )
        self.wrapped = model
        self.guidance = guidance
        self.trace = trace
        self.recording = recording
        self.mutation = False  # whether in-place operations have to be made legal
        self.schedule: list[float] = sigmas.tolist()
        self.model = host.base_model(model)
        model_sampling = self.model.model_sampling
        self.sigma_start = float(model_sampling.percent_to_sigma(guidance.start_percent))
        self.sigma_end = float(model_sampling.percent_to_sigma(guidance.end_percent))
        self.seed = seed or 0
        self.memory: dict[Any, Any] = {}
        self.step = 0
        self.guided_calls = 0
        self.latest: _Evaluation | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        self.latest = None
        if not self._guides(float(sigma.max())):
            return self.wrapped(x, sigma, **extra_args)
        step = self._loss_step(sigma)
        rate = min(1.0, self.guidance.guidance_rate * self.guidance.loss.weight(step))
        if rate == 0:
            return self.wrapped(x, sigma, **extra_args)
        denoised, loss, gradient = self._evaluate(x, sigma, step, **extra_args)
        free = self._free_coordinates(x, sigma, **extra_args)
        if free is not None:
            gradient = gradient * free
        self.guided_calls += 1
        self.latest = _Evaluation(self.step, sigma, loss, gradient, free, rate)
        return denoised

    def _guides(self, sigma: float) -> bool:
        return (
            self.schedule[self.step + 1] > 0
            and self.step % self.guidance.interval == 0
            and self.sigma_end <= sigma <= self.sigma_start
        )

    def _loss_step(self, sigma: Tensor) -> Step:
        sampling = self.model.model_sampling
        return Step(
            index=self.step,
            progress=lambda: _progress(sampling, float(sigma.max())),
            seed=self.seed,
            timestep=sampling.timestep(sigma) if self.guidance.loss.space == "noisy" else None,
            memory=self.memory,
        )

    def _evaluate(self, x: Tensor, sigma: Tensor, step: Step, **extra_args: Any) -> tuple[Tensor, Tensor, Tensor]:
        """denoised `[B, …]`, loss `[B]`, and the loss's gradient `[B, …]` with respect to x (fast: to denoised)."""
        try:
            return self._differentiate(x, sigma, step, **extra_args)
        except RuntimeError as error:
            if self.mutation or "inplace operation" not in str(error):
                raise
        # Something in the workflow overwrites what autograd needs, as some model patches do. Slower, but it works.
        self.mutation = True
        return self._differentiate(x, sigma, step, **extra_args)

    def _differentiate(self, x: Tensor, sigma: Tensor, step: Step, **extra_args: Any) -> tuple[Tensor, Tensor, Tensor]:
        noisy = self.guidance.loss.space == "noisy"
        fast = self.guidance.gradient == "fast" or noisy
        with self.recording(mutation=self.mutation), torch.set_grad_enabled(not fast):
            x = x.detach().clone().requires_grad_(not fast)
            denoised = self.wrapped(x, sigma, **extra_args)
            if not fast and not denoised.requires_grad:
                raise RuntimeError(_no_gradient("this model runs without gradients here"))
            loss, gradient = self._noisy_loss(x, sigma, step) if noisy else self._loss(denoised.detach(), step)
            if not fast:
                # In two steps, the second from a gradient of unit size: half precision would lose a weak loss.
                size = gradient.flatten(1).square().mean(1).sqrt()
                size = _per_sample(torch.where(size > 0, size, 1), x)
                gradient = torch.autograd.grad(denoised, x, gradient / size)[0] * size
        return denoised.detach().clone(), loss, gradient

    def _noisy_loss(self, x: Tensor, sigma: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The same of a loss on x itself."""
        with torch.enable_grad():
            variable = x.detach().clone().requires_grad_()
            scaled = self.model.model_sampling.calculate_input(sigma, variable)
            return _with_gradient(self.guidance.loss(scaled, step), variable)

    def _loss(self, denoised: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The loss `[B]` and its gradient with respect to x̂₀ `[B, …]`: sample i gets the gradient of loss i."""
        with torch.enable_grad():
            variable = denoised.detach().clone().requires_grad_()
            latent = variable if self.guidance.decode is None else self.model.process_latent_out(variable)
            seen = latent if self.guidance.decode is None else self.guidance.decode(latent)
            return _with_gradient(self.guidance.loss(seen, step), variable)

    def _free_coordinates(
        self, x: Tensor, sigma: Tensor, denoise_mask: Tensor | None = None, model_options: Any = None, **_: Any
    ) -> Tensor | None:
        """Where the denoise mask leaves the sampler a choice, `[B, …]` of bool; None where there is no mask."""
        if denoise_mask is None:
            return None
        function = (model_options or {}).get("denoise_mask_function")
        if function is not None:  # differential diffusion
            options = {"model": self.wrapped.inner_model, "sigmas": self.wrapped.sigmas}
            denoise_mask = function(sigma, denoise_mask, extra_options=options)
        return (denoise_mask > 0).expand_as(x)

    # Two things tell that a step is over: the draw that leads to the next entry of the schedule, and the next step's
    # callback. The sigma of a call does not: the second call of dpm_2_ancestral lies on, or below, the next entry.

    def _advance(self, sigma_next: float) -> None:
        ahead = range(self.step + 1, len(self.schedule) - 1)
        self.step = next((i for i in ahead if math.isclose(sigma_next, self.schedule[i], rel_tol=1e-4)), self.step)

    def callback(self, callback: Callable[[dict[str, Any]], None] | None) -> Callable[[dict[str, Any]], None]:
        def called(state: dict[str, Any]) -> None:
            self.step = state["i"]
            if callback is not None:
                callback(state)

        return called

    def noise_sampler(self, source: host.NoiseSampler) -> host.NoiseSampler:
        """`source`, turned towards the descent of the loss after each guided call of the model."""

        def draw(sigma: Tensor, sigma_next: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            noise = source(sigma, sigma_next, *args, **kwargs)
            self._advance(float(sigma_next))
            if self.latest is None:
                return noise
            gradient, free = self.latest.gradient.to(noise), self.latest.free
            norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
            usable = norm.isfinite() & (norm > 0)
            turned = on_sphere(noise, gradient, self.latest.guidance_rate, free)
            turned = torch.where(usable.reshape(-1, *[1] * (noise.ndim - 1)), turned, noise)
            self.trace.record(
                self.latest.step, self.latest.sigma, sigma_next, self.latest.loss, norm, usable, turned, free
            )
            return turned

        return draw


def _marked_constant(conds: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    mark = {_CONSTANT: CONDConstant(True)}
    return conds and [{**cond, "model_conds": {**cond.get("model_conds", {}), **mark}} for cond in conds]


def _model_calls(wrapper: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """A `model_function_wrapper` around the workflow's own, if it has one.

    What is marked constant runs without a graph; what is not must leave one.
    """

    def apply(apply_model: Callable[..., Tensor], parameters: dict[str, Any]) -> Tensor:
        x, c = parameters["input"], dict(parameters["c"])
        wanted = not c.pop(_CONSTANT, False) and x.requires_grad
        with torch.set_grad_enabled(wanted and torch.is_grad_enabled()):
            if wrapper is None:
                output = apply_model(x, parameters["timestep"], **c)
            else:
                output = wrapper(apply_model, {**parameters, "c": c})
        if wanted and not output.requires_grad:
            raise RuntimeError(_no_gradient("this model runs without gradients here"))
        return output

    return apply


def _with_gradient(loss: Tensor, variable: Tensor) -> tuple[Tensor, Tensor]:
    """`loss` `[B]` and its gradient with respect to `variable` `[B, …]`: zero where it does not depend on it."""
    gradient = None
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss.sum(), variable, allow_unused=True)
    return loss.detach(), torch.zeros_like(variable) if gradient is None else gradient


def _progress(model_sampling: Any, sigma: float) -> float:
    """The percent of the schedule at which it has `sigma`: `percent_to_sigma`, which falls, inverted by bisection."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if float(model_sampling.percent_to_sigma(middle)) > sigma else (low, middle)
    return (low + high) / 2


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm of each sample of `[B, …]`, shaped to broadcast over it."""
    return _per_sample(torch.linalg.vector_norm(x.flatten(1), dim=1), x)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """`[B]` in the dtype of `like` `[B, …]`, shaped to broadcast over it."""
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))
