"""Custom nodes that break things, and one that looks at what was left behind.

Not of the pack: tests write this file into the `custom_nodes` of a server of their own, whose process runs it.
"""

from __future__ import annotations

import copy
import functools
import gc
import hashlib
import importlib.util
import json
import random
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.samplers
import numpy as np
import torch
from torch import Tensor, nn

MESSAGE = "this fault was ordered"
NO_MEMORY = f"Allocation on device: {MESSAGE}"
NO_HOST_MEMORY = f"[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: {MESSAGE}"


# -- faults ------------------------------------------------------------------------------------------------------------


class Strike:
    """A fault that strikes at call `first`, counted from 0, and at the `times - 1` after it. Called with a tensor, it
    returns what becomes of that.
    """

    # Of all, since `LookAtWhatIsLeft` looked: how often they struck, and how often they were called after that.
    struck = after = 0

    def __init__(self, kind: str, first: int, times: int) -> None:
        self.kind, self.first, self.times = kind, first, times
        self.calls = 0

    def __call__(self, value: Tensor) -> Tensor:
        self.calls += 1
        Strike.after += Strike.struck > 0
        if not self.first < self.calls <= self.first + self.times:
            return value
        Strike.struck += 1
        return KINDS[self.kind](value)


def raises(error: Callable[[], BaseException]) -> Callable[[Tensor], Tensor]:
    def strike(value: Tensor) -> Tensor:
        raise error()

    return strike


def multiplies(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda value: value * factor


def interrupted() -> BaseException:
    """What the host raises where it finds that Cancel was clicked."""
    module = sys.modules.get("comfy.interruption", comfy.model_management)  # the first: PyPI's package of 2024
    return module.InterruptProcessingException()


def cancel(value: Tensor) -> Tensor:
    """What the Cancel button does, from within: so it comes at this very moment."""
    server, state = server_module().PromptServer.instance, random.getstate()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    opener.open(urllib.request.Request(f"http://127.0.0.1:{server.port}/interrupt", b"", method="POST"), timeout=30)
    random.setstate(state)  # the packaged host numbers its spans with it, in another thread
    return value


def evict(value: Tensor) -> Tensor:
    comfy.model_management.unload_all_models()
    return value


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "raises": raises(lambda: ValueError(MESSAGE)),
    "out of memory": raises(lambda: torch.cuda.OutOfMemoryError(NO_MEMORY)),
    "out of host memory": raises(lambda: RuntimeError(NO_HOST_MEMORY)),
    "interrupted": raises(interrupted),
    "cancel": cancel,
    "evict": evict,
    "NaN": multiplies(torch.nan),
    "infinite": multiplies(torch.inf),
}


class _InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, strike: Strike) -> Tensor:
        ctx.strike = strike
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.strike(gradient), None


def struck(value: Tensor, strike: Strike, where: str) -> Tensor:
    return strike(value) if where == "forward" else _InBackward.apply(value, strike)


class FaultyLoss(nn.Module):
    def __init__(self, loss: Any, strike: Strike, where: str) -> None:
        super().__init__()
        self.loss, self.strike, self.where = loss, strike, where
        self.space, self.patchers, self.weight = loss.space, loss.patchers, loss.weight

    def forward(self, images: Tensor, step: Any = None) -> Tensor:
        return struck(self.loss(images, step), self.strike, self.where)


class FaultyDecoder(nn.Module):
    """A VAE's network, as far as decoding goes."""

    def __init__(self, network: nn.Module, strike: Strike, where: str) -> None:
        super().__init__()
        self.network, self.strike, self.where = network, strike, where

    def decode(self, latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.network.decode(struck(latents, self.strike, self.where), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.network, name)


FAULT = {
    "fault": (list(KINDS),),
    "where": (["forward", "backward"],),
    "first": ("INT", {"default": 0, "min": 0, "max": 1000}),
    "times": ("INT", {"default": 1, "min": 0, "max": 1000}),
    "salt": ("INT", {"default": 0, "min": 0, "max": 2**31}),  # another number makes the node run again
}


class Node:
    CATEGORY = "tests"
    FUNCTION = "run"
    KIND: str

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {cls.KIND.lower(): (cls.KIND,), **FAULT}}

    def __init_subclass__(cls) -> None:
        if hasattr(cls, "KIND"):
            cls.RETURN_TYPES = (cls.KIND,)


class FaultLoss(Node):
    KIND = "GUIDANCE_LOSS"

    def run(self, guidance_loss: Any, fault: str, where: str, first: int, times: int, salt: int) -> tuple[Any]:
        return (FaultyLoss(guidance_loss, Strike(fault, first, times), where),)


