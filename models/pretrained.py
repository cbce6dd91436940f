"""What the loaders of labelled image networks share: labels, preprocessing, torchvision's and transformers' files."""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from .network import TooLarge, bounded, built, load_weights, needs, shortened

__all__ = [
    "IMAGENET",
    "ImageNetwork",
    "LoadedNetwork",
    "Preprocessing",
    "Refused",
    "architecture_of",
    "check_config",
    "check_numbers",
    "class_index",
    "fill",
    "label_names",
    "plausible",
    "preprocessing_of",
    "published_weights",
    "read_json",
    "timm_network",
    "transformers_network",
]

log = logging.getLogger("sphereguide")

LONGEST = 4096
"""The longest side of an input, in pixels: that of published networks is below 2000."""
LARGEST = 10_000_000
"""No number in a configuration of an image network counts more than this: vocabularies have a million entries."""


class Refused(ValueError):
    """Of a configuration that leads outside of its folder. The message is for the page."""


@dataclass(frozen=True)
class Preprocessing:
    """What a network was trained to see: RGB (or BGR) in 0..1, less `mean`, over `std`, at `size` (height, width)."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False


IMAGENET = Preprocessing((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def plausible(size: Any, mean: Any, std: Any, path: Path, title: str, bgr: bool = False) -> Preprocessing:
    """What a file says of the input. Raises ValueError, for the node of that title, for what no input is like."""
    try:
        found = Preprocessing(tuple(size), tuple(map(float, mean)), tuple(map(float, std)), bgr)
        sizes = [isinstance(side, int) and 0 < side <= LONGEST for side in found.size]
        fits = len(sizes) == 2 and len(found.mean) == len(found.std) == 3 and all(sizes) and 0 not in found.std
        fits = fits and all(map(math.isfinite, found.mean + found.std))
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise ValueError(
            f"{title}: {path} gives the input a size of {shortened(repr(size), 80)}, a mean of "
            f"{shortened(repr(mean), 80)} and a std of {shortened(repr(std), 80)}. There must be two sides of 1 to "
            f"{LONGEST} pixels, and three numbers each. Get the file again from where the weights come."
        )
    return found


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
            f"{title}: {' and '.join(f'{i} ({labels[i]})' for i in found)} are all classes named "
            f"'{shortened(name, 200)}'. Give the number of one."
        )
    number = name.strip()
    if number.isdecimal() and len(number) < 10 and int(number) < len(labels):  # Python reads no number of any length
        return int(number)
    names = {_plain(part): part.strip() for label in labels for part in [label, *label.split(",")]}
    close = [names[match] for match in difflib.get_close_matches(wanted, names, 5)]
    shown = ", ".join(labels[:40]) + (f" … ({len(labels)} in all, see the loader's labels)" if len(labels) > 40 else "")
    raise ValueError(
        f"{title}: the network has no class '{shortened(name, 200)}'. "
        + (f"Did you mean {' or '.join(close)}? " if close else "")
        + f"Its classes: {shown}."
    )


def _plain(label: str) -> str:
    return re.sub(r"[\s_-]+", "", label.lower())


def label_names(labels: Any, classes: int, path: Path, title: str) -> list[str]:
    """The labels of a configuration. Raises ValueError, for the node of that title, if there is not one a class."""
    labels = list(labels) if isinstance(labels, list | tuple) else []
    if len(labels) != classes or not all(isinstance(label, str) for label in labels):
        raise ValueError(
            f"{title}: the configuration in {path} does not name each of the {classes} classes of its network. Get it "
            "again from where the weights come."
        )
    return labels


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
    except Exception as error:  # mostly a RuntimeError; numbers of some types can't be copied
        lines = str(error).splitlines()[1:] or [str(error)]  # the first says that there was an error
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
    path = folder / "config.json"
    if path.exists():
        check_config(read_json(path, title), folder, title)
    if any(folder.glob("*.safetensors")):
        weights = _headers(folder, title)
    else:
        weights = load_weights(folder / "pytorch_model.bin", title).values()
    try:
        with torch.random.fork_rng(devices=[]), bounded(weights, path, title):
            network, report = getattr(transformers, auto_class).from_pretrained(
                str(folder),
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                weights_only=True,
            )
    except TooLarge:
        raise
    except Exception as error:  # hundreds of architectures, each with its own way of saying that settings are wrong
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


def _headers(folder: Path, title: str) -> list[Any]:
    """The tensors of the safetensors files in a folder, without their numbers."""
    found: list[Any] = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                found += [_Shape(tuple(file.get_slice(name).get_shape())) for name in file.keys()]  # noqa: SIM118
        except Exception as error:  # as in load_weights
            raise ValueError(
                f"{title}: {path} can't be read, it may be a broken download. Get it again. ({shortened(error)})"
            ) from error
    return found


@dataclass(frozen=True)
class _Shape:
    shape: tuple[int, ...]


def check_config(config: dict[str, Any], folder: Path, title: str) -> None:
    """Raises Refused, for the node of that title, where transformers would look outside of the folder.

    `local_files_only` and `trust_remote_code` hold for the network, and not for the parts that it names.
    """
    foreign = ["adapter_config.json"] if (folder / "adapter_config.json").exists() else []
    foreign += ["configuration_files"] if "configuration_files" in config else []  # it takes one that nobody checked
    for entry in _dicts(config):
        pretrained = entry.get("use_pretrained_backbone")
        named = isinstance(entry.get("backbone"), str) and not entry.get("use_timm_backbone")
        timm = entry.get("model_type") == "timm_backbone"
        if pretrained or (named and not timm):
            foreign.append("backbone")
        # Of attention, of experts, also in the form that transformers 4.56 to 5.2 took from a file (CVE-2026-4372).
        foreign += [key for key, value in entry.items() if "implementation" in key and "/" in str(value)]
    for index in folder.glob("*.index.json"):
        shards = read_json(index, title).get("weight_map")
        names = shards.values() if isinstance(shards, dict) else [None]
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            foreign.append(index.name)
    if foreign:
        raise Refused(
            f"{title}: the network in {folder} is not whole: its '{foreign[0]}' asks for code or files from elsewhere, "
            "and nothing is fetched unasked. Load one that has all of its parts in its folder."
        )
    check_numbers(config, folder / "config.json", title)


def check_numbers(config: Any, path: Path, title: str) -> None:
    """Raises ValueError, for the node of that title, for a number that no network can be built by."""
    for entry in _dicts(config):
        values = [(key, value) for key, listed in entry.items() for value in _numbers(listed)]
        if wrong := next((pair for pair in values if not abs(pair[1]) <= LARGEST), None):
            raise ValueError(
                f"{title}: {path} gives {wrong[0]} as {shortened(str(wrong[1]), 40)}, and no network is of that size. "
                "Get it again from where the weights come."
            )


def _numbers(value: Any) -> Iterator[int]:
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, int):
            yield part
        elif isinstance(part, list):
            yield from _numbers(part)


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    """The dictionaries in a piece of JSON, itself included."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _dicts(part)


