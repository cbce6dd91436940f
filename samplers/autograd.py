"""Makes a loaded ComfyUI model differentiable with respect to its input.

ComfyUI loads and runs models under ``torch.inference_mode()``. What is made there is an *inference tensor*: autograd
refuses to save it for the backward pass, for ever, and a copy of the weights would double the memory. `differentiable`
puts, for the duration of a block, ordinary tensors over the same storage in their place. No weight is copied, none
asks for a gradient, and everything is put back however the block ends.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from .. import host

__all__ = [
    "Recording",
    "differentiable",
    "normal",
    "one_by_one",
    "staying_out_of_inference_mode",
    "wants_lenience",
]


@dataclass(frozen=True)
class Recording:
    """Called as `recording(lenient=False, checkpointing=None)`: see `differentiable`.

    put_back    makes a block within which weights and modes are as they were: for the host to load models in
    """

    put_back: Callable[[], contextlib.AbstractContextManager[None]]

    def __call__(
        self, lenient: bool = False, checkpointing: nn.Module | None = None
    ) -> contextlib.AbstractContextManager[None]:
        return _recording(lenient, checkpointing)


@contextlib.contextmanager
def differentiable(*modules: nn.Module, holders: Iterable[Any] = ()) -> Iterator[Recording]:
    """Within the block, the modules can be differentiated with respect to their input.

    The whole block runs outside of inference mode and without gradients: what a network keeps from a call that records
    nothing may serve in one that does. Yields `recording(lenient=False, checkpointing=None)`, a context manager for a
    forward pass *and* its backward pass. What it then refuses (see `wants_lenience`) is legal with `lenient`: in-place
    operations on what autograd keeps, and inference tensors that no module holds. Each operation then passes through
    Python, so that a small model takes twice the time. The blocks of `checkpointing`, a diffusion model, forget their
    activations and compute them again in the backward pass: less memory, about one more forward pass.

    modules        loaded models: a `BaseModel`, a VAE's `first_stage_model`, a loss. Weights keep their storage.
    holders        objects whose attributes enter the forward pass: a guider with its conditionings, an inpainting
                   wrapper with its noise and latent image, what another pack wraps around the model. Inference tensors
                   in them are cloned for the block.

    Raises RuntimeError for weights of a tensor subclass that does not tell what it is made of.
    """
    mode = torch.is_inference_mode_enabled()
    with contextlib.ExitStack() as stack:
        weights = stack.enter_context(contextlib.ExitStack())

        def put() -> None:
            recomputed = []
            for module in modules:
                recomputed += host.streamed_layers(module)
                weights.enter_context(_normal_weights(module))
                weights.enter_context(host.kept_activations(module))
            weights.enter_context(_recomputing(recomputed))

        @contextlib.contextmanager
        def put_back() -> Iterator[None]:
            weights.close()
            with torch.inference_mode(mode):
                yield
            put()

        put()
        for holder in holders:
            stack.enter_context(_normal_attributes(holder))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield Recording(put_back)


@contextlib.contextmanager
def _recording(lenient: bool, checkpointing: nn.Module | None) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(_recomputing(_blocks(checkpointing) if checkpointing is not None else ()))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(host.training_kernels())
        if lenient:
            stack.enter_context(_mutation())
            stack.enter_context(_Normal())
        else:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_Saved, _unwritten))
        yield


def wants_lenience(error: RuntimeError) -> bool:
    """Whether a recording failed of what a lenient one does."""
    return any(sign in str(error).lower() for sign in (_WRITTEN, _INFERENCE))


_WRITTEN, _INFERENCE = "inplace operation", "inference tensor"  # in torch's own messages


@contextlib.contextmanager
def staying_out_of_inference_mode() -> Iterator[None]:
    """Within the block, this thread does not enter inference mode: packs for tiled diffusion call a model in it."""
    enter, thread = torch.inference_mode.__enter__, threading.get_ident()

    def stay(self: torch.inference_mode) -> None:
        if threading.get_ident() == thread:
            self._inference_mode_context = contextlib.nullcontext()
        else:
            enter(self)

    with mock.patch.object(torch.inference_mode, "__enter__", stay):
        yield


class _Saved:
    """A tensor that autograd keeps for the backward pass: the tensor itself, or its copy once that was written to.

    Without its place in the graph: with it, a tensor that is written to in place holds the graph that holds it, and
    where no backward pass comes to its end (it fails, or the run is cancelled) nothing would ever free either.
    """

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version


def _unwritten(saved: _Saved) -> Tensor:
    """What was saved. Raises RuntimeError, as autograd does of what it keeps itself, if it was written to since."""
    if saved.tensor._version != saved.version:
        raise RuntimeError(_WRITTEN)
    return saved.tensor


@contextlib.contextmanager
def _mutation() -> Iterator[None]:
    """Within the block, what autograd keeps is copied before an in-place operation writes to it.

    torch's `allow_mutation_on_saved_tensors` can't serve: it knows a tensor by its addresses, which those of a copied
    and freed one hand on to the next, and misses a write through a view that starts elsewhere in the same storage.
    Either gives a wrong gradient and no error.
    """
    # By storage. Weakly: a graph that is gone needs nothing any more.
    graphs: defaultdict[int, weakref.WeakSet[_Saved]] = defaultdict(weakref.WeakSet)

    def save(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        if (key := _storage(tensor)) is not None:
            graphs[key].add(saved)
        return saved

    class CopyBeforeWrite(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            for place, name in _written(operation):
                for tensor in tree_leaves(args[place] if place < len(args) else kwargs.get(name)):
                    key = _storage(tensor) if isinstance(tensor, Tensor) else None
                    if key in graphs:
                        _copy(graphs[key])
                        del graphs[key]  # now: a copy that runs out of memory leaves the others to be made
            return operation(*args, **kwargs)

    with torch.autograd.graph.saved_tensors_hooks(save, lambda saved: saved.tensor), CopyBeforeWrite():
        yield


class _Normal(TorchFunctionMode):
    """Within the block, an inference tensor that enters an operation is a normal one over the same storage."""

    active: ClassVar[list[_Normal]] = []  # for what runs again in the backward pass, where no mode is on

    def __init__(self) -> None:
        super().__init__()
        self.aliases: dict[int, tuple[Tensor, Tensor]] = {}  # with the tensor, so that its id stays its own

    def __enter__(self) -> _Normal:
        self.active.append(self)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.active.pop()
        super().__exit__(*exception)

    def alias(self, tensor: Tensor) -> Tensor:
        if not tensor.is_inference():
            return tensor
        if id(tensor) not in self.aliases:
            self.aliases[id(tensor)] = tensor, _alias(tensor)
        return self.aliases[id(tensor)][1]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, self.alias, (args, kwargs or {}))
        return function(*args, **kwargs)


def _storage(tensor: Tensor) -> int | None:
    """Which memory the tensor lies in. None for those that lie in none of their own, as sparse ones do."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else None


