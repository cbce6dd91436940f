"""Auxiliary networks under ComfyUI's model management."""

from __future__ import annotations

import contextlib
import importlib
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.model_management
import comfy.model_patcher
import folder_paths
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

OWN = Path(__file__).resolve().parent.parent / "demo" / "weights"
"""Networks that come with the pack, in folders named like those of `models`."""

PUT = "Put it there and press R in ComfyUI, or choose another."

__all__ = ["choices", "load_weights", "managed", "models_folder", "needs", "path_of", "shortened"]


def managed(module: nn.Module) -> Any:
    """A ModelPatcher over `module` (frozen, in evaluation mode): ComfyUI counts, moves and evicts it like its own."""
    module.eval().requires_grad_(False)
    management = comfy.model_management
    return comfy.model_patcher.ModelPatcher(
        module, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


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
    for root in map(Path, folder_paths.get_folder_paths(name)):
        try:
            path = (root / choice).resolve()
            exists = path.exists()
        except (OSError, ValueError):  # a name that no file can have, out of a program's prompt
            break
        if root.resolve() not in path.parents:
            raise ValueError(f"{title}: '{choice}' lies outside of models/{name}. Put it there, and choose it again.")
        if exists:
            return path
    places = ", ".join(folder_paths.get_folder_paths(name))
    raise FileNotFoundError(f"{title}: '{choice}' is not in models/{name} (looked in {places}). {advice}")


def load_weights(path: Path, title: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a .pt/.pth file, which is read without running code.

    Raises ValueError, for the node of that title, for a file that is damaged or holds anything else.
    """
    try:
        if path.suffix in (".safetensors", ".sft"):
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{title}: {path} is broken or holds more than weights, and is not read, since that could run code. Get it "
            "again, best as .safetensors, or save its state_dict alone."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{title}: {path} can't be read, it may be a broken download. Get it again. ({shortened(error)})"
        ) from error
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else weights
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(
            f"{title}: {path} holds a {type(weights).__name__}, and not weights by name (a state_dict). Load another "
            "file."
        )
    return weights


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
