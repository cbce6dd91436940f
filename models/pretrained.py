"""What the loaders of labelled image networks share: labels, preprocessing, torchvision's and transformers' files."""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from .network import load_weights, needs, shortened

__all__ = [
    "IMAGENET",
    "ImageNetwork",
    "LoadedNetwork",
    "Preprocessing",
    "architecture_of",
    "class_index",
    "fill",
    "preprocessing_of",
    "published_weights",
    "read_json",
    "timm_network",
    "transformers_network",
]

log = logging.getLogger("sphereguide")


@dataclass(frozen=True)
class Preprocessing:
    """What a network was trained to see: RGB (or BGR) in 0..1, less `mean`, over `std`, at `size` (height, width)."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False


IMAGENET = Preprocessing((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class ImageNetwork(nn.Module):
    """A network and its preprocessing, in the network's own dtype and where ComfyUI has put it."""

    def __init__(self, network: nn.Module, labels: Sequence[str], preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.labels = tuple(labels)
        self.size = preprocessing.size
        self.bgr = preprocessing.bgr
        self.register_buffer("mean", torch.tensor(preprocessing.mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).reshape(-1, 1, 1), persistent=False)

    def prepare(self, images: Tensor, size: Sequence[int]) -> Tensor:
        """Images `[B, 3, H, W]` in 0..1, of any dtype on any device, as the network wants them, at `size`."""
        images = images.to(next(self.network.parameters()))
        images = F.interpolate(images, size=tuple(size), mode="bilinear", antialias=True, align_corners=False)
        images = images.flip(1) if self.bgr else images
        return (images - self.mean.to(images)) / self.std.to(images)


@dataclass(frozen=True)
class LoadedNetwork:
    """What goes through SEGMENTATION_MODEL, IMAGE_CLASSIFIER, FACE_ENCODER and VGG_FEATURES: a network's patcher."""

    patcher: Any

    @property
    def network(self) -> Any:
        return self.patcher.model


# -- labels ------------------------------------------------------------------------------------------------------------


def class_index(labels: Sequence[str], name: str, title: str) -> int:
    """The class that `name` means: a label, or one of the comma-separated names in it, or the number of a class.

    Case, spaces, hyphens and underscores don't count. Raises ValueError, for the node of that title, for a name that
    no class has or several have.
    """
    wanted = _plain(name)
    exact = [i for i, label in enumerate(labels) if _plain(label) == wanted]
    found = exact or [i for i, label in enumerate(labels) if wanted in map(_plain, label.split(","))]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{title}: {' and '.join(f'{i} ({labels[i]})' for i in found)} are all classes named '{name}'. Give the "
            "number of one."
        )
    if name.strip().isdecimal() and int(name) < len(labels):
        return int(name)
    names = {_plain(part): part.strip() for label in labels for part in [label, *label.split(",")]}
    close = [names[match] for match in difflib.get_close_matches(wanted, names, 5)]
    shown = ", ".join(labels[:40]) + (f" … ({len(labels)} in all, see the loader's labels)" if len(labels) > 40 else "")
    raise ValueError(
        f"{title}: the network has no class '{name}'. "
        + (f"Did you mean {' or '.join(close)}? " if close else "")
        + f"Its classes: {shown}."
    )


def _plain(label: str) -> str:
    return re.sub(r"[\s_-]+", "", label.lower())


# -- torchvision -------------------------------------------------------------------------------------------------------


def architecture_of(path: Path, architectures: Iterable[str], title: str) -> str:
    """The architecture that the name of the file begins with or holds, the longest that fits."""
    found = [name for name in architectures if name in path.stem.lower()]
    if not found:
        raise ValueError(
            f"{title}: the name of '{path.name}' does not say which architecture of torchvision it is for. Choose it "
            "in architecture."
        )
    return max(found, key=len)


def published_weights(torchvision: Any, architecture: str, path: Path) -> Any:
    """torchvision's description of the weights in this file; those of its best ones if the file isn't torchvision's."""
    entries = torchvision.models.get_model_weights(architecture)
    return next((entry for entry in entries if Path(entry.url).stem == path.stem), entries.DEFAULT)


def fill(network: nn.Module, weights: dict[str, Tensor], path: Path, architecture: str, title: str) -> nn.Module:
    """`network` with `weights`, in float32. Raises ValueError, for the node of that title, if they don't fit."""
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        lines = str(error).splitlines()[1:]  # the first says that there was an error
        raise ValueError(
            f"{title}: {path} does not fit the architecture {architecture}. Choose another file, or the architecture "
            f"that it is for. ({shortened(' '.join(lines))})"
        ) from error
    return network.float()


