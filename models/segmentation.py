"""Networks that name the class of each pixel: torchvision's, and those of transformers (SegFormer and its like)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from .network import built, load_weights, managed, needs
from .pretrained import (
    IMAGENET,
    ImageNetwork,
    LoadedNetwork,
    Preprocessing,
    architecture_of,
    fill,
    label_names,
    plausible,
    preprocessing_of,
    published_weights,
    transformers_network,
)

__all__ = ["ARCHITECTURES", "SegmentationNetwork", "load"]

ARCHITECTURES = (
    "lraspp_mobilenet_v3_large",
    "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "fcn_resnet50",
    "fcn_resnet101",
)

LONGEST = 16
"""The longer side of a picture over the shorter, at most."""

CITYSCAPES = {
    "road": "#804080",
    "sidewalk": "#f423e8",
    "building": "#464646",
    "wall": "#66669c",
    "fence": "#be9999",
    "pole": "#999999",
    "traffic light": "#faaa1e",
    "traffic sign": "#dcdc00",
    "vegetation": "#6b8e23",
    "terrain": "#98fb98",
    "sky": "#4682b4",
    "person": "#dc143c",
    "rider": "#ff0000",
    "car": "#00008e",
    "truck": "#000046",
    "bus": "#003c64",
    "train": "#005064",
    "motorcycle": "#0000e6",
    "bicycle": "#770b20",
}


class SegmentationNetwork(ImageNetwork):
    """Images `[B, 3, H, W]` in 0..1 to logits `[B, C, h, w]` on the grid of the network's input, float32.

    The input keeps the image's aspect, and its shorter side is the network's own size: things are then as large as in
    training, whatever the size of the image. Both sides are rounded to multiples of `multiple`. With `fixed`, for
    networks that take one size only, the image is stretched to it. Logits of a coarser grid are upsampled, bilinear, as
    these networks were trained.

    palette  the data set's own colours of the classes, "#rrggbb" in the order of the labels; empty if none are known
    """

    def __init__(
        self,
        network: nn.Module,
        labels: Sequence[str],
        preprocessing: Preprocessing,
        palette: Sequence[str] = (),
        multiple: int = 1,
        fixed: bool = False,
    ) -> None:
        super().__init__(network, labels, preprocessing)
        self.palette = tuple(palette)
        self.multiple = multiple
        self.fixed = fixed

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        if self.fixed:
            return self.size
        if max(height, width) > LONGEST * min(height, width):  # a strip of one pixel would grow to a terabyte
            raise ValueError(
                f"Segmentation Loss: a picture of {width}×{height} pixels is too long and narrow for the network, "
                f"which sees it with a shorter side of {min(self.size)}. Take a latent whose sides are at most 1 to "
                f"{LONGEST}."
            )
        scale = min(self.size) / min(height, width) / self.multiple
        return max(1, round(height * scale)) * self.multiple, max(1, round(width * scale)) * self.multiple

    def forward(self, images: Tensor) -> Tensor:
        size = self.input_size(*images.shape[-2:])
        output = self.network(self.prepare(images, size))
        logits = output["out"] if "out" in output else output["logits"]
        return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


def load(path: Path, architecture: str | None, title: str) -> LoadedNetwork:
    """The network of a torchvision weights file, of `architecture` or the one that its name says, or of a folder.

    Raises ValueError, for the node of that title, for a file or folder that holds no such network, and ImportError.
    """
    network = _from_folder(path, title) if path.is_dir() else _from_file(path, architecture, title)
    return LoadedNetwork(managed(network))


def _from_file(path: Path, architecture: str | None, title: str) -> SegmentationNetwork:
    torchvision = needs("torchvision", "pip install --no-deps torchvision", title)
    architecture = architecture or architecture_of(path, ARCHITECTURES, title)
    weights = load_weights(path, title)
    # The auxiliary head serves training alone.
    weights = {name: weight for name, weight in weights.items() if not name.startswith("aux_classifier.")}
    head = "classifier.low_classifier.weight" if architecture.startswith("lraspp") else "classifier.4.weight"
    if head not in weights:
        raise ValueError(
            f"{title}: {path} does not fit the architecture {architecture}: it has no {head}. Choose another "
            "architecture or file."
        )
    classes = len(weights[head]) if weights[head].ndim else 0

    def build() -> nn.Module:
        return torchvision.models.get_model(architecture, weights=None, weights_backbone=None, num_classes=classes)

    network = built(build, weights.values(), path, title)
    published = published_weights(torchvision, architecture, path)
    labels, preset = published.meta["categories"], published.transforms()
    if classes != len(labels):
        labels = [str(i) for i in range(classes)]
    preprocessing = Preprocessing(tuple(preset.resize_size * 2), tuple(preset.mean), tuple(preset.std))
    network = fill(network, weights, path, architecture, title)
    return SegmentationNetwork(network, labels, preprocessing, _palette(labels))


def _from_folder(folder: Path, title: str) -> SegmentationNetwork:
    network = transformers_network(folder, "AutoModelForSemanticSegmentation", title)
    config = network.config
    labels = label_names([config.id2label.get(i) for i in range(config.num_labels)], config.num_labels, folder, title)
    default = Preprocessing((512, 512), IMAGENET.mean, IMAGENET.std)
    preprocessing = preprocessing_of(folder, default, title)
    # Old SegFormer folders have an image_size too, which means nothing: the class must know it.
    fixed = hasattr(type(config)(), "image_size")
    if fixed:
        size = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
        mean, std = preprocessing.mean, preprocessing.std
        preprocessing = plausible(size, mean, std, folder / "config.json", title, preprocessing.bgr)
    palette = getattr(config, "palette", None) or _palette(labels)
    if palette and not (
        isinstance(palette, list)
        and len(palette) == len(labels)
        and all(re.fullmatch("#[0-9a-fA-F]{6}", str(color)) for color in palette)
    ):
        raise ValueError(
            f"{title}: palette in {folder / 'config.json'} must list a '#rrggbb' for each of the {len(labels)} "
            "classes. Correct it, or take it out."
        )
    return SegmentationNetwork(network, labels, preprocessing, palette, multiple=32, fixed=fixed)


def _palette(labels: Sequence[str]) -> list[str]:
    """The colours in which a data set of these labels publishes its maps; none for one that is not known here."""
    if len(labels) == 21 and labels[1] == "aeroplane" and "background" in labels[0]:
        return [_voc_color(i) for i in range(21)]
    colors = [CITYSCAPES.get(label.lower()) for label in labels]
    return colors if len(colors) == len(CITYSCAPES) and all(colors) else []


def _voc_color(index: int) -> str:
    """PASCAL VOC's colour of a class: bits 0, 3, 6 of its number are the highest bits of red, 1, 4, 7 of green …"""
    channels = (sum((index >> (3 * place + channel) & 1) << (7 - place) for place in range(3)) for channel in range(3))
    return "#" + "".join(f"{value:02x}" for value in channels)
