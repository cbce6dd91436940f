"""Draws the pictures of the help pages: too weak, good, too strong. `python -m demo.strengths [NAME …]`, from the root.

Runs the toy workflows through a real ComfyUI with one setting changed, and writes `web/docs/strengths/<name>.jpg`.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .comfy_server import PACK, ComfyServer
from .run import CELL, FOOT, GAP, Prompt, Sheet, beside_workflow, load, node_of, preview_of, read, unguided

FOLDER = PACK / "web" / "docs" / "strengths"
LIMIT = 20_000  # bytes of a picture: the pack carries them all
DSG, DEGRADE, SAMPLE = "SphereGuideDSG", "SphereGuideDegradeImage", "SamplerCustom"
RGD, TFG = "SphereGuideDiffRGD", "SphereGuideTFG"
TFG_SETTINGS = {"preset": "custom", "mu": 0.3, "n_iter": 4, "n_recur": 1, "sigma_bar": 0.0, "samples": 1}
DPS, ILVR, SCALING = "SphereGuideDPS", "SphereGuideILVR", "SphereGuideEpsilonScaling"
AMED, COMBINE, LOW_PASS = "SphereGuideAMEDSampler", "SphereGuideCombineLosses", "SphereGuideLowPassLoss"
CUTOUTS = {"distance": "spherical", "cutouts": 4, "min_size": 0.5, "max_size": 1.0, "augment": True}


@dataclass(frozen=True)
class Strip:
    """`setting` of the node `of` at some values, in a workflow that `changed` makes into another.

    shown    what it steers by: a picture that lies beside the workflows, or two, or "degraded"; "" for a text
    labels   what stands below, where it is not the setting and its value
    plot     there is one value, and what comes of it is a plot: drawn in this width, with nothing below
    """

    workflow: str
    values: tuple[Any, ...]
    shown: str = ""
    changed: Callable[[Prompt], None] = lambda prompt: None
    of: str = DSG
    setting: str = "guidance_rate"
    labels: tuple[str, ...] = ()
    plot: int = 0


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
    replaced(prompt, "SphereGuideGaussianDeblurLoss", LOW_PASS, image=[picture, 0], factor=8)
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


def in_place_of_dsg(class_type: str, **settings: Any) -> Callable[[Prompt], None]:
    """Another method's node, with the settings that all share."""
    same = ("sampler", "loss", "vae", "interval", "start_percent", "end_percent", "gradient", "checkpointing")

    def changed(prompt: Prompt) -> None:
        guidance = prompt[node_of(prompt, DSG)]["inputs"]
        replaced(prompt, DSG, class_type, **settings, **{key: guidance[key] for key in same})

    return changed


def over_loss(prompt: Prompt, class_type: str, nodes: dict[str, dict[str, object]]) -> None:
    """Several nodes of that type over the loss, which is "loss" from now on; their names and inputs."""
    guidance = prompt[node_of(prompt, DSG)]["inputs"]
    prompt["loss"] = prompt.pop(guidance["loss"][0])
    guidance["loss"] = ["loss", 0]
    for name, inputs in nodes.items():
        prompt[name] = {"class_type": class_type, "inputs": {"loss": ["loss", 0], **inputs}}


def schedule(prompt: Prompt) -> None:
    """Strong guidance in a part of the sampling."""
    prompt[node_of(prompt, DSG)]["inputs"]["guidance_rate"] = 0.6
    windows = {"short": (0.0, 0.1), "early": (0.0, 0.3), "late": (0.6, 1.0)}
    nodes = {
        name: {"weight": 1.0, "curve": "window", "start_percent": start, "end_percent": end}
        for name, (start, end) in windows.items()
    }
    over_loss(prompt, "SphereGuideScheduleLoss", nodes)


def mask(prompt: Prompt) -> None:
    """A prompt, and what the coarse parts of a portrait add to it in a region."""
    low_pass(prompt)
    prompt[node_of(prompt, LOW_PASS)]["inputs"]["factor"] = 4
    positive = prompt[node_of(prompt, SAMPLE)]["inputs"]["positive"][0]
    prompt[positive]["inputs"]["text"] = "portrait of a person with long blue hair, orange background"
    prompt["black"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 128, "height": 128}}
    nodes: dict[str, dict[str, object]] = {}
    for name, (width, height, x, y) in REGIONS.items():
        prompt[f"{name} white"] = {
            "class_type": "SolidMask",
            "inputs": {"value": 1.0, "width": width, "height": height},
        }
        at = {"destination": ["black", 0], "source": [f"{name} white", 0], "x": x, "y": y, "operation": "add"}
        prompt[f"{name} mask"] = {"class_type": "MaskComposite", "inputs": at}
        nodes[name] = {"mask": [f"{name} mask", 0], "sees": "whole image"}
    over_loss(prompt, "SphereGuideMaskLoss", nodes)


