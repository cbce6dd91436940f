"""Trains the AMED predictors for Toy Portraits. From the root, with a ComfyUI as in the tests:

    python -m demo.train_amed [STUDENT_NFE …] [--out DIR]      ipndm_4 ipndm_6 ipndm_8 ipndm_5

A number of model calls that is one short of whole steps is one with AFS. Runs resume. cfg is 1, and each trajectory has
a caption of its own.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from bootstrap import import_host, import_pack

    import_host(cpu=False)
    import_pack()

import comfy.samplers
import torch
from sphereguide import host
from sphereguide.demo import portraits, toy_portraits
from sphereguide.samplers.amed import predictor as files
from sphereguide.samplers.amed.students import PARALLEL
from sphereguide.samplers.amed.training import Plan, Progress, settings_for, train

FOLDER = toy_portraits.WEIGHTS / "amed"
SHIPPED = ("ipndm_4", "ipndm_6", "ipndm_8", "ipndm_5")
SHAPE = (4, 16, 16)
PLAN = Plan(trajectories=192, epochs=6, batch_size=16, learning_rate=0.02)
CAPTIONS = portraits.VALIDATION_SEEDS[1000:1256]
LONG = 8
"""With as many calls the student is so near that it takes a finer teacher, and smaller steps of Adam."""


def recipe(student: str, nfe: int) -> dict[str, Any]:
    """What `settings_for` takes."""
    calls = 3 if student in PARALLEL else 2
    steps = -(-nfe // calls)
    teacher_steps = 32 if nfe >= LONG else 15  # about as many in all
    return {
        "teacher": "ipndm",
        "teacher_points": round(teacher_steps / steps) - 1,
        "student": student,
        "steps": steps,
        "schedule": "polynomial",
        "rho": 7.0,
        "afs": nfe % calls == calls - 1,
        "parallel": 2,
        "max_order": 4,
        "scale_dir": 0.1,
        "scale_time": 0.3,
        "cfg": 1.0,
    }


def trained(student: str, nfe: int, path: Path) -> None:
    """Writes the predictor to `path`; what is reached meanwhile lies beside it."""
    with torch.inference_mode():
        model, clip, _ = toy_portraits.load()
        texts = (portraits.caption(portraits.sample(seed)) for seed in CAPTIONS)
        captions = [entry for text in texts for entry in host.encoded(clip, text)]
        guider = comfy.samplers.CFGGuider(model)
        guider.set_cfg(1.0)
        settings = settings_for(model, **recipe(student, nfe))
        kept = path.with_suffix(".training.safetensors")
        plan = replace(PLAN, learning_rate=0.004) if nfe >= LONG else PLAN
        best, _ = train(guider, (captions, host.encoded(clip, "")), SHAPE, settings, plan, kept, Progress.log)
    files.save(best, path)
    kept.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=SHIPPED, metavar="STUDENT_NFE")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in options.names:
        student, nfe = name.split("_")
        trained(student, int(nfe), options.out / f"toy_portraits_{name}.safetensors")


if __name__ == "__main__":
    main()