# -- transformers ------------------------------------------------------------------------------------------------------


def transformers_network(folder: Path, auto_class: str, title: str) -> nn.Module:
    """The network of a folder that `save_pretrained` wrote, in float32, by nothing but what lies in the folder.

    Raises ValueError, for the node of that title, for a folder that does not hold such a network whole.
    """
    transformers = needs("transformers", "pip install transformers", title)
    if not any(folder.glob("*.safetensors")):
        load_weights(folder / "pytorch_model.bin", title)  # for its errors
    try:
        with torch.random.fork_rng(devices=[]):
            network, report = getattr(transformers, auto_class).from_pretrained(
                str(folder),
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                weights_only=True,
            )
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{title}: transformers' {auto_class} can't load {folder}. Get all of its files again, or load another. "
            f"({shortened(error)})"
        ) from error
    missing = [*report["missing_keys"], *report["mismatched_keys"]]
    if missing:
        raise ValueError(
            f"{title}: {folder} lacks weights that {type(network).__name__} needs ({missing[0]}"
            f"{' and others' if len(missing) > 1 else ''}). It may be a backbone without a head. Load another."
        )
    return network.float()


def timm_network(folder: Path, title: str, headless: bool = False) -> tuple[nn.Module, Preprocessing, dict[str, Any]]:
    """The network of a folder with timm's config.json and weights, its preprocessing, and that config.

    headless  without its last layer: what enters that is what comes out

    Raises ImportError for a missing timm and ValueError for a folder that holds no such network of RGB images.
    """
    timm = needs("timm", "pip install timm", title)
    config = read_json(folder / "config.json", title)
    architecture, pretrained = config.get("architecture"), config.get("pretrained_cfg") or {}
    if not (isinstance(architecture, str) and timm.is_model(architecture)):
        raise ValueError(
            f"{title}: timm {timm.__version__} knows no architecture '{architecture}', which config.json in {folder} "
            "asks for. Update it:  pip install --upgrade timm"
        )
    files = (folder / name for name in ("model.safetensors", "pytorch_model.bin"))
    path = next((path for path in files if path.exists()), None)
    if path is None:
        raise ValueError(f"{title}: {folder} has a config.json, but no model.safetensors beside it. Put it there.")
    known = {**pretrained, **config}
    arguments = {key: known[key] for key in ("num_classes", "global_pool") if known.get(key) is not None}
    arguments |= config.get("model_args") or {}
    if headless:
        arguments["num_classes"] = 0
    try:
        with torch.random.fork_rng(devices=[]):
            network = timm.create_model(architecture, pretrained_cfg=pretrained or None, **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"{title}: timm {timm.__version__} can't build '{architecture}' as config.json in {folder} asks for. Get "
            f"config.json again, or update timm:  pip install --upgrade timm  ({shortened(error)})"
        ) from error
    weights = load_weights(path, title)
    if headless:
        weights = {name: weight for name, weight in weights.items() if name in network.state_dict()}
    network = fill(network, weights, path, architecture, title)
    data = timm.data.resolve_model_data_config(network)
    channels, *size = data["input_size"]
    if channels != 3:
        raise ValueError(
            f"{title}: '{architecture}' of {folder} takes images of {channels} channels, not of 3. Load a network of "
            "colour pictures."
        )
    return network, Preprocessing(tuple(size), tuple(data["mean"]), tuple(data["std"])), config


def preprocessing_of(folder: Path, default: Preprocessing, title: str) -> Preprocessing:
    """What `preprocessor_config.json` of a transformers folder says, and `default` where it is silent."""
    path = folder / "preprocessor_config.json"
    if not path.exists():
        log.warning(
            "%s: %s has no preprocessor_config.json. Taking mean %s, std %s and size %s; put the file there if the "
            "network was trained with others.",
            *(title, folder, default.mean, default.std, default.size),
        )
        return default
    config = read_json(path, title)
    cropped = config.get("do_center_crop") and config.get("crop_size")
    found = replace(
        default,
        size=_size(config.get("crop_size") if cropped else config.get("size"), default.size),
        bgr=bool(config.get("do_flip_channel_order")),
    )
    if config.get("do_normalize", "image_mean" in config):
        mean, std = config.get("image_mean") or default.mean, config.get("image_std") or default.std
        return replace(found, mean=tuple(mean), std=tuple(std))
    return replace(found, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def _size(size: Any, default: tuple[int, int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and "shortest_edge" in size:
        return size["shortest_edge"], size["shortest_edge"]
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        return size["height"], size["width"]
    return default


def read_json(path: Path, title: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__} and no settings")
        return content
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{title}: {path} can't be read. Get it again from where the weights come. ({shortened(error)})"
        ) from error
