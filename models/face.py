"""Face recognition networks, and the detector that finds the faces for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses.face import Box
from .network import load_weights, needs
from .pretrained import fill, timm_network

__all__ = ["FACENET_INSTALL", "FACENET_URL", "FaceDetector", "FaceEncoder", "load_face_encoder"]

#: facenet-pytorch pins versions of torch, numpy and Pillow that would break a ComfyUI: never without --no-deps
FACENET_INSTALL = "pip install --no-deps facenet-pytorch"
FACENET_URL = "https://github.com/timesler/facenet-pytorch/releases"


class FaceEncoder(nn.Module):
    """Faces `[B, 3, *size]`, 0..1, to embeddings `[B, D]` of unit length.

    network    sees (faces − mean)/std
    size       height and width that it takes
    mean, std  per channel
    """

    def __init__(self, network: nn.Module, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.size = size
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1), persistent=False)

    def forward(self, faces: Tensor) -> Tensor:
        return F.normalize(self.network((faces - self.mean.to(faces)) / self.std.to(faces)), dim=1)


def load_face_encoder(path: Path, title: str, features: bool = False) -> FaceEncoder:
    """An encoder from facenet-pytorch's weights file, or from a folder with timm's config.json and weights.

    features  of a timm network, take what enters its last layer instead of what leaves it

    Raises ImportError for the package that is missing and ValueError for what holds no such network, both for the node
    of that title.
    """
    if not path.is_dir():
        return _facenet(path, title)
    network, preprocessing, _ = timm_network(path, title, headless=features)
    return FaceEncoder(network, preprocessing.size, preprocessing.mean, preprocessing.std)


def _facenet(path: Path, title: str) -> FaceEncoder:
    facenet = needs("facenet_pytorch", FACENET_INSTALL, title)
    weights = load_weights(path, title)
    weights = {name: weight for name, weight in weights.items() if not name.startswith("logits.")}
    with torch.random.fork_rng(devices=[]):
        network = facenet.InceptionResnetV1(pretrained=None, classify=False)
    network = fill(network, weights, path, f"InceptionResnetV1 of facenet-pytorch ({FACENET_URL})", title)
    # It was trained on (x·255 − 127.5)/128.
    return FaceEncoder(network, (160, 160), (0.5,) * 3, (128 / 255,) * 3)


class FaceDetector:
    """MTCNN (Zhang et al., arXiv 1604.02878) of facenet-pytorch, whose wheel holds the weights.

    Called with an image `[3, H, W]`, 0..1; returns the boxes of its faces, the largest first. Small enough to stay on
    the CPU, where it is in nobody's way: it needs no place in ComfyUI's model management, and no gradient.

    Raises ImportError, for the node of that title, where the package is missing.
    """

    #: MTCNN itself keeps 0.7 and up. This is facenet-pytorch's limit for taking the largest.
    confidence = 0.9

    def __init__(self, title: str) -> None:
        facenet = needs("facenet_pytorch", FACENET_INSTALL, title)
        with torch.random.fork_rng(devices=[]):
            self.mtcnn = facenet.MTCNN(keep_all=True, device=torch.device("cpu")).eval()

    def __call__(self, image: Tensor) -> list[Box]:
        height, width = image.shape[-2:]
        with torch.inference_mode():
            pixels = image.detach().float().cpu().clamp(0, 1).movedim(0, -1) * 255
            try:
                boxes, confidences = self.mtcnn.detect(pixels)
            except (RuntimeError, ValueError) as error:
                if "non-empty" not in str(error):
                    raise
                return []  # it stacks its candidates, and torch refuses to stack none
        if boxes is None:
            return []
        return [
            (float(left) / width, float(top) / height, float(right) / width, float(bottom) / height)
            for (left, top, right, bottom), confidence in zip(boxes, confidences, strict=True)
            if confidence >= self.confidence
        ]
