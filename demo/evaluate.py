"""Measures the demo models with the judge, which had no part in their training: the table of MODEL_CARD.md.

    python -m demo.evaluate --work DIR

The judge is reported on real portraits that it never saw beside the samples, so that its own errors are visible.
Samples: captions of TEST_SEEDS in random wording, cfg 3, 20 steps of euler_ancestral, ComfyUI's own sampling code.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from . import portraits, toy_portraits
from .bootstrap import import_host
from .judge import Judge, to_tensor
from .judge import load as load_judge
from .train import CACHE, images

EYE_AREA = (120, 560)
"""A component of the class "eyes" counts as an eye within these areas, in px of 128x128 (real ones: 220 to 440)."""
MOUTH_AREA = 40


def soften(x: Tensor, rng: torch.Generator) -> Tensor:
    """Blur and noise of random strength: the judges must not depend on crispness."""
    if torch.rand((), generator=rng) < 0.6:
        size = int(torch.randint(48, 120, (), generator=rng))
        small = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
        x = F.interpolate(small, size=x.shape[-2:], mode="bilinear")
    noise = torch.randn(x.shape, generator=rng) * float(torch.rand((), generator=rng)) * 0.04
    return (x + noise).clamp(0, 1)


def has_face(classes: np.ndarray) -> tuple[bool, bool]:
    """(exactly two eyes of a sensible size, a mouth) in a class map [128, 128]."""
    parts, count = ndimage.label(classes == portraits.CLASSES.index("eyes"))
    areas = ndimage.sum_labels(np.ones_like(parts), parts, range(1, count + 1)) if count else np.zeros(0)
    eyes = sum(EYE_AREA[0] <= area <= EYE_AREA[1] for area in areas)
    return eyes == 2, int((classes == portraits.CLASSES.index("mouth")).sum()) >= MOUTH_AREA


def mentioned(text: str, portrait: portraits.Portrait) -> set[str]:
    """The attributes of `portrait` that its caption `text` speaks of."""
    p = portrait
    patterns = {
        "hair_color": f"{p.hair_color} hair",
        "hair_style": rf"\b{p.hair_style}\b",
        "glasses": "glasses",
        "background": f"{p.background} background",
        "clothes": f"{p.clothes} (clothes|top|sweater)",
        "expression": p.expression,
        "style": rf"\b{p.style}\b",
    }
    return {name for name, pattern in patterns.items() if re.search(pattern, text)}


@torch.no_grad()
def shares(pixels: Tensor, people: list[portraits.Portrait], texts: list[str] | None, judge: Judge) -> dict[str, float]:
    """Share of images [N, 3, 128, 128] whose attributes are those of `people` (if their caption mentions them), and
    that have two eyes and a mouth."""
    verdict, rows = judge.of(pixels), {}
    predicted = verdict.labels
    for column, name in enumerate(portraits.ATTRIBUTES):
        right = []
        for i, person in enumerate(people):
            if texts is not None and name not in mentioned(texts[i], person):
                continue
            truth = portraits.labels(person)[name]
            if name == "glasses":  # worn or not
                right.append((predicted[i, column] > 0) == (truth > 0))
            else:
                right.append(predicted[i, column] == truth)
        rows[name] = float(np.mean(right))
    faces = np.array([has_face(one) for one in verdict.class_map])
    rows |= {"two eyes": float(faces[:, 0].mean()), "mouth": float(faces[:, 1].mean())}
    rows["two eyes and a mouth"] = float(faces.all(1).mean())
    return rows


@torch.inference_mode()
def samples(texts: list[str], seed: int = 0, cfg: float = 3.0, steps: int = 20, weights: Path | None = None) -> Tensor:
    """Images [N, 3, 128, 128] in 0..1 of the prompts, by ComfyUI's euler_ancestral, scheduler "normal"."""
    import comfy.sample

    model, clip, vae = toy_portraits.load(weights or toy_portraits.WEIGHTS)

    def encode(text: str) -> Tensor:
        return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)[0]

    empty, parts, began = encode(""), [], time.time()
    for start in range(0, len(texts), 32):
        context = torch.cat([encode(text) for text in texts[start : start + 32]])
        latent = torch.zeros(len(context), 4, 16, 16)
        noise = comfy.sample.prepare_noise(latent, seed + start)
        out = comfy.sample.sample(
            model, noise, steps, cfg, "euler_ancestral", "normal",
            [[context, {}]], [[empty, {}]], latent, disable_pbar=True, seed=seed + start,
        )  # fmt: skip
        parts.append(vae.decode(out).movedim(-1, 1).clone())
        left = (time.time() - began) * (len(texts) / (start + len(context)) - 1)
        print(f"samples {start + len(context)}/{len(texts)}  {left:.0f} s left", flush=True)
    return torch.cat(parts)


@torch.inference_mode()
def reconstruction(pixels: Tensor, weights: Path | None = None) -> tuple[Tensor, Tensor]:
    """VAEEncode and VAEDecode of images [N, 3, 128, 128]: (images, latents)."""
    vae = toy_portraits.load_vae(weights or toy_portraits.WEIGHTS)
    latents = torch.cat([vae.encode(part.movedim(1, -1)) for part in pixels.split(16)])
    return torch.cat([vae.decode(part).movedim(-1, 1) for part in latents.split(16)]).clone(), latents.clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=CACHE, help="data")
    parser.add_argument("--weights", type=Path, default=toy_portraits.WEIGHTS)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--grid", type=Path, default=Path(__file__).parent / "samples.jpg", help="the first 64 samples")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    judge = load_judge(toy_portraits.WEIGHTS)
    seeds = portraits.TEST_SEEDS[: args.samples]
    people = [portraits.sample(seed) for seed in seeds]
    real = to_tensor(images(seeds, args.work))
    import_host(cpu=True, pytorch_attention=True)  # behind the drawing, whose worker processes import this module
    restored, latents = reconstruction(real, args.weights)
    psnr = -10 * ((real - restored) ** 2).mean((1, 2, 3)).log10()
    texts = [portraits.caption(person, np.random.default_rng(seed)) for seed, person in zip(seeds, people, strict=True)]
    drawn = samples(texts, weights=args.weights)
    report = {
        "n": len(seeds),
        "vae": {
            "psnr_mean": float(psnr.mean()),
            "psnr_min": float(psnr.min()),
            "latent_mean": latents.mean((0, 2, 3)).tolist(),
            "latent_std": latents.std((0, 2, 3)).tolist(),
        },
        "real": shares(real, people, None, judge),
        "reconstructed": shares(restored, people, None, judge),
        "samples": shares(drawn, people, texts, judge),
        "chance": {name: 1 / len(values) for name, values in portraits.ATTRIBUTES.items()} | {"glasses": 0.5},
    }
    pixels = (drawn[:64].movedim(1, -1) * 255).round().byte().numpy()
    portraits.contact_sheet(pixels).reduce(2).save(args.grid, quality=80)
    (args.work / "evaluate.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report["vae"]))
    print("| | real | reconstructed | samples | chance |\n|---|---|---|---|---|")
    for name in report["real"]:
        chance = f"{report['chance'][name]:.0%}" if name in report["chance"] else ""
        columns = " | ".join(f"{report[column][name]:.1%}" for column in ("real", "reconstructed", "samples"))
        print(f"| {name.replace('_', ' ')} | {columns} | {chance} |")


if __name__ == "__main__":
    main()
