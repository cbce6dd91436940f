"""What the pack needs to know about the ComfyUI that it runs in: the one place that knows that versions differ."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.k_diffusion import sampling as k_diffusion
from comfy.ldm.modules.attention import BasicTransformerBlock, attention_pytorch
from torch import Tensor

__all__ = [
    "NoiseSampler",
    "Probe",
    "Rehearsal",
    "additional_models",
    "adds_noise",
    "base_model",
    "chain",
    "controls",
    "encoded",
    "fitted",
    "guider",
    "keeps_changes",
    "kept_activations",
    "latent_dimensions",
    "loaded",
    "networks",
    "noise_source",
    "previewer",
    "rehearsed",
    "running_workflow",
    "sample_latent",
    "stochastic_samplers",
    "streamed_layers",
    "tell",
    "training_kernels",
    "with_differentiable_attention",
    "wrap_samplers",
]

NoiseSampler = Callable[[Tensor, Tensor], Tensor]

log = logging.getLogger("sphereguide")


# -- autograd ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def training_kernels() -> Iterator[None]:
    """Newer hosts take their differentiable kernels only while `model_management.in_training` is set.

    Some networks (Cosmos Predict 2, Anima) don't ask, and call fused kernels that have no backward pass: PyTorch's
    versions, which `comfy_kitchen` brings along, stand in for them.
    """
    management = comfy.model_management
    if not hasattr(management, "in_training"):
        yield
        return
    kitchen, kernels = sys.modules.get("comfy_kitchen"), _plain_kernels()
    before = management.in_training, {name: getattr(kitchen, name) for name in kernels}
    management.in_training = True
    try:
        for name, kernel in kernels.items():
            setattr(kitchen, name, kernel)
        yield
    finally:
        management.in_training = before[0]
        for name, kernel in before[1].items():
            setattr(kitchen, name, kernel)


@functools.cache
def _plain_kernels() -> dict[str, Callable[..., Any]]:
    """The rotary embeddings and modulations of `comfy_kitchen` in plain PyTorch, those that leave their input alone."""
    kitchen, eager = (sys.modules.get(f"comfy_kitchen{name}") for name in ("", ".backends.eager"))
    return {
        name: function
        for name, function in vars(eager or object).items()
        if str(getattr(function, "__module__", None)).endswith(("eager.rope", "eager.adaln"))
        and not name.endswith("_")
        and hasattr(kitchen, name)
    }


@contextlib.contextmanager
def kept_activations(module: torch.nn.Module) -> Iterator[None]:
    """Lets autograd keep what the transformer blocks of 2024 overwrite.

    Those add to their input in place (`x += n`) behind the norm that autograd keeps it for, so each norm gets a copy to
    keep: what addition out of place would have cost, and what it costs on newer hosts.
    """
    handles = []
    if _adds_in_place():
        blocks = (block for block in module.modules() if isinstance(block, BasicTransformerBlock))
        norms = (norm for block in blocks for norm in block.children() if isinstance(norm, torch.nn.LayerNorm))
        handles = [norm.register_forward_pre_hook(_copy_input) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@functools.cache
def _adds_in_place() -> bool:
    return "x += n" in inspect.getsource(BasicTransformerBlock)


def _copy_input(norm: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
    return (inputs[0].clone(),) if torch.is_grad_enabled() else None


def streamed_layers(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Layers whose weights the host makes ready for a call and lets go of again: they must do so in the backward pass.

    Those that it brings to the device (low VRAM, dynamic VRAM): the buffers are used again by other layers, behind
    autograd's back. And those that it casts (fp8): autograd would keep a copy of the whole model in a larger type.
    """
    device = comfy.model_management.get_torch_device()
    cast_to = getattr(module, "manual_cast_dtype", None)  # of a BaseModel

    def streamed(layer: torch.nn.Module) -> bool:
        cast = cast_to is not None and getattr(layer, "comfy_cast_weights", False)
        weights = list(layer.parameters(recurse=False))
        elsewhere = any(p.device.type != device.type for p in weights)
        return hasattr(layer, "_v") or elsewhere or (cast and any(p.dtype != cast_to for p in weights))

    return [layer for layer in module.modules() if streamed(layer)]


def out_of_memory(error: RuntimeError) -> bool:
    of_host = getattr(comfy.model_management, "is_oom", None)  # knows those of other devices too
    return isinstance(error, torch.cuda.OutOfMemoryError) or (of_host is not None and of_host(error))


