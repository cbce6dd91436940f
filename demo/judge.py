"""The judge: a small network that tells what a portrait shows, and that nothing is ever guided by.

It learnt from portraits that nothing else was trained on (EVALUATOR_SEEDS, and people of its own), and has another
architecture than what guides. `demo` scores its pictures with it, `demo.evaluate` and the benchmarks measure with it.
`python -m demo.train_encoders judge` trains it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from . import portraits

__all__ = [
    "FILE",
    "TRAITS",
    "Judge",
    "Verdict",
    "frechet",
    "gram_distance",
    "load",
    "mean_iou",
    "to_tensor",
    "verification",
]

FILE = "toy_portraits_judge.safetensors"
TRAITS = 17


@dataclass
class Verdict:
    """What the judge sees in images `[B, 3, 128, 128]`.

    attributes  logits `[B, values]` of each entry of portraits.ATTRIBUTES
    classes     logits `[B, classes, 64, 64]` of portraits.CLASSES
    identity    `[B, 17]`, what makes a person, standardised (`traits` of demo/train_encoders.py)
    maps        three feature maps `[B, C, N]`, from fine to coarse
    features    `[B, 96]`
    """

    attributes: list[Tensor]
    classes: Tensor
    identity: Tensor
    maps: list[Tensor]
    features: Tensor

    @property
    def labels(self) -> np.ndarray:
        """Index of the likeliest value of each attribute, `[B, attributes]`."""
        return torch.stack([logits.argmax(1) for logits in self.attributes], 1).numpy()

    @property
    def class_map(self) -> np.ndarray:
        """Index of the likeliest class of each pixel, `[B, 128, 128]`."""
        return F.interpolate(self.classes, scale_factor=2, mode="bilinear").argmax(1).numpy()


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 [B, 128, 128, 3] -> float [B, 3, 128, 128] in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float().div_(255)


def block(n_in: int, n_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())


class Judge(nn.Module):
    """Images `[B, 3, 128, 128]` in 0..1 to a Verdict."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [len(values) for values in portraits.ATTRIBUTES.values()]
        self.a, self.b, self.c = block(3, 24, 2), block(24, 40, 2), block(40, 72, 2)
        self.d = nn.Sequential(block(72, 96, 2), block(96, 96))
        self.up_b, self.up_a = block(72 + 40, 40), block(40 + 24, 24)
        self.classes = nn.Conv2d(24, len(portraits.CLASSES), 1)
        self.attributes = nn.Linear(96 * 16, sum(self.sizes))
        self.identity = nn.Linear(96 * 16, TRAITS)

    def forward(self, images: Tensor) -> Verdict:
        a = self.a(images * 2 - 1)
        b = self.b(a)
        c = self.c(b)
        d = self.d(c)
        pooled = F.adaptive_avg_pool2d(d, 4).flatten(1)
        up = self.up_b(torch.cat([F.interpolate(c, scale_factor=2.0), b], 1))
        up = self.up_a(torch.cat([F.interpolate(up, scale_factor=2.0), a], 1))
        return Verdict(
            attributes=list(self.attributes(pooled).split(self.sizes, 1)),
            classes=self.classes(up),
            identity=self.identity(pooled),
            maps=[features.flatten(2) for features in (a, b, c)],
            features=d.mean((2, 3)),
        )

    @torch.no_grad()
    def of(self, images: Tensor) -> Verdict:
        """The verdict on any number of images, in parts that fit into memory."""
        parts = [self(part) for part in images.split(32)]
        return Verdict(
            attributes=[torch.cat(logits) for logits in zip(*(part.attributes for part in parts), strict=True)],
            classes=torch.cat([part.classes for part in parts]),
            identity=torch.cat([part.identity for part in parts]),
            maps=[torch.cat(maps) for maps in zip(*(part.maps for part in parts), strict=True)],
            features=torch.cat([part.features for part in parts]),
        )


def load(folder: Path) -> Judge:
    """The trained judge, from the folder of the weights."""
    judge = Judge()
    judge.load_state_dict(load_file(folder / FILE))
    return judge.eval()


def gram_distance(verdict: Verdict, style: Verdict) -> Tensor:
    """`[B]`: the relative Frobenius distance of Gram matrices, averaged over the three maps. 0 is the same style.

    `style` has one image, or one for each of `verdict`.
    """

    def grams(maps: Tensor) -> Tensor:
        return maps @ maps.mT / maps.shape[-1]

    distances = []
    for maps, wanted in zip(verdict.maps, style.maps, strict=True):
        target = grams(wanted)
        gap = (grams(maps) - target).flatten(1).norm(dim=1)
        distances.append(gap / target.flatten(1).norm(dim=1))
    return torch.stack(distances).mean(0)


def mean_iou(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Intersection over union of each class over all pictures, and the mean over the classes that there are."""
    result = {}
    for i, name in enumerate(portraits.CLASSES):
        both, either = ((predicted == i) & (truth == i)).sum(), ((predicted == i) | (truth == i)).sum()
        if either:
            result[name] = float(both / either)
    return result | {"mean": float(np.mean(list(result.values())))}


def frechet(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to `[N, C]` and `[M, C]` (Heusel et al., arXiv 1706.08500)."""
    a, b = features.double(), reference.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # tr (Σa Σb)^½ is the sum of the roots of the eigenvalues of Σb^½ Σa Σb^½, which is symmetric.
    values, vectors = torch.linalg.eigh(cov_b)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_a @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def verification(embeddings: Tensor, who: Tensor) -> dict[str, float]:
    """Same person or not, for all pairs of `embeddings` `[N, C]`: ROC AUC, and acceptance at a FAR of 1 %."""
    embeddings = F.normalize(embeddings)
    i, j = torch.triu_indices(len(who), len(who), 1)
    score, same = (embeddings @ embeddings.T)[i, j], who[i] == who[j]
    ranks = torch.empty(len(score), dtype=torch.float64)
    ranks[score.argsort()] = torch.arange(1, len(score) + 1, dtype=torch.float64)
    positives, negatives = int(same.sum()), int((~same).sum())
    auc = (float(ranks[same].sum()) - positives * (positives + 1) / 2) / (positives * negatives)
    threshold = score[~same].sort().values[int(0.99 * negatives)]
    return {
        "auc": auc,
        "accepted_at_far_1": float((score[same] > threshold).float().mean()),
        "threshold": float(threshold),
    }