def timm_network(folder: Path, title: str, headless: bool = False) -> tuple[nn.Module, Preprocessing, dict[str, Any]]:
    """The network of a folder with timm's config.json and weights, its preprocessing, and that config.

    headless  without its last layer: what enters that is what comes out

    Raises ImportError for a missing timm and ValueError for a folder that holds no such network of RGB images.
    """
    timm = needs("timm", "pip install timm", title)
    config = read_json(folder / "config.json", title)
    check_numbers(config, folder / "config.json", title)
    architecture, pretrained = config.get("architecture"), config.get("pretrained_cfg") or {}
    settings = config.get("model_args") or {}
    if not (isinstance(architecture, str) and timm.is_model(architecture)):
        raise ValueError(
            f"{title}: timm {timm.__version__} knows no architecture '{architecture}', which config.json in {folder} "
            "asks for. Update it:  pip install --upgrade timm"
        )
    files = (folder / name for name in ("model.safetensors", "pytorch_model.bin"))
    path = next((path for path in files if path.exists()), None)
    if path is None:
        raise ValueError(f"{title}: {folder} has a config.json, but no model.safetensors beside it. Put it there.")
    if not (isinstance(pretrained, dict) and isinstance(settings, dict)):
        raise ValueError(
            f"{title}: {folder / 'config.json'} can't be read: pretrained_cfg and model_args must be settings by name. "
            "Get it again from where the weights come."
        )
    # Settings are those of the network; create_model's own name files and places that it would get weights from.
    if own := sorted(settings.keys() & set(inspect.signature(timm.create_model).parameters)):
        raise ValueError(
            f"{title}: model_args in {folder / 'config.json'} has '{own[0]}', by which timm would load files from "
            "elsewhere. Take it out, and put the weights beside it as model.safetensors."
        )
    known = {**pretrained, **config}
    arguments = {key: known[key] for key in ("num_classes", "global_pool") if known.get(key) is not None}
    arguments |= settings
    if headless:
        arguments["num_classes"] = 0
    weights = load_weights(path, title)

    def build() -> nn.Module:
        return timm.create_model(architecture, pretrained_cfg=pretrained or None, **arguments)

    try:
        network = built(build, weights.values(), folder / "config.json", title)
        data = timm.data.resolve_model_data_config(network)
        channels, *size = data["input_size"]
    except TooLarge:
        raise
    except Exception as error:  # a thousand architectures, each with its own way of saying that settings are wrong
        raise ValueError(
            f"{title}: timm {timm.__version__} can't build '{architecture}' as config.json in {folder} asks for. Get "
            f"config.json again, or update timm:  pip install --upgrade timm  ({shortened(error)})"
        ) from error
    if headless:
        weights = {name: weight for name, weight in weights.items() if name in network.state_dict()}
    network = fill(network, weights, path, architecture, title)
    if channels != 3:
        raise ValueError(
            f"{title}: '{architecture}' of {folder} takes images of {channels} channels, not of 3. Load a network of "
            "colour pictures."
        )
    return network, plausible(size, data["mean"], data["std"], folder / "config.json", title), config


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
    size = _size(config.get("crop_size") if cropped else config.get("size"), default.size)
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if config.get("do_normalize", "image_mean" in config):
        mean, std = config.get("image_mean") or default.mean, config.get("image_std") or default.std
    return plausible(size, mean, std, path, title, bgr=bool(config.get("do_flip_channel_order")))


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
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{title}: {path} can't be read. Get it again from where the weights come. ({shortened(error)})"
        ) from error
