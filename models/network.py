"""Auxiliary networks under ComfyUI's model management."""

from __future__ import annotations

import contextlib
import importlib
import logging
import pickle
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.model_management
import comfy.model_patcher
import folder_paths
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules import module as modules

log = logging.getLogger("sphereguide")

OWN = Path(__file__).resolve().parent.parent / "demo" / "weights"
"""Networks that come with the pack, in folders named like those of `models`."""

PUT = "Put it there and press R in ComfyUI, or choose another."

#: A network may have twice the numbers and the tensors of its weights file, and these. In float32 that is 1 GB: enough
#: for a file of one architecture of torchvision that is loaded as another, whose error then says so.
ROOM, PARTS = 2**28, 20_000

__all__ = [
    "TooLarge",
    "bounded",
    "built",
    "choices",
    "load_weights",
    "managed",
    "models_folder",
    "needs",
    "path_of",
    "shortened",
]


class _Whole(comfy.model_patcher.ModelPatcher):
    """Loads and leaves as one.

    In parts is for the host's own layers, which fetch their weights for a call: others would lie on two devices.
    """

    def partially_load(self, device_to: Any, extra_memory: float = 0, **options: Any) -> Any:
        return super().partially_load(device_to, extra_memory=1e32, **options)

    def partially_unload(self, *args: Any, **options: Any) -> int:
        return 0  # and the host unloads it

    def patch_model_lowvram(self, device_to: Any = None, **_: Any) -> Any:  # of the host of 2024
        return self.patch_model(device_to)


def managed(module: nn.Module) -> Any:
    """A ModelPatcher over `module` (frozen, in evaluation mode): ComfyUI counts, moves and evicts it like its own."""
    module.eval().requires_grad_(False)
    management = comfy.model_management
    return _Whole(module, load_device=management.get_torch_device(), offload_device=management.unet_offload_device())


def models_folder(name: str) -> None:
    """Register `models/<name>`, and make it, so that people find where to put their files; and what the demo brings."""
    folder = Path(folder_paths.models_dir) / name
    with contextlib.suppress(OSError):  # a read-only installation: an empty list will say where files belong
        folder.mkdir(parents=True, exist_ok=True)
    registry = folder_paths.folder_names_and_paths
    if name not in registry:
        registry[name] = ([], set(folder_paths.supported_pt_extensions))
    paths = registry[name][0]  # extended in place: assigning again loses the order on the host of 2024
    own = [str(OWN / name)] if (OWN / name).is_dir() else []
    paths += [path for path in (str(folder), *own) if path not in paths]


def choices(name: str, contains: str = "config.json") -> list[str]:
    """What lies under `models/<name>`: weights files, and folders (with a `/` behind them) that hold `contains`."""
    found: dict[str, None] = {}
    for root in map(Path, folder_paths.get_folder_paths(name)):  # the pack's own is the last, and no one's default
        folders = sorted(path.parent for path in root.glob(f"**/{contains}") if path.parent != root)
        here = {f"{folder.relative_to(root).as_posix()}/" for folder in folders}
        for path in root.glob("**/*"):
            inside = any(folder in path.parents for folder in folders)
            if path.suffix in folder_paths.supported_pt_extensions and not inside:
                here.add(path.relative_to(root).as_posix())
        found |= dict.fromkeys(sorted(here))
    return list(found)


def path_of(name: str, choice: str, title: str, advice: str = PUT) -> Path:
    """The file or folder that `choice` of `choices(name)` stands for.

    Raises FileNotFoundError, for the node of that title, if it is gone, with `advice` where to get it, and ValueError
    for one outside of the folder.
    """
    choice = choice.encode(errors="replace").decode()  # half a character stops the host that reports it
    shown = shortened(choice, 200)
    for root in map(Path, folder_paths.get_folder_paths(name)):
        try:
            path, top = (root / choice).resolve(), root.resolve()
            exists = path.exists()
            inside = top in path.parents
            # A loader of folders takes what it finds there.
            inside &= not exists or all(top in entry.resolve().parents for entry in path.rglob("*"))
        except (OSError, ValueError, RuntimeError):  # a name that no file can have, or links in a circle
            break
        if not inside:
            raise ValueError(
                f"{title}: '{shown}' lies outside of models/{name}, or is a link that leads there. Put it into that "
                "folder, and choose it again."
            )
        if exists:
            return path
    places = ", ".join(folder_paths.get_folder_paths(name))
    raise FileNotFoundError(f"{title}: '{shown}' is not in models/{name} (looked in {places}). {advice}")