def combine(prompt: Prompt) -> None:
    """A style and a map, in place of a text, a face and a map."""
    face = prompt.pop(node_of(prompt, "SphereGuideFaceIDLoss"))["inputs"]
    prompt.pop(face["face_encoder"][0])
    prompt[face["image"][0]]["inputs"]["image"] = STYLE
    text = node_of(prompt, "SphereGuideCLIPTextLoss")
    gram = read("toy_style")
    style = gram[node_of(gram, "SphereGuideStyleGramLoss")]
    seen = {"style": face["image"], "open_clip_model": prompt[text]["inputs"]["open_clip_model"]}
    prompt[text] = {**style, "inputs": style["inputs"] | seen}
    losses = prompt[node_of(prompt, COMBINE)]["inputs"]
    losses["loss_2"] = losses.pop("loss_3")


def amed(prompt: Prompt) -> None:
    """The learned solver's pictures beside those of the stock sampler with as many model calls, and with many."""
    prompt[node_of(prompt, "EmptyLatentImage")]["inputs"] |= {"batch_size": 1}
    prompt.pop(node_of(prompt, "SphereGuideSweep"))
    steps = prompt.pop(node_of(prompt, "BasicScheduler"))
    samples = [key for key, node in prompt.items() if node["class_type"] == SAMPLE]
    learned = next(key for key in samples if prompt[key]["inputs"]["sampler"][0] == node_of(prompt, AMED))
    (stock,) = (prompt.pop(key) for key in samples if key != learned)
    decode = next(node for node in prompt.values() if node["class_type"] == "VAEDecode")
    for key in [key for key, node in prompt.items() if node["class_type"] in ("VAEDecode", "SaveImage")]:
        prompt.pop(key)
    sampled = {"amed": learned}
    for number in (6, 50):
        prompt[f"{number} steps"] = {**steps, "inputs": steps["inputs"] | {"steps": number}}
        sampled[f"stock {number}"] = f"{number} sampled"
        prompt[f"{number} sampled"] = {**stock, "inputs": stock["inputs"] | {"sigmas": [f"{number} steps", 0]}}
    for name, key in sampled.items():
        prompt[name] = {**decode, "inputs": decode["inputs"] | {"samples": [key, 0]}}
    prompt["save"] = {"class_type": "SaveImage", "inputs": {"filename_prefix": "amed", "images": ["amed", 0]}}


def degrade(prompt: Prompt) -> None:
    """Nothing but the degraded picture."""
    kept = {key: prompt[key] for key in (node_of(prompt, kind) for kind in ("LoadImage", DEGRADE, "SaveImage"))}
    kept[node_of(kept, DEGRADE)]["inputs"] |= {"length": 15.0, "angle": 30.0}
    kept[node_of(kept, "SaveImage")]["inputs"]["images"] = [node_of(kept, DEGRADE), 0]
    prompt.clear()
    prompt.update(kept)


def report(prompt: Prompt) -> None:
    prompt.pop(preview_of(prompt, "SphereGuideReport"))
    prompt[node_of(prompt, "SaveImage")]["inputs"]["images"] = [node_of(prompt, "SphereGuideReport"), 1]


