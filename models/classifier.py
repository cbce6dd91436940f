"""Classifiers of images (torchvision, timm, transformers), and of noisy latents (a form of our own)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .network import TooLarge, built, load_weights, managed, needs, shortened
from .pretrained import (
    IMAGENET,
    ImageNetwork,
    LoadedNetwork,
    Preprocessing,
    architecture_of,
    check_numbers,
    fill,
    label_names,
    plausible,
    preprocessing_of,
    published_weights,
    read_json,
    timm_network,
    transformers_network,
)

__all__ = ["ImageClassifier", "NoisyLatentClassifier", "load"]


class ImageClassifier(ImageNetwork):
    """Images `[B, 3, H, W]` in 0..1 to logits `[B, C]`, float32.

    The network sees the largest part in the middle of the image that has the shape of its input, at the input's size.
    With `multi_label` each class has a probability of its own (sigmoid), else they share one (softmax).
    """

    noise_aware = False

    def __init__(
        self, network: nn.Module, labels: Sequence[str], preprocessing: Preprocessing, multi_label: bool = False
    ) -> None:
        super().__init__(network, labels, preprocessing)
        self.multi_label = multi_label

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        scale = min(height / self.size[0], width / self.size[1])
        rows, columns = (max(1, round(side * scale)) for side in self.size)
        top, left = (height - rows) // 2, (width - columns) // 2
        output = self.network(self.prepare(images[..., top : top + rows, left : left + columns], self.size))
        return (output if isinstance(output, Tensor) else output["logits"]).float()


class NoisyLatentClassifier(nn.Module):
    """Noisy latents `[B, in_channels, h, w]` of any size and timesteps `[B]` to logits `[B, len(labels)]`, float32.

    What ADM's classifier is (Dhariwal & Nichol, arXiv 2105.05233, section 4): the down half of a U-Net that is told the
    timestep, here with the mean over the last grid for its attention pooling. To be trained on what ComfyUI's networks
    see: `model_sampling.calculate_input(sigma, x)`, which is x/√(1 + σ²) for ε and v models, and
    `model_sampling.timestep(sigma)`.

    width         channels of the first level, a multiple of 8
    channel_mult  of each level, which has half the sides of the one before
    blocks        residual blocks a level
    """

    noise_aware = True
    multi_label = False

    def __init__(
        self,
        in_channels: int,
        labels: Sequence[str],
        width: int = 64,
        channel_mult: Sequence[int] = (1, 2, 4),
        blocks: int = 2,
    ) -> None:
        super().__init__()
        self.labels = tuple(labels)
        self.in_channels = in_channels
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        self.input = nn.Conv2d(in_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList()
        channels = width
        for level, multiplier in enumerate(channel_mult):
            for block in range(blocks):
                stride = 2 if level and not block else 1
                self.blocks.append(_ResidualBlock(channels, multiplier * width, 4 * width, stride))
                channels = multiplier * width
        self.output = nn.Sequential(nn.GroupNorm(8, channels), nn.SiLU())
        self.head = nn.Linear(channels, len(self.labels))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"Classifier Loss: this noise-aware classifier is for latents of {self.in_channels} channels, and the "
                f"model's have the shape {list(x.shape[1:])}. Use one that was trained on latents of this model."
            )
        x = x.to(self.input.weight)
        time = self.time(_embedding(timestep.to(x).expand(len(x)), self.width))
        x = self.input(x)
        for block in self.blocks:
            x = block(x, time)
        return self.head(self.output(x).mean((2, 3))).float()


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, time_channels: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, stride, padding=1)
        )
        self.time = nn.Linear(time_channels, out_channels)
        self.outer = nn.Sequential(
            nn.GroupNorm(8, out_channels), nn.SiLU(), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        )
        same = channels == out_channels and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1, stride)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.inner(x) + self.time(F.silu(time))[..., None, None]
        return self.skip(x) + self.outer(h)


def _embedding(timestep: Tensor, width: int) -> Tensor:
    """Cosines and sines of `timestep` `[B]` at `width`/2 frequencies from 1 to 1/10000: `[B, width]`."""
    steps = torch.arange(width // 2, device=timestep.device, dtype=timestep.dtype)
    angles = timestep[:, None] * torch.exp(-math.log(10000) * steps / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def load(path: Path, architecture: str, title: str) -> LoadedNetwork:
    """The classifier of a torchvision weights file, of `architecture` or (if empty) the one that its name says, or of
    a folder of timm's, of transformers', or of a `NoisyLatentClassifier`.

    Raises ValueError, for the node of that title, for a file or folder that holds no such network, and ImportError.
    """
    if not path.is_dir():
        return LoadedNetwork(managed(_from_file(path, architecture, title)))
    config = read_json(path / "config.json", title)
    if config.get("noise_aware"):
        network = _noise_aware(path, config, title)
    elif "architecture" in config:
        network = _from_timm(path, title)
    else:
        network = _from_transformers(path, title)
    if len(network.labels) < 2 and not network.multi_label:
        raise ValueError(
            f"{title}: {path} tells no classes apart, it has {len(network.labels)}. Load a network of two classes or "
            "more."
        )
    return LoadedNetwork(managed(network))


def _from_file(path: Path, architecture: str, title: str) -> ImageClassifier:
    torchvision = needs("torchvision", "pip install --no-deps torchvision", title)
    known = torchvision.models.list_models(module=torchvision.models)
    architecture = architecture.strip().lower() or architecture_of(path, known, title)
    if architecture not in known:
        raise ValueError(
            f"{title}: torchvision has no classifier named '{shortened(architecture, 200)}'. Set architecture to one "
            f"of: {', '.join(known)}."
        )
    weights = load_weights(path, title)
    # Files of DenseNet are older than its names.
    weights = {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=\d)", r"\1", name): w for name, w in weights.items()}
    # The head is torchvision's last layer of one of these names: classifier.6 of VGG, heads.head of a ViT …
    heads = [name for name in weights if re.fullmatch(r"(fc|head|heads\.head|classifier(\.\d+)?)\.weight", name)]
    if not heads:
        raise ValueError(
            f"{title}: {path} does not fit the architecture {architecture}: it has no classifying head. Choose another "
            "architecture or file."
        )
    head = max(heads, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    classes = len(weights[head]) if weights[head].ndim else 0
    published = published_weights(torchvision, architecture, path)
    preset = published.transforms()
    size = tuple(preset.crop_size * 2)
    fixed: dict[str, Any] = {"image_size": size[0]} if architecture.startswith("vit_") else {}
    if architecture in ("inception_v3", "googlenet"):  # trained on another normalisation, which they make themselves
        fixed = {"transform_input": True}

    def build() -> nn.Module:
        return torchvision.models.get_model(architecture, weights=None, num_classes=classes, **fixed)

    network = built(build, weights.values(), path, title)
    labels = published.meta["categories"] if classes == 1000 else [str(i) for i in range(classes)]
    network = fill(network, weights, path, architecture, title)
    return ImageClassifier(network, labels, Preprocessing(size, tuple(preset.mean), tuple(preset.std)))


def _from_timm(folder: Path, title: str) -> ImageClassifier:
    network, preprocessing, config = timm_network(folder, title)
    labels = config.get("label_names") or (config.get("pretrained_cfg") or {}).get("label_names")
    classes = network.num_classes
    if not labels:
        labels = _imagenet_labels(title) if classes == 1000 else [str(i) for i in range(classes)]
    return ImageClassifier(network, label_names(labels, classes, folder, title), preprocessing)


def _imagenet_labels(title: str) -> list[str]:
    torchvision = needs("torchvision", "pip install --no-deps torchvision", title)
    return torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]


def _from_transformers(folder: Path, title: str) -> ImageClassifier:
    network = transformers_network(folder, "AutoModelForImageClassification", title)
    config = network.config
    labels = label_names([config.id2label.get(i) for i in range(config.num_labels)], config.num_labels, folder, title)
    size = getattr(config, "image_size", None) or IMAGENET.size
    size = (size, size) if isinstance(size, int) else size
    default = plausible(size, IMAGENET.mean, IMAGENET.std, folder / "config.json", title)
    multi_label = config.problem_type == "multi_label_classification"
    return ImageClassifier(network, labels, preprocessing_of(folder, default, title), multi_label)


def _noise_aware(folder: Path, config: dict[str, Any], title: str) -> NoisyLatentClassifier:
    if config.get("architecture") != NoisyLatentClassifier.__name__:
        raise ValueError(
            f"{title}: {folder} holds a noise-aware classifier of the architecture {config.get('architecture')!r}. "
            f"The only one that is known is {NoisyLatentClassifier.__name__}. Load another."
        )
    settings = {key: value for key, value in config.items() if key not in ("architecture", "noise_aware")}
    check_numbers(settings, folder / "config.json", title)
    path = folder / "model.safetensors"
    weights = load_weights(path, title)
    try:
        network = built(lambda: NoisyLatentClassifier(**settings), weights.values(), folder / "config.json", title)
    except TooLarge:
        raise
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(
            f"{title}: the settings in {folder / 'config.json'} make no classifier. Get the folder again from where it "
            f"comes. ({shortened(error)})"
        ) from error
    label_names(network.labels, len(network.labels), folder, title)
    return fill(network, weights, path, NoisyLatentClassifier.__name__, title)