class FaultVAE(Node):
    KIND = "VAE"

    def run(self, vae: Any, fault: str, where: str, first: int, times: int, salt: int) -> tuple[Any]:
        faulty = copy.copy(vae)
        faulty.first_stage_model = FaultyDecoder(vae.first_stage_model, Strike(fault, first, times), where)
        return (faulty,)


class FaultModel(Node):
    """In the midst of the network: behind its second to last block."""

    KIND = "MODEL"

    def run(self, model: Any, fault: str, where: str, first: int, times: int, salt: int) -> tuple[Any]:
        strike = Strike(fault, first, times)

        def patch(h: Tensor, skip: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
            number = options["block"][1]
            return (struck(h, strike, where) if number == 1 else h), skip

        model = model.clone()
        model.set_model_output_block_patch(patch)
        return (model,)


class FaultSampler(Node):
    """Between steps: in the callback, where the page's previews are made."""

    KIND = "SAMPLER"

    def run(self, sampler: Any, fault: str, where: str, first: int, times: int, salt: int) -> tuple[Any]:
        strike, function = Strike(fault, first, times), sampler.sampler_function

        @functools.wraps(function)
        def sample(model: Any, x: Tensor, sigmas: Tensor, callback: Any = None, **kwargs: Any) -> Tensor:
            def between(state: dict[str, Any]) -> None:
                strike(state["denoised"])
                if callback is not None:
                    callback(state)

            return function(model, x, sigmas, callback=between, **kwargs)

        return (comfy.samplers.KSAMPLER(sample, dict(sampler.extra_options), dict(sampler.inpaint_options)),)


class Witness:
    """Looks at the random numbers of Python and numpy right before and after the sampler runs, however it ends: between
    nodes, hosts draw some of their own.
    """

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "run", ("SAMPLER",)
    changed: set[str] = set()  # since `LookAtWhatIsLeft` looked

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"sampler": ("SAMPLER",)}}

    def run(self, sampler: Any) -> tuple[Any]:
        function = sampler.sampler_function

        @functools.wraps(function)
        def sample(*args: Any, **kwargs: Any) -> Tensor:
            before = states()
            try:
                return function(*args, **kwargs)
            finally:
                Witness.changed |= {name for name, state in states().items() if state != before[name]}

        return (comfy.samplers.KSAMPLER(sample, dict(sampler.extra_options), dict(sampler.inpaint_options)),)


def states() -> dict[str, str]:
    return {"random": digest(repr(random.getstate())), "numpy": digest(repr(np.random.get_state()))}


class ReloadSphereGuide:
    """What packs for developers do when a file has changed: import it anew, while the server goes on."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "run", ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"latent": ("LATENT",), "salt": FAULT["salt"]}}

    def run(self, latent: Any, salt: int) -> tuple[Any]:
        (name,) = (
            name
            for name, module in sys.modules.items()
            if "WEB_DIRECTORY" in (known := getattr(module, "__dict__", {}))
            and "SphereGuideDSG" in known.get("NODE_CLASS_MAPPINGS", ())
        )
        folder = Path(sys.modules[name].__file__).parent
        for other in [other for other in sys.modules if other == name or other.startswith(f"{name}.")]:
            del sys.modules[other]
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        execution = sys.modules.get("execution") or sys.modules["comfy.cmd.execution"]
        execution.nodes.NODE_CLASS_MAPPINGS.update(module.NODE_CLASS_MAPPINGS)
        return (latent,)


class NoiseOfEachSample:
    """A SAMPLER whose noise for sample i depends on `first + i` and the noise level: on nothing else of the batch."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "run", ("SAMPLER",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        first = ("INT", {"default": 0, "min": 0, "max": 64})
        return {"required": {"sampler": ("SAMPLER",), "latent": ("LATENT",), "first": first}}

    def run(self, sampler: Any, latent: dict[str, Tensor], first: int) -> tuple[Any]:
        batch, *shape = latent["samples"].shape

        def draw(sigma: Tensor, sigma_next: Tensor) -> Tensor:
            keys = [int(1000 * float(sigma)) * 64 + first + i for i in range(batch)]
            return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(key)) for key in keys])

        options = {**sampler.extra_options, "noise_sampler": draw}
        return (comfy.samplers.KSAMPLER(sampler.sampler_function, options, dict(sampler.inpaint_options)),)


# -- what is left ------------------------------------------------------------------------------------------------------


