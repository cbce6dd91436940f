"""FaceID: the distance between the face of the estimate and that of a reference, in a recognition network's eyes.

    L(x̂₀) = ‖e(crop(x̂₀)) − e(crop(y))‖₂        or 1 − cos of the angle between them

with embeddings e of unit length, as in FreeDoM (arXiv 2303.09833) and DSG (arXiv 2402.03201, ArcFace). The two are one
measure, ‖a − b‖² = 2·(1 − cos): they differ in how the gradient shrinks as the faces approach each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Loss, Step, repeat

__all__ = ["DISTANCES", "Box", "Detector", "FaceID", "crop", "square"]

#: left, top, right, bottom as shares of the image's width and height; may reach beyond the image
Box = tuple[float, float, float, float]
#: image `[3, H, W]`, 0..1, to the boxes of its faces, the largest first
Detector = Callable[[Tensor], list[Box]]
Distance = Literal["euclidean", "cosine"]
DISTANCES: tuple[Distance, ...] = ("euclidean", "cosine")


def crop(images: Tensor, boxes: Sequence[Box], size: tuple[int, int]) -> Tensor:
    """What lies in box i of image i, resized with antialiasing: `[B, 3, H, W]` to `[B, 3, *size]`.

    Borders are those of whole pixels. Where a box reaches beyond the image, the image's border is repeated.
    """
    height, width = images.shape[-2:]
    crops = []
    for i, (left, top, right, bottom) in enumerate(boxes):
        x, y = round(left * width), round(top * height)
        x_end, y_end = max(round(right * width), x + 1), max(round(bottom * height), y + 1)
        columns = torch.arange(x, x_end, device=images.device).clamp(0, width - 1)
        rows = torch.arange(y, y_end, device=images.device).clamp(0, height - 1)
        part = images[i : i + 1, :, rows][..., columns]
        crops.append(F.interpolate(part, size=size, mode="bilinear", antialias=True, align_corners=False))
    return torch.cat(crops)


def square(box: Box, margin: float, height: int, width: int) -> Box:
    """The square, in pixels of an image of that size, about `box`: as wide as its longer side, and `margin` of it more
    on each side."""
    left, top, right, bottom = box
    half = max((right - left) * width, (bottom - top) * height) * (0.5 + margin)
    x, y = (left + right) / 2, (top + bottom) / 2
    return x - half / width, y - half / height, x + half / width, y + half / height


@dataclass
class _Seen:
    """What a run remembers: the last good box of each sample, and the guided steps so far."""

    boxes: list[Box]
    steps: int = 0
    index: int | None = None


class FaceID(Loss):
    """The distance of each sample's face to its reference's.

    encoder          faces `[B, 3, *encoder.size]`, 0..1, to embeddings `[B, D]` of unit length, in the dtype of its
                     weights
    reference        images `[R, 3, h, w]`, 0..1; sample i is held against reference i mod R
    reference_boxes  where their faces are
    box              where the sample's face is, without a detector and until it has found one
    detector         finds the faces of the estimate, the largest of which counts; None: `box` holds throughout
    every            look again after so many guided steps; in between, and where none is found, the last box holds
    margin           of the square about a detected face, as share of its side, on each side
    distance         "euclidean" or "cosine"
    average          hold all samples against the mean embedding of the references
    """

    def __init__(
        self,
        encoder: nn.Module,
        reference: Tensor,
        reference_boxes: Sequence[Box],
        *,
        box: Box = (0.0, 0.0, 1.0, 1.0),
        detector: Detector | None = None,
        every: int = 1,
        margin: float = 0.0,
        distance: Distance = "euclidean",
        average: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.box = box
        self.detector = detector
        self.every = every
        self.margin = margin
        self.distance = distance
        with torch.no_grad():
            reference = torch.cat([self.embed(reference[i : i + 1], [face]) for i, face in enumerate(reference_boxes)])
            if average:
                reference = F.normalize(reference.mean(0, keepdim=True), dim=1)
        self.register_buffer("reference", reference, persistent=False)

    def embed(self, images: Tensor, boxes: Sequence[Box]) -> Tensor:
        """Embeddings `[B, D]` of what the boxes hold, on the encoder's device, in float32 at least."""
        faces = crop(images.to(next(self.encoder.parameters())), boxes, self.encoder.size)
        embeddings = self.encoder(faces)
        return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))

    def forward(self, images: Tensor, step: Step | None = None) -> Tensor:
        embedding = self.embed(images, self._boxes(images, step))
        reference = repeat(self.reference.to(embedding), len(images))
        if self.distance == "cosine":
            distance = 1 - (embedding * reference).sum(1)
        else:  # the gradient of vector_norm at a distance of zero is zero, not NaN
            distance = torch.linalg.vector_norm(embedding - reference, dim=1)
        return distance.to(images.device)

    def _boxes(self, images: Tensor, step: Step | None) -> list[Box]:
        fixed = [self.box] * len(images)
        if self.detector is None:
            return fixed
        step = step or Step()
        seen = step.memory.get(self)
        if seen is None or len(seen.boxes) != len(images):
            seen = step.memory[self] = _Seen(fixed)
        if seen.index != step.index:  # samplers may ask several times in a step
            if seen.steps % self.every == 0:
                seen.boxes = [self._face(image) or box for image, box in zip(images, seen.boxes, strict=True)]
            seen.index = step.index
            seen.steps += 1
        return seen.boxes

    def _face(self, image: Tensor) -> Box | None:
        assert self.detector is not None
        faces = self.detector(image.detach())
        return square(faces[0], self.margin, *image.shape[-2:]) if faces else None
