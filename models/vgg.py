"""VGG19 of torchvision, for its feature maps (Simonyan and Zisserman, arXiv 1409.1556)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .network import load_weights, needs
from .pretrained import IMAGENET, fill

__all__ = ["VGG_URL", "VGGFeatures", "load_vgg"]

VGG_URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"


class VGGFeatures(nn.Module):
    """Images `[B, 3, H, W]`, 0..1, to the maps `[B, C, h, w]` of the layers that are named.

    Layers are conv1_1, relu1_1, conv1_2, relu1_2, pool1, conv2_1 … pool5; each pool halves the resolution.
    """

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers
        self.names: list[str] = []
        block, unit = 1, 0
        for i, layer in enumerate(layers):
            if isinstance(layer, nn.Conv2d):
                unit += 1
                self.names.append(f"conv{block}_{unit}")
            elif isinstance(layer, nn.ReLU):
                layers[i] = nn.ReLU()  # torchvision's works in place, and would spoil the map before it
                self.names.append(f"relu{block}_{unit}")
            else:
                self.names.append(f"pool{block}")
                block, unit = block + 1, 0
        self.register_buffer("mean", torch.tensor(IMAGENET.mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET.std).reshape(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor, names: Sequence[str]) -> list[Tensor]:
        maps: dict[str, Tensor] = {}
        x = (images - self.mean.to(images)) / self.std.to(images)
        for name, layer in zip(self.names, self.layers, strict=True):
            x = layer(x)
            if name in names:
                maps[name] = x
            if len(maps) == len(set(names)):
                break
        return [maps[name] for name in names]


def load_vgg(path: Path, title: str) -> VGGFeatures:
    """From torchvision's weights file, of which the classifier is not needed.

    Raises ValueError, for the node of that title, for a file of another network.
    """
    vgg = needs("torchvision.models.vgg", "pip install --no-deps torchvision", title)
    weights = load_weights(path, title)
    weights = {name.removeprefix("features."): w for name, w in weights.items() if not name.startswith("classifier.")}
    with torch.random.fork_rng(devices=[]):
        layers = vgg.make_layers(vgg.cfgs["E"], batch_norm=False)
    return VGGFeatures(fill(layers, weights, path, f"VGG19 of torchvision ({VGG_URL})", title))
