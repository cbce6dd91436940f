"""Runs the demo workflows in a real ComfyUI server; started by `quickstart.py demo`.

Each workflow of `workflows/api/` is queued as it is and with its guidance taken out: same seed, same prompt.
Those that restore take portraits from a range of seeds that chose no setting, as one batch, each with its own loss, and
are measured by PSNR. Those that steer draw several pictures, which are scored by a network that guided none of them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    __package__ = "demo"

from . import portraits
from .comfy_server import PACK, ComfyServer, ExecutionError, PromptRejected, Run, ServerError
from .judge import Judge, Verdict, gram_distance, mean_iou, to_tensor
from .judge import load as load_judge

RESTORED = {
    "toy_inpainting": "Half of the pixels missing",
    "toy_super_resolution": "4 times smaller",
    "toy_deblur": "Blurred",
    "toy_thumbnail": "16 times smaller",
}
COUNT = 8
STAGES = ("degraded", "unguided", "guided")


@dataclass(frozen=True)
class Steered:
    """A workflow that draws pictures by a condition, and how they are scored.

    score   the name of it; `from_judge` gives it for each picture, out of the judge's verdicts on the pictures and on
            the workflow's own (`pictures`, in the folder of the workflows)
    wanted  the attributes that its text names
    """

    title: str
    score: str
    from_judge: Callable[[Steered, Verdict, list[Verdict]], np.ndarray]
    pictures: tuple[str, ...] = ()
    wanted: dict[str, str] = field(default_factory=dict)

    def attributes(self, verdict: Verdict, _: list[Verdict]) -> np.ndarray:
        """Share of the wanted attributes that the judge sees."""
        names = list(portraits.ATTRIBUTES)
        right = [
            verdict.labels[:, names.index(name)] == portraits.ATTRIBUTES[name].index(value)
            for name, value in self.wanted.items()
        ]
        return np.mean(right, axis=0)

    def overlap(self, verdict: Verdict, _: list[Verdict]) -> np.ndarray:
        """Mean intersection over union of each picture's classes with the map, which is the last of `pictures`."""
        colors = beside_workflow(self.pictures[-1])
        truth = np.abs(colors[:, :, None].astype(int) - portraits.CLASS_COLORS).sum(-1).argmin(-1)
        return np.array([mean_iou(classes, truth)["mean"] for classes in verdict.class_map])

    def style(self, verdict: Verdict, references: list[Verdict]) -> np.ndarray:
        """Distance of Gram matrices: lower is better."""
        return gram_distance(verdict, references[0]).numpy()

    def face(self, verdict: Verdict, references: list[Verdict]) -> np.ndarray:
        """Cosine similarity to the face of the first picture."""
        return F.cosine_similarity(verdict.identity, references[0].identity).numpy()

    def all_three(self, verdict: Verdict, references: list[Verdict]) -> np.ndarray:
        return np.mean([score(verdict, references) for score in (self.attributes, self.overlap, self.face)], axis=0)


FACE, MAP, STYLE = (f"sphereguide_{name}.png" for name in ("portrait", "map", "style"))
STEERED = {
    "toy_clip_text": Steered(
        "red hair, yellow clothes, teal background",
        "attributes found",
        Steered.attributes,
        wanted={"hair_color": "red", "clothes": "yellow", "background": "teal"},
    ),
    "toy_segmentation": Steered("this map", "mIoU", Steered.overlap, (MAP,)),
    "toy_style": Steered("this style", "Gram distance", Steered.style, (STYLE,)),
    "toy_text_style": Steered("this style, a prompt", "Gram distance", Steered.style, (STYLE,)),
    "toy_faceid": Steered("this face", "face similarity", Steered.face, (FACE,)),
    "toy_combined": Steered(
        "blue hair, orange background, this face, this map",
        "mean of all three",
        Steered.all_three,
        (FACE, MAP),
        {"hair_color": "blue", "background": "orange"},
    ),
}
DRAWN = 1  # pictures of each of these: the demo shall take minutes on two cores
WEIGHTS = Path(__file__).parent / "weights"

Prompt = dict[str, dict[str, Any]]


# Prompts


def node_of(prompt: Prompt, class_type: str) -> str:
    """The id of the one node of this type."""
    (node_id,) = (node_id for node_id, node in prompt.items() if node["class_type"] == class_type)
    return node_id


def preview_of(prompt: Prompt, class_type: str) -> str:
    """The id of the PreviewImage that shows what the one node of this type made."""
    source = node_of(prompt, class_type)
    (node_id,) = (
        node_id
        for node_id, node in prompt.items()
        if node["class_type"] == "PreviewImage" and node["inputs"]["images"][0] == source
    )
    return node_id