def with_differentiable_attention(model_options: dict[str, Any]) -> dict[str, Any]:
    """`model_options` in which kernels without a backward pass (sage, flash of newer hosts) give way to PyTorch's.

    So do those that a model brings itself: some of them drop the graph and say nothing, and a gradient through what
    goes around them would be a wrong one.
    """
    management, options = comfy.model_management, model_options.get("transformer_options", {})
    names = ("sage", "flash", "comfy_kitchen")
    kernels = (getattr(management, f"{name}_attention_enabled", lambda: False) for name in names)
    theirs = options.get("optimized_attention_override")
    if theirs is None and not any(enabled() for enabled in kernels):
        return model_options

    def override(kernel: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in args[:3])  # q, k, v
        if theirs is not None:
            out = theirs(attention_pytorch if recorded else kernel, *args, **kwargs)
            if out.requires_grad or not recorded:
                return out
        return attention_pytorch(*args, **kwargs)

    return {**model_options, "transformer_options": {**options, "optimized_attention_override": override}}


# -- the objects behind a sampler function's `model` -------------------------------------------------------------------


def chain(model: Any) -> Iterator[Any]:
    """`model` and what it wraps: other packs' wrappers, `KSamplerX0Inpaint`, the guider, the `BaseModel`."""
    while model is not None:
        yield model
        if isinstance(model, torch.nn.Module):
            return
        # The pack's own wrappers pass for what they wrap, `inner_model` included.
        model = vars(model).get("wrapped") or getattr(model, "inner_model", None)


def base_model(model: Any) -> torch.nn.Module:
    """The `BaseModel` (it has `model_sampling` and `diffusion_model`) behind a sampler function's `model`."""
    return next(link for link in chain(model) if isinstance(link, torch.nn.Module))


def guider(model: Any) -> Any:
    """The guider (it has `conds` and `model_patcher`) behind a sampler function's `model`."""
    return next(link for link in chain(model) if hasattr(link, "conds"))


def controls(guider: Any) -> list[Any]:
    """The ControlNets and their like in the conditionings of a guider."""
    found: list[Any] = []
    for cond in (cond for conds in guider.conds.values() for cond in conds or ()):
        control = cond.get("control")
        while control is not None and control not in found:
            found.append(control)
            control = getattr(control, "previous_controlnet", None)
    return found


def networks(guider: Any) -> list[torch.nn.Module]:
    """All that a call of the guider may run: its model, its ControlNets, and what else it has loaded or holds."""
    held = [value for owner in (guider, *controls(guider)) for value in vars(owner).values()]
    held += [value.first_stage_model for value in held if hasattr(value, "first_stage_model")]  # encodes a hint
    patches = getattr(guider.model_patcher, "model_patches_models", list)()
    loaded = [patcher.model for patcher in (*additional_models(guider), *patches) if hasattr(patcher, "model")]
    return list(dict.fromkeys(module for module in (*held, *loaded) if isinstance(module, torch.nn.Module)))


def additional_models(guider: Any) -> list[Any]:
    """The patchers that the host loaded beside the guider's model for this run."""
    return list(getattr(guider, "loaded_models", None) or ())


def loaded(patchers: Iterable[Any]) -> int:
    """How many of these the host counts as loaded."""
    # By the network: a MODEL is loaded when a clone of it is.
    networks = {id(patcher.model) for patcher in comfy.model_management.loaded_models() if patcher is not None}
    return sum(id(getattr(patcher, "model", None)) in networks for patcher in patchers)


# -- samplers and their noise ------------------------------------------------------------------------------------------


def noise_source(sampler_function: Callable[..., Tensor], x: Tensor, sigmas: Tensor, seed: int | None) -> NoiseSampler:
    """The noise sampler that `sampler_function` makes for itself when it is given none.

    Which one that is, and with which arguments, can be read off the function: the SDE samplers name a Brownian tree,
    their `_gpu` twins one on the device; the others draw from `default_noise_sampler`, seeded on newer hosts.
    """
    function = inspect.unwrap(sampler_function)
    if "BrownianTreeNoiseSampler" in _globals_used(function):
        return k_diffusion.BrownianTreeNoiseSampler(
            x, sigmas[sigmas > 0].min(), sigmas.max(), seed=seed, cpu=not function.__name__.endswith("_gpu")
        )
    if "seed" in inspect.signature(k_diffusion.default_noise_sampler).parameters:
        if seed == 2**64 - 1:
            seed = -1  # the same to a generator, and newer hosts add 1 to it
        return k_diffusion.default_noise_sampler(x, seed=seed)
    return k_diffusion.default_noise_sampler(x)


