"""Restores portraits with the demo workflows in a real ComfyUI server; started by `quickstart.py demo`.

Each workflow of `workflows/api/` is queued twice, as it is and with its guidance taken out: same seed, same empty
prompt. The portraits come from a range of seeds that chose no setting. They run as one batch, each with its own loss.
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
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import portraits
from comfy_server import PACK, ComfyServer, ExecutionError, PromptRejected, Run, ServerError
from PIL import Image, ImageDraw, ImageFont

WORKFLOWS = {
    "toy_inpainting": "Half of the pixels missing",
    "toy_super_resolution": "4 times smaller",
    "toy_deblur": "Blurred",
}
COUNT = 8
STAGES = ("degraded", "unguided", "guided")

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


# Pictures


def load(files: list[bytes]) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]


def psnr(image: np.ndarray, original: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of an 8-bit image."""
    error = np.mean((image.astype(np.float64) - original) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-10)))


def contact_sheet(originals: list[np.ndarray], results: dict[str, dict[str, Any]]) -> Image.Image:
    """A row a portrait: the original, then a block a workflow with degraded, unguided and guided."""
    cell, gap, block_gap, head, foot, margin = 128, 6, 26, 66, 18, 24
    left = [margin + cell + block_gap + block * (3 * cell + 2 * gap + block_gap) for block in range(len(results))]
    width = left[-1] + 3 * cell + 2 * gap + margin
    sheet = Image.new("RGB", (width, margin + head + len(originals) * (cell + foot) + margin), "#f6f4f0")
    draw = ImageDraw.Draw(sheet)
    title, label, small = (ImageFont.load_default(size) for size in (19, 14, 11))

    def text(x: float, y: float, what: str, font: Any, fill: str = "#333333") -> None:
        draw.text((x, y), what, font=font, fill=fill, anchor="mm")

    text(margin + cell / 2, margin + head - 14, "original", label)
    for x0, (name, result) in zip(left, results.items(), strict=True):
        text(x0 + 1.5 * cell + gap, margin + 12, WORKFLOWS[name], title, "#111111")
        gain = np.mean(result["psnr_guided"]) - np.mean(result["psnr_unguided"])
        text(x0 + 1.5 * cell + gap, margin + 32, f"guidance: {gain:+.1f} dB", small, "#777777")
        for column, stage in enumerate(STAGES):
            text(x0 + column * (cell + gap) + cell / 2, margin + head - 14, stage, label)
    for row, original in enumerate(originals):
        y = margin + head + row * (cell + foot)
        sheet.paste(Image.fromarray(original), (margin, y))
        for x0, result in zip(left, results.values(), strict=True):
            for column, stage in enumerate(STAGES):
                x = x0 + column * (cell + gap)
                picture = Image.fromarray(result["pictures"][stage][row])
                sheet.paste(picture.resize((cell, cell), Image.Resampling.NEAREST), (x, y))
                if stage != "degraded":
                    decibel = result[f"psnr_{stage}"][row]
                    text(x + cell / 2, y + cell + foot / 2 - 1, f"{decibel:.1f} dB", small, "#777777")
    return sheet


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
            print(
                f"\r  {title}: step {step} of {steps}, {seconds:.0f} s, about {left:.0f} s left  ", end="", flush=True
            )

    print(f"  {title}: ", end="", flush=True)
    run = server.run(prompt, on_progress=show, timeout=3600)
    print(f"\r  {title}: {run.seconds:.0f} s{' ' * 40}" if live else f"{run.seconds:.0f} s", flush=True)
    return run


def run_workflow(server: ComfyServer, name: str, originals: list[np.ndarray], pictures: list[str], out: Path) -> dict:
    """Run one workflow with and without guidance, write its pictures, and measure them."""
    guided_prompt = batched(json.loads((PACK / "workflows" / "api" / f"{name}.json").read_text("utf-8")), pictures)
    save = node_of(guided_prompt, "SaveImage")
    runs = {
        stage: follow(server, prompt, f"{name}, {stage}, {len(originals)} portraits")
        for stage, prompt in (("unguided", unguided(guided_prompt)), ("guided", guided_prompt))
    }
    degraded = preview_of(guided_prompt, "SphereGuideDegradeImage")
    files = {
        "degraded": server.images(runs["unguided"], degraded),
        "unguided": server.images(runs["unguided"], save),
        "guided": server.images(runs["guided"], save),
    }
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
    curves.write_bytes(server.images(runs["guided"], preview_of(guided_prompt, "SphereGuideReport"))[0])
    result: dict[str, Any] = {
        "pictures": {stage: load(contents) for stage, contents in files.items()},
        "seconds": round(runs["guided"].seconds, 1),
        "seconds_unguided": round(runs["unguided"].seconds, 1),
        "images": [*written, curves.relative_to(out).as_posix()],
    }
    for stage in ("unguided", "guided"):
        measured = zip(result["pictures"][stage], originals, strict=True)
        result[f"psnr_{stage}"] = [round(psnr(image, original), 2) for image, original in measured]
    return result


def describe_host(server: ComfyServer) -> dict[str, str]:
    stats = server.get_json("/system_stats")
    packaged = "COMFYUI_PATH" not in os.environ
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
    import torch

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
                results = {name: run_workflow(server, name, originals, pictures, out) for name in WORKFLOWS}
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

    print(f"\nMean PSNR to the original in dB, {COUNT} portraits\n")
    print(f"  {'workflow':24}{'unguided':>10}{'guided':>10}{'gain':>10}")
    for name, result in results.items():
        before, after = np.mean(result["psnr_unguided"]), np.mean(result["psnr_guided"])
        print(f"  {name:24}{before:10.1f}{after:10.1f}{after - before:+10.1f}")
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