def read(name: str) -> Prompt:
    return json.loads((PACK / "workflows" / "api" / f"{name}.json").read_text("utf-8"))


def batched(prompt: Prompt, pictures: list[str]) -> Prompt:
    """The same workflow for several pictures of the input folder at once."""
    prompt = deepcopy(prompt)
    loader = node_of(prompt, "LoadImage")
    prompt[loader]["inputs"]["image"] = pictures[0]
    whole = loader
    for number, picture in enumerate(pictures[1:], 2):
        prompt[f"picture {number}"] = {"class_type": "LoadImage", "inputs": {"image": picture}}
        inputs = {"image1": [whole, 0], "image2": [f"picture {number}", 0]}
        whole = f"pictures 1 to {number}"
        prompt[whole] = {"class_type": "ImageBatch", "inputs": inputs}
    prompt[node_of(prompt, "SphereGuideDegradeImage")]["inputs"]["image"] = [whole, 0]
    prompt[node_of(prompt, "EmptyLatentImage")]["inputs"]["batch_size"] = len(pictures)
    return prompt


def unguided(prompt: Prompt) -> Prompt:
    """The same workflow with guidance taken out: the sampler that it steered, and no report."""
    prompt = deepcopy(prompt)
    guidance = prompt.pop(node_of(prompt, "SphereGuideDSG"))
    prompt.pop(preview_of(prompt, "SphereGuideReport"))
    report = prompt.pop(node_of(prompt, "SphereGuideReport"))
    prompt[node_of(prompt, "SamplerCustom")]["inputs"]["sampler"] = guidance["inputs"]["sampler"]
    prompt[node_of(prompt, "VAEDecode")]["inputs"]["samples"] = report["inputs"]["samples"]
    return prompt


def recipe(prompt: Prompt, node_id: str) -> list[Any]:
    """How a node's result comes about, whatever the nodes are called: the same for two workflows that make the same."""
    node = prompt[node_id]
    inputs = {
        name: [recipe(prompt, value[0]), value[1]] if isinstance(value, list) else value
        for name, value in sorted(node["inputs"].items())
        if name != "filename_prefix"
    }
    return [node["class_type"], inputs]


# Pictures


def load(files: list[bytes]) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]


def beside_workflow(name: str) -> np.ndarray:
    return load([(PACK / "workflows" / name).read_bytes()])[0]