def _globals_used(function: Callable[..., Any], seen: frozenset[str] = frozenset()) -> frozenset[str]:
    """Names of the globals that a function uses, and those that its module's functions use for it."""
    if not isinstance(function, FunctionType):
        return seen
    for name in set(function.__code__.co_names) - seen:
        used = function.__globals__.get(name)
        seen |= {name}
        if isinstance(used, FunctionType) and used.__module__ == function.__module__:
            seen |= _globals_used(inspect.unwrap(used), seen)
    return seen


@functools.cache
def stochastic_samplers() -> tuple[str, ...]:
    """Names of this host's samplers whose result depends on the noise that `noise_sampler` draws."""
    return tuple(
        name for name in comfy.samplers.KSampler.SAMPLERS if adds_noise(comfy.samplers.sampler_object(name)) is True
    )


def adds_noise(sampler: comfy.samplers.KSAMPLER) -> bool | None:
    """Whether what `noise_sampler` draws has an effect on the result of `sampler` with its options.

    Found by trying: a short schedule on a Gaussian, once with each of two noises. So `eta` = 0 counts as what it is,
    and so does a sampler that takes a `noise_sampler` to no effect. None where the trial itself failed, as it may for
    another pack's sampler that needs more of a model.
    """
    if "noise_sampler" not in inspect.signature(sampler.sampler_function).parameters:
        return False
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            sigmas = torch.tensor([10.0, 4.0, 1.0, 0.3, 0.0])
            quiet, loud = (_trial(sampler, size, _TrialModel(_unit, sigmas)) for size in (0.0, 1.0))
    except Exception:
        log.debug("sampler %r could not be tried", sampler.sampler_function, exc_info=True)
        return None
    return not torch.equal(quiet, loud)


@dataclass(frozen=True)
class Rehearsal:
    """What a sampler function does with a schedule, whatever the model.

    shares  c of x = μ + c·ε, by the number of the draw of ε: x is what it asks the model about next, or its result
    begins  the step, by the number of the model call with which it begins
    """

    shares: dict[int, float]
    begins: dict[int, int]