class LookAtWhatIsLeft:
    """Hands a latent on, and tells what the model, the VAE and the process are like."""

    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "tests", "run", True, ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "vae": ("VAE",),
                "clip": ("CLIP",),
                "latent": ("LATENT",),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**31}),
                "batch": ("INT", {"default": 1, "min": 1, "max": 64}),
                "salt": FAULT["salt"],
            }
        }

    def run(
        self, model: Any, vae: Any, clip: Any, latent: dict[str, Tensor], seed: int, batch: int, salt: int
    ) -> dict[str, Any]:
        networks = {"model": model.model, "vae": vae.first_stage_model, "clip": clip.cond_stage_model}
        shape = (batch, *latent["samples"].shape[1:])
        found = {
            "weights": {name: weights(network) for name, network in networks.items()},
            "objects": {name: objects(network) for name, network in networks.items()},
            "hooks": {name: hooks(network) for name, network in networks.items()},
            "patches": patches(model),
            "process": process(),
            "random": sorted(Witness.changed),
            "drawn": drawn(seed, shape),
            "struck": [Strike.struck, Strike.after],
            "tensors": tensors(),
        }
        Strike.struck = Strike.after = 0
        Witness.changed = set()
        return {"ui": {"text": [json.dumps(found)]}, "result": (latent,)}


def digest(value: str | bytes) -> str:
    return hashlib.sha1(value.encode() if isinstance(value, str) else value).hexdigest()


def objects(network: nn.Module) -> list[list[int]]:
    """Of each parameter and buffer: which object it is, and where it lies."""
    return [[id(tensor), tensor.data_ptr()] for tensor in (*network.parameters(), *network.buffers())]


def weights(network: nn.Module) -> dict[str, list[Any]]:
    """Of each parameter and buffer: its bytes, and how autograd sees it."""
    slots = [*network.named_parameters(), *network.named_buffers()]
    return {
        name: [
            digest(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()),
            tensor.is_inference(),
            tensor.requires_grad,
            tensor.grad is None,
        ]
        for name, tensor in slots
    }


def hooks(network: nn.Module) -> dict[str, Any]:
    """Whatever of a module is of this object alone, and not of its class: hooks, and functions put over methods."""
    found = {}
    for name, module in network.named_modules():
        counts = {key: len(value) for key, value in vars(module).items() if "hooks" in key and value}
        own = sorted(key for key, value in vars(module).items() if callable(value) and not isinstance(value, nn.Module))
        found[name] = [counts, own, module.training]
    return found


def patches(model: Any) -> dict[str, Any]:
    """How much a MODEL carries: patches, wrappers, callbacks, options."""

    def size(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): size(item) for key, item in value.items()}
        return len(value) if isinstance(value, (list, tuple)) else type(value).__name__

    names = ("patches", "object_patches", "backup", "object_patches_backup", "model_options", "wrappers", "callbacks")
    return {name: size(getattr(model, name, None)) for name in names}


def process() -> dict[str, Any]:
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    kitchen = sys.modules.get("comfy_kitchen")
    return {
        "inference mode": torch.is_inference_mode_enabled(),
        "gradients": torch.is_grad_enabled(),
        "modes": len(_get_current_dispatch_mode_stack()),
        "enter": torch.inference_mode.__enter__.__qualname__,
        "in training": getattr(comfy.model_management, "in_training", None),
        "kernels": {name: id(value) for name, value in vars(kitchen or object).items() if callable(value)},
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": str(torch.get_default_dtype()),
    }


def drawn(seed: int, shape: tuple[int, ...], most: int = 64) -> int:
    """How many noises a run of that seed has drawn from torch's own generator, its first included; -1: something else
    was drawn, or none.
    """
    state = torch.random.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for count in range(most):
            if torch.equal(torch.random.get_rng_state(), state):
                return count
            torch.randn(shape)
    return -1


def tensors() -> list[int]:
    """How many tensors the process holds, and how many have a graph."""
    gc.collect()
    found = list(_tensors())
    return [len(found), sum(tensor.grad_fn is not None for tensor in found)]


def _tensors() -> Iterator[Tensor]:
    for value in gc.get_objects():
        if issubclass(type(value), Tensor):  # not isinstance, which would wake lazy objects
            yield value


class Fingerprint:
    """Tells a latent's bits."""

    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "tests", "run", True, ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"samples": ("LATENT",)}}

    def run(self, samples: dict[str, Tensor]) -> dict[str, Any]:
        latents = samples["samples"].detach().float().contiguous()
        finite = "finite" if latents.isfinite().all() else "not finite"
        return {"ui": {"text": [*(digest(latent.numpy().tobytes()) for latent in latents), finite]}}


def server_module() -> Any:
    return sys.modules.get("server") or sys.modules["comfy.cmd.server"]


NODES = (
    FaultLoss,
    FaultVAE,
    FaultModel,
    FaultSampler,
    Witness,
    ReloadSphereGuide,
    NoiseOfEachSample,
    LookAtWhatIsLeft,
    Fingerprint,
)
NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES}