def load_weights(path: Path, title: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a .pt/.pth file, which is read without running code.

    Raises ValueError, for the node of that title, for a file that is damaged or holds anything else.
    """
    try:
        if path.suffix in (".safetensors", ".sft"):
            return load_file(path)
        _check_unpacked(path)
        if torch.__version__ < "2.10":
            log.warning(
                "%s: PyTorch %s has a known hole in reading files such as %s (CVE-2026-24747). Take them from those "
                "you trust alone, or as .safetensors, or update PyTorch to 2.10.",
                title,
                torch.__version__,
                path,
            )
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{title}: {path} is broken or holds more than weights, and is not read, since that could run code. Get it "
            "again, best as .safetensors, or save its state_dict alone."
        ) from error
    except Exception as error:  # what a reader says of bytes that it was not made for can be of any type
        raise ValueError(
            f"{title}: {path} can't be read, it may be a broken download. Get it again. ({shortened(error)})"
        ) from error
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else weights
    if not isinstance(weights, dict) or not all(isinstance(key, str) and _plain(w) for key, w in weights.items()):
        raise ValueError(
            f"{title}: {path} holds a {type(weights).__name__}, and not weights by name (a state_dict). Load another "
            "file."
        )
    return weights


def _check_unpacked(path: Path) -> None:
    """Raises ValueError for an archive that gets many times as large in memory as it is on the disk."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > 4 * path.stat().st_size + 2**26:
            raise ValueError(f"it would take {size / 2**30:.3g} GB unpacked")


def _plain(value: Any) -> bool:
    """Whether it is a tensor like those of safetensors: whole, in memory, and all of it there."""
    if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.is_meta:
        return False
    return not value.is_quantized and value.numel() * value.element_size() <= value.untyped_storage().nbytes() + 2**20


class TooLarge(ValueError):
    """A network that was asked for is larger than its weights can fill. The message is for the page."""


def built(build: Callable[[], nn.Module], weights: Iterable[Any], path: Path, title: str) -> nn.Module:
    """`build()`, for weights (anything with a `shape`) of which it takes no more than there are.

    How large a network is, its file or its configuration says, which may be damaged or meant to do harm. So it is
    built without memory first. Raises TooLarge, for the node of that title, and what `build` raises.
    """
    weights = list(weights)
    with torch.random.fork_rng(devices=[]):
        try:
            with bounded(weights, path, title), torch.device("meta"):
                build()
        except TooLarge:
            raise
        except Exception:
            pass  # some networks compute with what they make, which takes memory; and what is wrong, `build` says again
        with bounded(weights, path, title):
            return build()


@contextlib.contextmanager
def bounded(weights: Iterable[Any], path: Path, title: str) -> Iterator[None]:
    """Within the block this thread builds no network that `weights` can't fill: see `built`."""
    shapes = [tuple(weight.shape) for weight in weights]
    held = sum(torch.Size(shape).numel() for shape in shapes)
    most, parts, thread = 2 * held + ROOM, 2 * len(shapes) + PARTS, threading.get_ident()
    seen = [0, 0]

    def count(module: nn.Module, name: str, value: Tensor | None) -> None:
        if value is None or threading.get_ident() != thread or isinstance(value, nn.parameter.UninitializedTensorMixin):
            return
        seen[0] += value.numel()
        seen[1] += 1
        if seen[0] > most or seen[1] > parts:
            raise TooLarge(
                f"{title}: the network that {path} describes is far larger than the {held} numbers that its weights "
                "hold. Get the configuration and the weights again, from one place."
            )

    hooks = [
        modules.register_module_parameter_registration_hook(count),
        modules.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def shortened(error: Exception | str, most: int = 500) -> str:
    """What another library says, for the end of a sentence of ours: in one line, and no list of all weights."""
    text = " ".join(str(error).split())
    return text if len(text) <= most else f"{text[:most]} …"


def needs(package: str, install: str, title: str) -> ModuleType:
    """Import an optional package. Raises ImportError, for the node of that title, with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{title} needs the Python package {package}, which can't be imported ({shortened(error)}). Install it "
            f"into the Python that runs ComfyUI:  {install}"
        ) from error