def rehearsed(function: Callable[..., Tensor], model: Any, sigmas: Tensor, options: dict[str, Any]) -> Rehearsal:
    """Found by a run of the sampler function on a model that answers zero. It tells nothing where that fails.

    `model` is the real one, whose noise levels the function may ask for. As for `adds_noise`, another pack's sampler
    may need more of it.
    """
    silent = _SilentModel(model, sigmas)

    def draw(sigma: Tensor, sigma_next: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        silent.draws += 1
        noise = sigmas.new_zeros(1, 1, 1, silent.width)  # each draw in a place of its own
        noise[..., (silent.draws - 1) % silent.width] = 1
        return noise

    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            x = inspect.unwrap(function)(
                silent,
                sigmas.new_zeros(1, 1, 1, silent.width),
                sigmas,
                extra_args={"seed": 0, "model_options": {}},
                callback=silent.course.told,
                disable=True,
                **{**options, "noise_sampler": draw},
            )
    except Exception:
        log.debug("sampler %r could not be rehearsed", function, exc_info=True)
        return Rehearsal({}, {})
    silent.saw(x)
    return Rehearsal(silent.shares, silent.course.begins)


class _Course:
    """The levels at which a sampler asks its model, and which of these calls begin a step."""

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas: list[float] = sigmas.tolist()
        self.levels: list[float] = []
        self.heard = 0  # calls until the latest callback
        self.begins: dict[int, int] = {}

    def told(self, state: dict[str, Any]) -> None:
        """The callback of a step, which some make after its first call, and some at its end.

        The step begins with the last call since the callback before that lies not below its level: heun's second calls
        lie at the next step's, those of dpm_2 in between, and a churned step begins above.
        """
        step = min(len(self.begins), len(self.sigmas) - 2)
        since = range(len(self.levels) - 1, self.heard - 1, -1)
        begun = (number for number in since if self.levels[number] >= (1 - 1e-4) * self.sigmas[step])
        number = next(begun, since[0] if since else None)
        if number is not None:
            self.begins[number] = step
        self.heard = len(self.levels)

    def at_level(self, number: int) -> bool:
        """Whether that call is at a level of the schedule."""
        return any(math.isclose(self.levels[number], sigma, rel_tol=1e-4) for sigma in self.sigmas)


class _SilentModel:
    """A sampler's model whose x̂₀ is zero, and what it was asked about."""

    def __init__(self, model: Any, sigmas: Tensor) -> None:
        self.wrapped = model
        self.course = _Course(sigmas)
        self.width = 8 * len(sigmas)
        self.draws = 0
        self.shares: dict[int, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def __call__(self, x: Tensor, sigma: Tensor, model_options: dict[str, Any] | None = None, **_: Any) -> Tensor:
        self.saw(x)
        self.course.levels.append(float(sigma.max()))
        return _after_cfg(torch.zeros_like(x), model_options)

    def saw(self, x: Tensor) -> None:
        if self.draws:
            self.shares.setdefault(self.draws - 1, float(x[..., (self.draws - 1) % self.width]))


def keeps_changes(sampler: comfy.samplers.KSAMPLER, at_levels: bool = False) -> bool | None:
    """Whether `sampler` goes on from the x that it asks the model about at the beginning of a step, if that is changed.

    With `at_levels` only where it asks at a level of the schedule. uni_pc asks about a copy, sa_solver corrects its
    state from earlier ones, dpm_fast asks at levels of its own. Found by trying, on a schedule of short steps. None
    where the trial tells nothing: it failed, makes noise of its own, or does not call back.
    """
    sigmas = torch.tensor([0.9 ** (1 + i) for i in range(8)])  # below 1, as those of flow models are
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            plain = _TrialModel(_half, sigmas)
            result = _trial(sampler, 0.0, plain)
            calls = [number for number, step in plain.course.begins.items() if 0 < step < 6]
            calls = [number for number in calls if plain.course.at_level(number) or not at_levels]
            runs = [_trial(sampler, 0.0, _TrialModel(_half, sigmas, change)) for change in (None, *calls)]
    except Exception:
        log.debug("sampler %r could not be tried", sampler.sampler_function, exc_info=True)
        return None
    changes = [run / result - 1 for run in runs[1:]]
    known = torch.equal(runs[0], result) and all(change.isfinite().all() for change in changes)
    if not plain.course.begins or not known:
        return None
    # Of a change by a hundredth, a multistep sampler's history, which it does not know of, leaves four fifths and more.
    return len(changes) >= 3 and all(float(change.min()) > 0.005 for change in changes)


def _unit(x: Tensor, sigma: Tensor) -> Tensor:
    """The denoiser of a unit Gaussian."""
    return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)


def _half(x: Tensor, sigma: Tensor) -> Tensor:
    """One for which a scaled state stays scaled by as much in all later steps."""
    return x / 2


def _trial(sampler: comfy.samplers.KSAMPLER, noise: float, model: _TrialModel) -> Tensor:
    function = inspect.unwrap(sampler.sampler_function)  # what a wrapper of ours wraps: the trial has no network
    options = dict(sampler.extra_options)
    if "noise_sampler" in inspect.signature(function).parameters:
        options["noise_sampler"] = lambda sigma, sigma_next: torch.full((1, 1, 2, 2), noise)
    sigmas = torch.tensor(model.course.sigmas)
    x = sigmas[0] * torch.tensor([[[[0.5, 0.8], [1.1, 1.4]]]])
    return function(model, x, sigmas, extra_args={"seed": 0}, callback=model.course.told, disable=True, **options)


class _TrialModel:
    """A denoiser, with as much of a guider around it as the host's samplers ask for.

    change  the number of a call in which x is scaled by 1.01, in place
    """

    def __init__(self, denoiser: Callable[[Tensor, Tensor], Tensor], sigmas: Tensor, change: int | None = None) -> None:
        class ModelSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
            pass

        self.model_sampling = ModelSampling()
        innermost = SimpleNamespace(model_sampling=self.model_sampling)
        self.inner_model = SimpleNamespace(model_patcher=self, inner_model=innermost)
        self.denoiser = denoiser
        self.change = change
        self.course = _Course(sigmas)

    def get_model_object(self, name: str) -> Any:
        return getattr(self, name)

    def __call__(self, x: Tensor, sigma: Tensor, model_options: dict[str, Any] | None = None, **_: Any) -> Tensor:
        if self.change == len(self.course.levels):
            x *= 1.01
        self.course.levels.append(float(sigma.max()))
        return _after_cfg(self.denoiser(x, sigma), model_options)


def _after_cfg(denoised: Tensor, model_options: dict[str, Any] | None) -> Tensor:
    """`denoised`, shown to the functions that look at what the model gives, of a sampler among others."""
    for function in (model_options or {}).get("sampler_post_cfg_function", []):
        denoised = function({"denoised": denoised, "uncond_denoised": denoised, "cond_denoised": denoised})
    return denoised


# -- sampling as the host's own nodes do it ----------------------------------------------------------------------------


def sample_latent(
    model: Any,
    latent: dict[str, Any],
    seed: int,
    cfg: float,
    sampler: comfy.samplers.KSAMPLER,
    sigmas: Tensor,
    positive: Any,
    negative: Any,
) -> dict[str, Any]:
    """LATENT for LATENT, with noise of the seed, its mask, its batch indices, progress and previews."""
    image = fitted(model, latent)
    noise = comfy.sample.prepare_noise(image, seed, latent.get("batch_index"))
    samples = comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        sampler,
        sigmas,
        positive,
        negative,
        image,
        noise_mask=latent.get("noise_mask"),
        callback=_latent_preview().prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not getattr(comfy.utils, "PROGRESS_BAR_ENABLED", True),
        seed=seed,
    )
    return {**{key: value for key, value in latent.items() if key not in _RATIOS}, "samples": samples}


_RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # of 2026: empty latents fit themselves to a model


def encoded(clip: Any, text: str) -> list[Any]:
    """The CONDITIONING of a text, as CLIPTextEncode makes it."""
    tokens = clip.tokenize(text)
    if hasattr(clip, "encode_from_tokens_scheduled"):  # since December 2024
        return clip.encode_from_tokens_scheduled(tokens)
    found, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    return [[found, {"pooled_output": pooled}]]


def fitted(model: Any, latent: dict[str, Any]) -> Tensor:
    """The samples of a LATENT; of an empty one with the channels, and on newer hosts the size, that the MODEL takes."""
    fix = comfy.sample.fix_empty_latent_channels
    given = [latent.get(name) for name in _RATIOS] if len(inspect.signature(fix).parameters) > 2 else []
    return fix(model, latent["samples"], *given)


def latent_dimensions(model: Any) -> int:
    """Of the latents of a MODEL, beside batch and channels: 2 for images, 3 for videos."""
    return getattr(model.model.latent_format, "latent_dimensions", 2)


def previewer(model: Any) -> Any:
    """What makes a small picture of latents (`decode_latent_to_preview`); None where previews are off."""
    return _latent_preview().get_previewer(model.load_device, model.model.latent_format)


def _latent_preview() -> ModuleType:
    try:
        import latent_preview
    except ImportError:  # PyPI's package of 2024
        from comfy.cmd import latent_preview
    return latent_preview


def tell(event: str, data: dict[str, Any]) -> None:
    """Sends an event to whoever queued the prompt that runs now: a page, or a program on the websocket.

    Where no server runs it, or nobody listens, nothing happens.
    """
    server = _server()
    if server is not None and server.client_id is not None:
        server.send_sync(event, {**data, "prompt_id": server.last_prompt_id}, server.client_id)


def running_workflow() -> str | None:
    """The id of the workflow that runs now: pages with several open at once give one to each. None from elsewhere."""
    queue = getattr(_server(), "prompt_queue", None)
    if queue is None:
        return None
    current = getattr(queue, "get_current_queue_volatile", queue.get_current_queue)  # the older copies what waits
    for _, _, _, found, *_ in current()[0]:
        for name in ("extra_pnginfo", "workflow", "id"):  # whoever queues it may send anything there
            found = found.get(name) if isinstance(found, dict) else None
        return found if isinstance(found, str) else None
    return None


def _server() -> Any:
    modules = (sys.modules.get(name) for name in ("server", "comfy.cmd.server"))  # the second: PyPI's package of 2024
    servers = (getattr(getattr(module, "PromptServer", None), "instance", None) for module in modules)
    return next(filter(None, servers), None)


class Probe(comfy.samplers.KSAMPLER):
    """Asks the model, and samples nothing: what a MODEL carries for its samplers leaves it alone."""


def wrap_samplers(model: Any, change: Callable[[comfy.samplers.KSAMPLER], comfy.samplers.KSAMPLER], title: str) -> Any:
    """A clone of the MODEL whose runs use `change(sampler)` for whatever sampler they are given.

    Raises RuntimeError, for the node of that title, on hosts before `comfy.patcher_extension`.
    """
    try:
        from comfy.patcher_extension import WrappersMP
    except ImportError:
        raise RuntimeError(
            f"{title} needs ComfyUI 0.3.8 (December 2024) or newer, where a model can carry a sampler's guidance. On "
            "this one use KSampler (DSG Guided), or DSG Guidance with SamplerCustom."
        ) from None

    def run(executor: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(executor.class_obj, Probe):
            executor.class_obj = change(executor.class_obj)  # the executor is this run's own
            executor.original = executor.class_obj.sample
        return executor(*args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "sphereguide", run)
    return model