PORTRAIT, MAP, STYLE = (f"sphereguide_{name}.png" for name in ("portrait", "map", "style"))
REGIONS = {"point": (8, 8, 60, 76), "face": (48, 40, 40, 52)}  # width, height, left, top
OPERATORS = ("inpainting", "super-resolution", "gaussian blur", "motion blur")
STRIPS = {
    "inpainting": Strip("toy_inpainting", (0.01, 0.2, 0.9), "degraded"),
    "super_resolution": Strip("toy_thumbnail", (0.01, 0.14, 0.9), "degraded"),
    "gaussian_deblur": Strip("toy_deblur", (0.01, 0.14, 0.9), "degraded"),
    "motion_deblur": Strip("toy_deblur", (0.01, 0.14, 0.9), "degraded", motion),
    "low_pass": Strip("toy_deblur", (64, 32, 8), PORTRAIT, low_pass, LOW_PASS, "factor"),
    "clip_text": Strip("toy_clip_text", (0.01, 0.1, 0.5)),
    "clip_image": Strip("toy_style", (0.01, 0.15, 0.5), PORTRAIT, clip_image),
    "segmentation": Strip("toy_segmentation", (0.01, 0.1, 0.6), MAP),
    "style": Strip("toy_style", (0.02, 0.2, 0.8), STYLE),
    "faceid": Strip("toy_faceid", (0.02, 0.3, 0.8), PORTRAIT),
    "dps": Strip("toy_super_resolution", (0.5, 10, 100), "degraded", in_place_of_dsg(DPS), DPS, "step_size"),
    "diffrgd": Strip(
        "toy_super_resolution", (0.05, 10, 1000), "degraded", in_place_of_dsg(RGD, iterations=3), RGD, "step_size"
    ),
    "tfg": Strip("toy_super_resolution", (0.05, 3, 100), "degraded", in_place_of_dsg(TFG, **TFG_SETTINGS), TFG, "rho"),
    "ilvr": Strip("toy_deblur", (16, 4, 2), PORTRAIT, ilvr, ILVR, "factor"),
    "epsilon": Strip("toy_clip_text", (1.0, 1.08, 1.3), "", epsilon, SCALING, "b"),
    "calibrate": Strip("toy_calibrate", (16,), "", of=f"{SCALING}Calibrate", setting="samples", plot=560),
    "report": Strip("toy_clip_text", (0.1,), "", report, plot=560),
    "combine": Strip(
        "toy_combined",
        (0.05, 0.4, 3),
        f"{STYLE} {MAP}",
        combine,
        COMBINE,
        "weight_1",
        labels=("style 0.05", "style 0.4", "style 3"),
    ),
    "schedule": Strip(
        "toy_segmentation",
        (["short", 0], ["early", 0], ["late", 0]),
        MAP,
        schedule,
        setting="loss",
        labels=("0 to 0.1", "0 to 0.3", "0.6 to 1"),
    ),
    "mask": Strip(
        "toy_deblur",
        (["point", 0], ["face", 0], ["loss", 0]),
        PORTRAIT,
        mask,
        setting="loss",
        labels=("a point", "the face", "no mask"),
    ),
    "amed": Strip(
        "toy_amed_sample",
        (["stock 6", 0], ["amed", 0], ["stock 50", 0]),
        "",
        amed,
        "SaveImage",
        "images",
        labels=("uni_pc, 6 calls", "AMED, 6 calls", "uni_pc, 50 calls"),
    ),
    "degrade": Strip("toy_inpainting", OPERATORS, PORTRAIT, degrade, DEGRADE, "operator", labels=OPERATORS),
}


def draw(server: ComfyServer, strip: Strip) -> Image.Image:
    prompt = read(strip.workflow)
    strip.changed(prompt)
    beside = [name for name in strip.shown.split() if name != "degraded"]
    if len(beside) == 1:
        prompt[node_of(prompt, "LoadImage")]["inputs"]["image"] = strip.shown
    tiles: list[tuple[str, np.ndarray]] = []
    for number, value in enumerate(strip.values):
        prompt[node_of(prompt, strip.of)]["inputs"][strip.setting] = value
        run = server.run(prompt, timeout=3600)
        label = strip.labels[number] if strip.labels else f"{strip.setting} {value:g}"
        tiles.append((label, load(server.images(run, node_of(prompt, "SaveImage")))[0]))
        if strip.shown == "degraded" and len(tiles) == 1:
            tiles.insert(0, ("", load(server.images(run, preview_of(prompt, DEGRADE)))[0]))
    if strip.plot:
        plot = Image.fromarray(tiles[0][1])
        return plot.resize((strip.plot, round(plot.height * strip.plot / plot.width)), Image.Resampling.LANCZOS)
    tiles = [("", beside_workflow(name)) for name in beside] + tiles
    sheet = Sheet((len(tiles) * (CELL + GAP) - GAP, CELL + FOOT))
    for column, (label, pixels) in enumerate(tiles):
        sheet.picture(column * (CELL + GAP), 0, pixels, label)
    return sheet.image


def small(image: Image.Image) -> bytes:
    """A JPEG file of at most LIMIT bytes."""
    for quality in range(82, 40, -4):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= LIMIT:
            break
    return file.getvalue()


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
                (options.out / f"{name}.jpg").write_bytes(small(draw(server, STRIPS[name])))
                print(name, flush=True)


if __name__ == "__main__":
    main()
