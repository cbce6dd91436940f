"""How near learned solvers come to where many steps lead, and how good their pictures are, beside all stock samplers.

    python quickstart.py bench amed [--quick] [--json FILE] [--parts rmse frechet overhead]

Each trajectory has noise and a caption of its own, which nothing was trained on; cfg is 1. `rmse` is the distance of
the latents, at sigma 0, to those of 200 steps of Heun's method on 256 trajectories, with the standard error of the
bootstrap. Every sampler and scheduler of the host is tried with as many steps as it takes to make `nfe` model calls or,
if it can't, fewer: on 32 trajectories, the best eight on all. `frechet` is the distance of a judge's features, which
nothing was trained on, between 2000 samples and portraits of the test seeds.

Predictors for iPNDM are those that ship; the others are trained here, in the same way. `train_seconds` is on one core.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "demo"), str(ROOT / "benchmarks")]
from bootstrap import import_host, import_pack  # noqa: E402

import_host(cpu=False)
import_pack()

import comfy.samplers  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from result import Result  # noqa: E402
from sphereguide import host  # noqa: E402
from sphereguide.demo import judge as judging  # noqa: E402
from sphereguide.demo import portraits, toy_portraits  # noqa: E402
from sphereguide.samplers.amed import predictor as files  # noqa: E402
from sphereguide.samplers.amed.sampling import amed_sampler, base_sigmas  # noqa: E402
from sphereguide.samplers.amed.schedules import time_points  # noqa: E402
from sphereguide.samplers.amed.students import STUDENTS, AdamsBashforth  # noqa: E402
from sphereguide.samplers.amed.training import Plan, settings_for, train  # noqa: E402
from sphereguide.samplers.kernel import noise_of  # noqa: E402
from torch import Tensor  # noqa: E402

SHIPPED = toy_portraits.WEIGHTS / "amed"
NFE, WITH_AFS = (4, 6, 8), (3, 5, 7)
SHAPE = (4, 16, 16)
CHUNK = 32
TRAJECTORIES, SCREENED, FINALISTS = 256, 32, 8
SAMPLES, REFERENCES, BEST_STOCK = 2000, 2048, 3
FINE = 200
NOISE = 77
"""Key of the noise: not one that training draws from."""


@dataclass(frozen=True)
class Cell:
    """`solver` stock, "ipndm alone" or a student; `schedule` a scheduler, or a predictor's."""

    solver: str
    schedule: str
    learned: bool
    nfe: int
    steps: int

    @property
    def key(self) -> dict[str, Any]:
        return {"solver": self.solver, "schedule": self.schedule, "learned": self.learned, "nfe": self.nfe}

    @property
    def name(self) -> str:
        return f"{self.solver}_{self.schedule}_{self.nfe}_{self.learned}".replace(" ", "-")


@functools.cache
def loaded() -> tuple[Any, Any, Any, Any]:
    """MODEL, a prompt for each trajectory, the empty one, VAE. As nodes would do it: in inference mode."""
    with torch.inference_mode():
        model, clip, vae = toy_portraits.load()

        def encode(text: str) -> list[Any]:
            tokens, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
            return [tokens, {"pooled_output": pooled}]

        captions = [portraits.caption(portraits.sample(seed)) for seed in portraits.TEST_SEEDS[:SAMPLES]]
        return model, [encode(text) for text in captions], [encode("")], vae


def predictor_file(student: str, nfe: int, folder: Path) -> Path:
    """The one that ships, or else where this benchmark keeps its own."""
    shipped = SHIPPED / f"toy_portraits_{student}_{nfe}.safetensors"
    return shipped if shipped.exists() else folder / shipped.name


def trained(student: str, nfe: int, folder: Path) -> Path:
    """A predictor for `nfe` model calls, odd with AFS: trained if there is none, as those that ship were."""
    path = predictor_file(student, nfe, folder)
    if not path.exists():
        model, _, empty, _ = loaded()
        with torch.inference_mode():
            settings = settings_for(model, **recipe(student, nfe))
            guider = comfy.samplers.CFGGuider(model)
            guider.set_cfg(1.0)
            kept = path.with_suffix(".training.safetensors")
            best, _ = train(guider, (training_prompts(), empty), SHAPE, settings, PLAN, kept)
            files.save(best, path)
    return path


def run(sampler: Any, sigmas: Tensor, start: int, count: int) -> Tensor:
    """Latents of the trajectories from `start` on, `[count, 4, 16, 16]`."""
    model, captions, empty, _ = loaded()
    with torch.inference_mode():
        prompt = torch.cat([tokens for tokens, _ in captions[start : start + count]])
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds([[prompt, {}]], empty)
        guider.set_cfg(1.0)
        noise = torch.stack([noise_of(SHAPE, NOISE, i) for i in range(start, start + count)])
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=start).clone()