@functools.cache
def _written(operation: Any) -> list[tuple[int, str]]:
    """Place and name of the arguments that the operation writes to."""
    arguments = enumerate(operation._schema.arguments)
    return [(place, a.name) for place, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def _copy(graph: Iterable[_Saved]) -> None:
    copies: dict[tuple[Any, ...], Tensor] = {}
    for saved in graph:
        tensor = saved.tensor
        view = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()
        if view not in copies:  # several operations keep the same tensor
            copies[view] = tensor.clone()
        saved.tensor = copies[view]


def normal(value: Any) -> Any:
    """`value` with each inference tensor in it cloned to a normal one; containers are copied only where that is needed.

    Looks into dicts, lists, tuples and ComfyUI's conditioning objects (`comfy.conds.COND…`, which hold `.cond`).
    """
    if isinstance(value, Tensor):
        if not value.is_inference():
            return value
        with torch.inference_mode(False):
            return value.clone()
    if type(value) is dict:
        items = {key: normal(item) for key, item in value.items()}
        return items if any(items[key] is not value[key] for key in items) else value
    if type(value) in (list, tuple):
        items = [normal(item) for item in value]
        return type(value)(items) if any(a is not b for a, b in zip(items, value, strict=True)) else value
    if type(value).__module__.endswith("comfy.conds"):
        cond = normal(value.cond)
        if cond is value.cond:
            return value
        value = copy.copy(value)
        value.cond = cond
    return value


@contextlib.contextmanager
def _normal_weights(module: nn.Module) -> Iterator[None]:
    """Parameters, buffers and tensor attributes of `module` as normal tensors over the same storage."""
    swapped: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
    aliases: dict[int, Tensor] = {}
    try:
        with torch.inference_mode(False), torch.no_grad():
            for child in module.modules():
                for slot in (child._parameters, child._buffers, vars(child)):
                    for name, tensor in slot.items():
                        if not isinstance(tensor, Tensor):
                            continue
                        if not tensor.is_inference() and not tensor.requires_grad:
                            continue
                        if id(tensor) not in aliases:  # tied weights stay tied
                            aliases[id(tensor)] = _alias(tensor)
                        swapped.append((slot, name, tensor, aliases[id(tensor)]))
            for slot, name, _, alias in swapped:
                slot[name] = alias
        yield
    finally:
        for slot, name, tensor, alias in swapped:
            # Where the host moved the weight meanwhile (`.to()` in an eviction), the old tensor names the old device.
            if slot.get(name) is alias and alias.data_ptr() == tensor.data_ptr():
                slot[name] = tensor


def _alias(tensor: Tensor) -> Tensor:
    """A normal tensor over the storage of `tensor`, a frozen Parameter if that is what `tensor` is."""
    data = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    if type(data) is Tensor:
        alias = torch.empty(0, dtype=data.dtype, device=data.device)
        alias.set_(data.untyped_storage(), data.storage_offset(), data.size(), data.stride())
    elif hasattr(data, "__tensor_flatten__"):  # quantized weights: a shell around plain tensors
        names, context = data.__tensor_flatten__()
        inner = {name: _alias(getattr(data, name)) for name in names}
        alias = type(data).__tensor_unflatten__(inner, context, data.size(), data.stride())
    else:
        raise RuntimeError(
            f"The model has weights of type {type(data).__name__}, through which no gradient can be taken here. "
            "Load it in another format, or set gradient to 'fast', which needs no backward pass through the model."
        )
    if isinstance(tensor, nn.Parameter):
        alias = nn.Parameter(alias, requires_grad=False)
    vars(alias).update(vars(tensor))  # newer hosts note on a weight how it is to be cast
    return alias


@contextlib.contextmanager
def _normal_attributes(holder: Any) -> Iterator[None]:
    before = dict(vars(holder))
    clones = {name: clone for name, value in before.items() if (clone := normal(value)) is not value}
    try:
        vars(holder).update(clones)
        yield
    finally:
        for name, clone in clones.items():
            if vars(holder).get(name) is clone:
                setattr(holder, name, before[name])


@contextlib.contextmanager
def _recomputing(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, the modules keep nothing but their input, and run again in the backward pass."""
    before = {module: vars(module).get("forward") for module in modules}
    try:
        for module in before:
            module.forward = _recomputed(module.forward)
        yield
    finally:
        for module, forward in before.items():
            del module.forward
            if forward is not None:  # another pack's
                module.forward = forward


def _blocks(diffusion_model: nn.Module) -> Iterator[nn.Module]:
    """The repeated units of a diffusion model.

    ComfyUI's U-Net never calls its `TimestepEmbedSequential`s but their children one by one; a transformer calls the
    entries of its block lists.
    """
    for child in diffusion_model.children():
        entries = child if isinstance(child, nn.ModuleList) else [child] if isinstance(child, nn.Sequential) else []
        for entry in entries:
            yield from entry if isinstance(entry, nn.Sequential) else [entry]


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # A dict is a leaf, and copied: the host writes each block's position into one shared dict of options.
        values, shape = tree_flatten(
            (args, kwargs), is_leaf=lambda value: isinstance(value, dict) and value is not kwargs
        )
        values = [dict(value) if isinstance(value, dict) else value for value in values]
        places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
        tensors = [values[i] for i in places]
        for i in places:
            values[i] = None  # kept by autograd, which frees them

        def block(*tensors: Tensor) -> Any:
            filled = list(values)
            for i, tensor in zip(places, tensors, strict=True):
                filled[i] = tensor
            args, kwargs = tree_unflatten(filled, shape)
            with _Normal.active[-1] if _Normal.active else contextlib.nullcontext():
                return forward(*args, **kwargs)

        return _Recomputed.apply(block, *tensors)

    return run


def one_by_one(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`function` of a batch, called for each sample alone, and again in the backward pass: it takes memory for one."""
    recomputed = _recomputed(function)
    return lambda batch: torch.cat([recomputed(one) for one in batch.split(1)]) if len(batch) > 1 else function(batch)


class _Recomputed(torch.autograd.Function):
    """Calls a function without keeping its activations, and calls it again in the backward pass.

    `torch.utils.checkpoint` can't serve. Without reentry it keeps what it recomputes where neither the version check
    nor `_mutation` sees it, so a block that adds in place gets a wrong gradient and no error.
    With reentry it refuses `torch.autograd.grad`.
    """

    @staticmethod
    def forward(ctx: Any, block: Callable[..., Any], *tensors: Tensor) -> Any:
        ctx.block = block
        ctx.save_for_backward(*tensors)
        return block(*(tensor.clone() for tensor in tensors))  # Flux's blocks add to their input in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [
            tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        ]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        with torch.enable_grad():
            outputs = ctx.block(*(leaf.clone() for leaf in leaves))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # SD 3's last block returns None for the text.
        pairs = [pair for pair in zip(outputs, gradients, strict=True) if getattr(pair[0], "requires_grad", False)]
        outputs, gradients = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True))
        return None, *(next(found) if leaf.requires_grad else None for leaf in leaves)
