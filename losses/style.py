"""Style Gram: the distance between Gram matrices of feature maps, those of the estimate and those of a style image.

    G(x) = F·Fᵀ/N        of a map F of C channels at N places: which features go together, wherever they are
    L(x̂₀) = Σ_l w_l · ‖G_l(x̂₀) − G_l*‖_F / ‖G_l*‖_F / Σ_l w_l

after Gatys, Ecker and Bethge (CVPR 2016, arXiv 1508.06576), with the unsquared Frobenius norm of FreeDoM (arXiv
2303.09833) and DSG (arXiv 2402.03201), which take the third feature map of CLIP's ViT-B/16. They divide by nothing; for
their one layer, these divisors are constants and change no direction. Over N, a texture has one Gram matrix at any size
of the image. Over ‖G*‖, a weight means the same in layers of 64 and of 768 channels, and a loss of 1 is as far away as
no features at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Loss, Step

__all__ = ["StyleGram", "VGGLayers", "ViTBlocks", "gram", "weighted"]

LONGEST = 16
"""The longer side of a picture over the shorter, at most."""


def gram(features: Tensor) -> Tensor:
    """`[B, C, N]` to `[B, C, C]`, in float32 at least: a sum over many places, which half precision can't hold."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return features @ features.mT / features.shape[-1]


def weighted(text: str) -> list[tuple[str, float]]:
    """relu1_1, relu2_1:0.5 to [("relu1_1", 1.0), ("relu2_1", 0.5)]. Raises ValueError, which shows what is wrong."""
    layers = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = part.partition(":")
        try:
            weight = float(number) if ":" in part else 1.0
        except ValueError:
            weight = -1.0
        if not (name.strip() and 0 < weight < float("inf")):
            raise ValueError(f"'{part}' is no layer. Write its name, or name:weight with a weight above 0.")
        layers.append((name.strip(), weight))
    if not layers:
        raise ValueError("no layer is named. Write one.")
    return layers


class ViTBlocks(nn.Module):
    """Images `[B, 3, H, W]`, 0..1, to what leaves some blocks of a vision transformer, `[B, C, N]` each, patches only.

    tower   a `models.clip_model.ImageTower`, whose `prepare` resizes the whole image to its input
    blocks  counted from 1
    """

    def __init__(self, tower: nn.Module, blocks: Sequence[int]) -> None:
        super().__init__()
        self.tower = tower
        self.blocks = list(blocks)

    @staticmethod
    def depth(tower: nn.Module) -> int:
        """How many blocks the tower has; 0 for one that is no vision transformer."""
        trunk = getattr(tower.visual, "trunk", None)  # timm's
        if trunk is not None:
            return len(trunk.blocks) if hasattr(trunk, "patch_embed") and hasattr(trunk, "blocks") else 0
        return len(tower.visual.transformer.resblocks) if hasattr(tower.visual, "transformer") else 0

    def forward(self, images: Tensor) -> list[Tensor]:
        indices = sorted({block - 1 for block in self.blocks})
        maps = self.tower.visual.forward_intermediates(
            self.tower.prepare(images), indices=indices, stop_early=True, intermediates_only=True, output_fmt="NLC"
        )["image_intermediates"]
        return [maps[indices.index(block - 1)].mT for block in self.blocks]


class VGGLayers(nn.Module):
    """Images `[B, 3, H, W]`, 0..1, to the named layers of a `models.vgg.VGGFeatures`, `[B, C, N]` each.

    side  images are resized to it on their shorter side, and keep their aspect
    """

    def __init__(self, vgg: nn.Module, layers: Sequence[str], side: int) -> None:
        super().__init__()
        self.vgg = vgg
        self.layers = list(layers)
        self.side = side

    def forward(self, images: Tensor) -> list[Tensor]:
        images = images.to(next(self.vgg.parameters()))
        height, width = images.shape[-2:]
        if max(height, width) > LONGEST * min(height, width):  # a strip of one pixel would grow to a terabyte
            raise ValueError(
                f"Style Gram Loss: a picture of {width}×{height} pixels is too long and narrow for vgg, which sees it "
                f"with a shorter side of {self.side}. Take one whose sides are at most 1 to {LONGEST}."
            )
        scale = self.side / min(height, width)
        size = round(height * scale), round(width * scale)
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
        return [features.flatten(2) for features in self.vgg(images, self.layers)]


class StyleGram(Loss):
    """L above; the Gram matrices of several style images are averaged, and all samples are held against that.

    features  images `[B, 3, H, W]`, 0..1, to maps `[B, C, N]`: ViTBlocks or VGGLayers
    weights   w, one a map, above 0
    styles    images `[S, 3, h, w]`, 0..1, of any size
    """

    def __init__(self, features: nn.Module, weights: Sequence[float], styles: Tensor) -> None:
        super().__init__()
        self.features = features
        self.weights = [weight / sum(weights) for weight in weights]
        with torch.no_grad():
            grams = [self._grams(styles[i : i + 1]) for i in range(len(styles))]
        for i, matrices in enumerate(zip(*grams, strict=True)):
            self.register_buffer(f"style_{i}", torch.cat(matrices).mean(0, keepdim=True), persistent=False)

    def _grams(self, images: Tensor) -> list[Tensor]:
        return [gram(features) for features in self.features(images)]

    def forward(self, images: Tensor, step: Step | None = None) -> Tensor:
        loss = torch.zeros(len(images), device=images.device)
        for i, (weight, matrix) in enumerate(zip(self.weights, self._grams(images), strict=True)):
            style = self.get_buffer(f"style_{i}").to(matrix)
            # The gradient of vector_norm at a distance of zero is zero, not NaN.
            distance = torch.linalg.vector_norm((matrix - style).flatten(1), dim=1)
            loss = loss + weight * (distance / torch.linalg.vector_norm(style)).to(loss.device)
        return loss
