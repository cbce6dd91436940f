"""Draws the pictures of the help pages: too weak, good, too strong. `python -m demo.strengths [NAME …]`, from the root.

Runs the toy workflows through a real ComfyUI with one setting changed, and writes `web/docs/strengths/<name>.jpg`.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .comfy_server import PACK, ComfyServer
from .run import CELL, FOOT, GAP, Prompt, Sheet, beside_workflow, load, node_of, preview_of, read, unguided

FOLDER = PACK / "web" / "docs" / "strengths"
DSG, DEGRADE, SAMPLE = "SphereGuideDSG", "SphereGuideDegradeImage", "SamplerCustom"
DPS, ILVR, SCALING = "SphereGuideDPS", "SphereGuideILVR", "SphereGuideEpsilonScaling"
CUTOUTS = {"distance": "spherical", "cutouts": 4, "min_size": 0.5, "max_size": 1.0, "augment": True}


@dataclass(frozen=True)
class Strip:
    """`setting` of the node `of` at three values, in a workflow that `changed` makes into another.

    shown    what it steers by: a picture that lies beside the workflows, or "degraded"; "" for a text
    """

    workflow: str
    values: tuple[float, float, float]
    shown: str = ""
    changed: Callable[[Prompt], None] = lambda prompt: None
    of: str = DSG
    setting: str = "guidance_rate"


def replaced(prompt: Prompt, old: str, new: str, **inputs: object) -> None:
    """The node of type `old` becomes one of another type."""
    prompt[node_of(prompt, old)] = {"class_type": new, "inputs": inputs}


def motion(prompt: Prompt) -> None:
    degraded = node_of(prompt, DEGRADE)
    prompt[degraded]["inputs"] |= {"operator": "motion blur", "length": 15.0, "angle": 30.0}
    loss = {"length": 15.0, "angle": 30.0, "image": [degraded, 0]}
    replaced(prompt, "SphereGuideGaussianDeblurLoss", "SphereGuideMotionDeblurLoss", **loss)


def low_pass(prompt: Prompt) -> None:
    picture = node_of(prompt, "LoadImage")
    replaced(prompt, "SphereGuideGaussianDeblurLoss", "SphereGuideLowPassLoss", image=[picture, 0], factor=8)
    prompt.pop(preview_of(prompt, DEGRADE))
    prompt.pop(node_of(prompt, DEGRADE))


def clip_image(prompt: Prompt) -> None:
    model, picture = node_of(prompt, "SphereGuideLoadOpenCLIP"), node_of(prompt, "LoadImage")
    loss = {"open_clip_model": [model, 0], "image": [picture, 0], "references": "average", **CUTOUTS}
    replaced(prompt, "SphereGuideStyleGramLoss", "SphereGuideCLIPImageLoss", **loss)


def over_sampler(prompt: Prompt, class_type: str, **inputs: object) -> None:
    """No guidance, and this node over the sampler in its place."""
    plain = unguided(prompt)
    sample = plain[node_of(plain, SAMPLE)]["inputs"]
    plain["over"] = {"class_type": class_type, "inputs": {"sampler": sample["sampler"], **inputs}}
    sample["sampler"] = ["over", 0]
    prompt.clear()
    prompt.update(plain)


def ilvr(prompt: Prompt) -> None:
    pixels, vae = [node_of(prompt, "LoadImage"), 0], prompt[node_of(prompt, DSG)]["inputs"]["vae"]
    prompt["reference"] = {"class_type": "VAEEncode", "inputs": {"pixels": pixels, "vae": vae}}
    over_sampler(prompt, ILVR, reference=["reference", 0], factor=4, start_percent=0.0, end_percent=0.8)


def epsilon(prompt: Prompt) -> None:
    over_sampler(prompt, SCALING, schedule="uniform", b=1.0, k=0.0, start_percent=0.0, end_percent=1.0)
    prompt[node_of(prompt, "KSamplerSelect")]["inputs"]["sampler_name"] = "euler"
    prompt[node_of(prompt, "BasicScheduler")]["inputs"]["steps"] = 10


def dps(prompt: Prompt) -> None:
    guidance = prompt[node_of(prompt, DSG)]["inputs"]
    same = ("sampler", "loss", "vae", "interval", "start_percent", "end_percent", "gradient", "checkpointing")
    replaced(prompt, DSG, DPS, step_size=1.0, **{key: guidance[key] for key in same})


PORTRAIT, MAP, STYLE = (f"sphereguide_{name}.png" for name in ("portrait", "map", "style"))
STRIPS = {
    "inpainting": Strip("toy_inpainting", (0.01, 0.2, 0.9), "degraded"),
    "super_resolution": Strip("toy_super_resolution", (0.01, 0.14, 0.9), "degraded"),
    "gaussian_deblur": Strip("toy_deblur", (0.01, 0.14, 0.9), "degraded"),
    "motion_deblur": Strip("toy_deblur", (0.01, 0.14, 0.9), "degraded", motion),
    "low_pass": Strip("toy_deblur", (0.01, 0.14, 0.9), PORTRAIT, low_pass),
    "clip_text": Strip("toy_clip_text", (0.01, 0.1, 0.5)),
    "clip_image": Strip("toy_style", (0.01, 0.15, 0.5), PORTRAIT, clip_image),
    "segmentation": Strip("toy_segmentation", (0.01, 0.1, 0.6), MAP),
    "style": Strip("toy_style", (0.02, 0.2, 0.8), STYLE),
    "faceid": Strip("toy_faceid", (0.02, 0.3, 0.8), PORTRAIT),
    "dps": Strip("toy_super_resolution", (0.5, 10, 100), "degraded", dps, DPS, "step_size"),
    "ilvr": Strip("toy_deblur", (16, 4, 2), PORTRAIT, ilvr, ILVR, "factor"),
    "epsilon": Strip("toy_clip_text", (1.0, 1.08, 1.3), "", epsilon, SCALING, "b"),
}


def draw(server: ComfyServer, strip: Strip) -> Image.Image:
    prompt = read(strip.workflow)
    strip.changed(prompt)
    beside = strip.shown in (PORTRAIT, MAP, STYLE)
    if beside:
        prompt[node_of(prompt, "LoadImage")]["inputs"]["image"] = strip.shown
    tiles: list[tuple[str, np.ndarray]] = []
    for value in strip.values:
        prompt[node_of(prompt, strip.of)]["inputs"][strip.setting] = value
        run = server.run(prompt, timeout=600)
        tiles.append((f"{strip.setting} {value:g}", load(server.images(run, node_of(prompt, "SaveImage")))[0]))
        if strip.shown == "degraded" and len(tiles) == 1:
            tiles.insert(0, ("", load(server.images(run, preview_of(prompt, DEGRADE)))[0]))
    if beside:
        tiles.insert(0, ("", beside_workflow(strip.shown)))
    sheet = Sheet((len(tiles) * (CELL + GAP) - GAP, CELL + FOOT))
    for column, (label, pixels) in enumerate(tiles):
        sheet.picture(column * (CELL + GAP), 0, pixels, label)
    return sheet.image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(STRIPS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sphereguide-", ignore_cleanup_errors=True) as base:
        server = ComfyServer(Path(base))
        for picture in (PORTRAIT, MAP, STYLE):
            shutil.copy(PACK / "workflows" / picture, server.input)
        with server:
            for name in options.names:
                draw(server, STRIPS[name]).save(options.out / f"{name}.jpg", quality=82, optimize=True)
                print(name, flush=True)


if __name__ == "__main__":
    main()