def psnr(image: np.ndarray, original: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of an 8-bit image."""
    error = np.mean((image.astype(np.float64) - original) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-10)))


CELL, GAP, FOOT, MARGIN = 128, 6, 18, 24


class Sheet:
    """The contact sheet: pictures in cells, with text."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.image = Image.new("RGB", size, "#f6f4f0")
        self.draw = ImageDraw.Draw(self.image)
        self.fonts = {size: ImageFont.load_default(size) for size in (19, 14, 11)}

    def text(self, x: float, y: float, what: str, size: int = 14, fill: str = "#333333", anchor: str = "mm") -> None:
        self.draw.text((x, y), what, font=self.fonts[size], fill=fill, anchor=anchor)

    def picture(self, x: int, y: int, pixels: np.ndarray, below: str = "") -> None:
        picture = Image.fromarray(pixels)
        self.image.paste(picture.resize((CELL, CELL), Image.Resampling.NEAREST), (x, y))
        self.text(x + CELL / 2, y + CELL + FOOT / 2 - 1, below, 11, "#777777")


def contact_sheet(originals: list[np.ndarray], results: dict[str, dict[str, Any]]) -> Image.Image:
    """A row a portrait: the original, then for each workflow that restores degraded, unguided and guided. Below, a row
    for each workflow that steers: what it steers by, pictures without guidance, and the same seeds with it."""
    restored = {name: results[name] for name in RESTORED}
    head, block_gap = 66, 26
    blocks = [MARGIN + CELL + block_gap + n * (3 * CELL + 2 * GAP + block_gap) for n in range(len(restored))]
    below = MARGIN + head + len(originals) * (CELL + FOOT) + 10
    width = blocks[-1] + 3 * CELL + 2 * GAP + MARGIN
    sheet = Sheet((width, below + head + len(STEERED) * (CELL + FOOT) + MARGIN))

    sheet.text(MARGIN + CELL / 2, MARGIN + head - 14, "original")
    for x0, (name, result) in zip(blocks, restored.items(), strict=True):
        sheet.text(x0 + 1.5 * CELL + GAP, MARGIN + 12, RESTORED[name], 19, "#111111")
        gain = np.mean(result["psnr_guided"]) - np.mean(result["psnr_unguided"])
        sheet.text(x0 + 1.5 * CELL + GAP, MARGIN + 32, f"guidance: {gain:+.1f} dB", 11, "#777777")
        for column, stage in enumerate(STAGES):
            sheet.text(x0 + column * (CELL + GAP) + CELL / 2, MARGIN + head - 14, stage)
    for row, original in enumerate(originals):
        y = MARGIN + head + row * (CELL + FOOT)
        sheet.picture(MARGIN, y, original)
        for x0, result in zip(blocks, restored.values(), strict=True):
            for column, stage in enumerate(STAGES):
                note = "" if stage == "degraded" else f"{result[f'psnr_{stage}'][row]:.1f} dB"
                sheet.picture(x0 + column * (CELL + GAP), y, result["pictures"][stage][row], note)

    middle = blocks[1]  # two pictures and their text fit before it
    right = middle + DRAWN * (CELL + GAP) + block_gap
    sheet.text(MARGIN, below + head - 14, "steered by", anchor="lm")
    for x0, title in ((middle, "unguided"), (right, "guided")):
        sheet.text(x0 + (DRAWN * (CELL + GAP) - GAP) / 2, below + head - 14, title)
    for row, (name, task) in enumerate(STEERED.items()):
        y, result = below + head + row * (CELL + FOOT), results[name]
        for column, file in enumerate(task.pictures):
            sheet.picture(MARGIN + column * (CELL + GAP), y, beside_workflow(file))
        x = MARGIN + len(task.pictures) * (CELL + GAP) + (10 if task.pictures else 0)
        lines = textwrap.wrap(task.title, 24)
        for line, what in enumerate(lines):
            sheet.text(x, y + CELL / 2 + (line - len(lines) / 2) * 20, what, 14, anchor="lm")
        sheet.text(x, y + CELL / 2 + (len(lines) / 2) * 20 + 4, task.score, 11, "#777777", "lm")
        for x0, stage in ((middle, "unguided"), (right, "guided")):
            for column, pixels in enumerate(result["pictures"][stage]):
                sheet.picture(x0 + column * (CELL + GAP), y, pixels, f"{result[f'score_{stage}'][column]:.2f}")
    return sheet.image


# The run


def follow(server: ComfyServer, prompt: Prompt, title: str) -> Run:
    """Run a prompt with one line on the terminal: steps, seconds, and about how many are left."""
    live = sys.stdout.isatty()
    started = time.monotonic()

    def show(run: Run) -> None:
        _, step, steps = run.progress[-1]
        seconds = time.monotonic() - started
        left = seconds / max(step, 1) * (steps - step)
        if live:
            rewrite(f"  {title}: step {step} of {steps}, {seconds:.0f} s, about {left:.0f} s left")

    print(f"  {title}: ", end="", flush=True)
    run = server.run(prompt, on_progress=show, timeout=3600)
    if live:
        rewrite(f"  {title}: {run.seconds:.0f} s", end="\n")
    else:
        print(f"{run.seconds:.0f} s", flush=True)
    return run


def rewrite(line: str, end: str = "") -> None:
    """Writes over the line of a terminal: one that wraps could not be written over."""
    width = shutil.get_terminal_size().columns - 1
    print(f"\r{line[:width]:{width}}", end=end, flush=True)


def run_workflow(
    server: ComfyServer, name: str, prompt: Prompt, count: int, out: Path, known: dict[str, tuple[list[bytes], float]]
) -> dict[str, Any]:
    """Run one workflow with and without guidance, and write its pictures.

    Without guidance several workflows are the same: `known` keeps the pictures and the seconds of those that have run.
    """
    save, pictures = node_of(prompt, "SaveImage"), "1 portrait" if count == 1 else f"{count} portraits"
    plain = unguided(prompt)
    if (key := json.dumps(recipe(plain, save))) not in known:
        run = follow(server, plain, f"{name}, unguided, {pictures}")
        known[key] = server.images(run, save), round(run.seconds, 1)
    guided = follow(server, prompt, f"{name}, guided, {pictures}")
    files = {"unguided": known[key][0], "guided": server.images(guided, save)}
    if name in RESTORED:
        files = {"degraded": server.images(guided, preview_of(prompt, "SphereGuideDegradeImage"))} | files
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for stage, contents in files.items():
        for index, content in enumerate(contents):
            path = folder / f"{index}_{stage}.png"
            path.write_bytes(content)
            written.append(path.relative_to(out).as_posix())
            if stage == "degraded":  # beside the portraits, for Load Image
                (server.input / f"{name}_{index}.png").write_bytes(content)
    curves = folder / "guidance_report.png"
    curves.write_bytes(server.images(guided, preview_of(prompt, "SphereGuideReport"))[0])
    return {
        "pictures": {stage: load(contents) for stage, contents in files.items()},
        "seconds": round(guided.seconds, 1),
        "seconds_unguided": known[key][1],
        "images": [*written, curves.relative_to(out).as_posix()],
    }


def restore(
    server: ComfyServer, name: str, originals: list[np.ndarray], files: list[str], out: Path, known: dict[str, Any]
) -> dict[str, Any]:
    result = run_workflow(server, name, batched(read(name), files), len(files), out, known)
    for stage in STAGES:
        measured = zip(result["pictures"][stage], originals, strict=True)
        result[f"psnr_{stage}"] = [round(psnr(enlarged(image, original), original), 2) for image, original in measured]
    return result


def enlarged(image: np.ndarray, like: np.ndarray) -> np.ndarray:
    """What is to be had of a smaller picture without a model."""
    if image.shape == like.shape:
        return image
    return np.asarray(Image.fromarray(image).resize(like.shape[1::-1], Image.Resampling.BICUBIC))


def steer(
    server: ComfyServer, name: str, task: Steered, judge: Judge, out: Path, known: dict[str, Any]
) -> dict[str, Any]:
    for picture in task.pictures:
        shutil.copy(PACK / "workflows" / picture, server.input)
    prompt = read(name)
    prompt[node_of(prompt, "EmptyLatentImage")]["inputs"]["batch_size"] = DRAWN
    result = run_workflow(server, name, prompt, DRAWN, out, known)

    def verdict(images: list[np.ndarray]) -> Verdict:
        return judge.of(to_tensor(np.stack(images)))

    references = [verdict([beside_workflow(picture)]) for picture in task.pictures]
    result["score"] = task.score
    for stage in ("unguided", "guided"):
        scores = task.from_judge(task, verdict(result["pictures"][stage]), references)
        result[f"score_{stage}"] = [round(float(score), 3) for score in scores]
    return result


def describe_host(server: ComfyServer) -> dict[str, str]:
    stats = server.get_json("/system_stats")
    packaged = not os.environ.get("COMFYUI_PATH")
    return {
        "comfyui": f"{importlib.metadata.version('comfyui')} (PyPI)"
        if packaged
        else stats["system"].get("comfyui_version", "unknown"),
        "python": sys.version.split()[0],
        "torch": importlib.metadata.version("torch"),
        "device": stats["devices"][0]["name"],
        "system": sys.platform,
    }


def device() -> str:
    return "auto" if torch.cuda.is_available() or torch.backends.mps.is_available() else "cpu"


def demo(out: Path) -> None:
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    originals = [np.asarray(portraits.render(seed)) for seed in portraits.DEMO_SEEDS[:COUNT]]
    with tempfile.TemporaryDirectory(prefix="sphereguide-demo-", ignore_cleanup_errors=True) as base:
        server = ComfyServer(Path(base), device=device())
        pictures = [f"portrait_{index}.png" for index in range(COUNT)]
        for name, original in zip(pictures, originals, strict=True):
            for folder in (server.input, out):
                Image.fromarray(original).save(folder / name)
        print("  Starting ComfyUI: ", end="", flush=True)
        try:
            with server:
                print(f"{time.monotonic() - started:.0f} s", flush=True)
                host = describe_host(server)
                known: dict[str, Any] = {}
                results = {name: restore(server, name, originals, pictures, out, known) for name in RESTORED}
                judge = load_judge(WEIGHTS)
                results |= {name: steer(server, name, task, judge, out, known) for name, task in STEERED.items()}
        finally:
            shutil.copy(server.log_path, out / "comfyui.log")
    contact_sheet(originals, results).save(out / "contact_sheet.png")
    report = {
        "host": host,
        "workflows": {
            name: {key: value for key, value in result.items() if key != "pictures"} for name, result in results.items()
        },
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    print(f"\n  {'workflow':24}{'':>18}{'degraded':>10}{'unguided':>10}{'guided':>10}")
    for name, result in results.items():
        measure = "psnr" if name in RESTORED else "score"
        values = [np.mean(result.get(f"{measure}_{stage}", np.nan)) for stage in STAGES]
        what = "PSNR in dB" if name in RESTORED else result["score"]
        digits = 1 if name in RESTORED else 2
        print(f"  {name:24}{what:>18}" + "".join(f"{value:10.{digits}f}" for value in values).replace("nan", "   "))
    print(f"\n{out / 'contact_sheet.png'}\n{out / 'report.json'}\nDone in {time.monotonic() - started:.0f} s.")


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped too
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    try:
        demo(parser.parse_args().out)
    except (ExecutionError, PromptRejected, ServerError) as error:
        print(f"\nThe demo failed. {error}\nWhat ComfyUI said is in comfyui.log beside the pictures.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
