"""docs/troubleshooting.md lists what the pack says when something is wrong, and the server gives it back as it is."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bootstrap import ROOT
from comfy_server import ComfyServer, ExecutionError, PromptRejected
from sphereguide.demo.run import Prompt, node_of

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ROOMS = ("host.py", "quickstart.py", "nodes/", "samplers/", "losses/", "models/", "demo/toy_portraits.py")


# -- the page and the source -------------------------------------------------------------------------------------------


def sources() -> list[Path]:
    return sorted(
        file
        for file in [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")]
        if file.relative_to(ROOT).as_posix().startswith(ROOMS)
    )


def rendered(node: ast.expr, known: dict[str, str]) -> str:
    """What an expression says, with … for what is only known when it runs. `known`: the constants of its module."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(rendered(part, known) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return known.get(ast.unparse(node.value), "…")
    if isinstance(node, ast.BinOp):
        return rendered(node.left, known) + rendered(node.right, known)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "strip":
        return rendered(node.func.value, known)
    return "…"


def said(file: Path) -> Iterator[str]:
    """The messages of the exceptions that a file raises, of its warnings, and of its functions that make messages."""
    module = ast.parse(file.read_text(encoding="utf-8"))
    constants = (node for node in module.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant))
    known = {ast.unparse(node.targets[0]): str(node.value.value) for node in constants}
    for node in ast.walk(module):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            yield rendered(node.exc.args[0], known)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "log.warning":
            yield re.sub(r"%\S*?[sdfg]", "…", rendered(node.args[0], known))
        elif isinstance(node, ast.FunctionDef) and node.name.endswith("_message"):
            yield from (rendered(line.value, known) for line in ast.walk(node) if isinstance(line, ast.Return))


def for_users(message: str) -> bool:
    """A sentence begins with a capital letter, or with the title of its node.

    What begins otherwise is a part of such a sentence, or is for those who call the pack from Python.
    """
    return bool(re.match(r"[A-Z]|…:? [A-Za-z]|…: ['…]", message))


def fits(quote: str, message: str, anything: str = "[^.]*?") -> bool:
    """Whether the message begins as the quote says, in which … is anything within a sentence."""
    return bool(re.match(anything.join(map(re.escape, quote.split("…"))), message))


MESSAGES = {message: file.relative_to(ROOT).as_posix() for file in sources() for message in said(file)}
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| what it says")
]
QUOTES = [quote for row in ROWS for quote in re.findall(r"`([^`]+)`", row[0])]


def test_every_message_for_users_is_in_the_page():
    missing = [f"{file}: {message}" for message, file in MESSAGES.items() if for_users(message)]
    missing = [entry for entry in missing if not any(fits(quote, entry.partition(": ")[2]) for quote in QUOTES)]
    assert not missing, "\n".join(missing)


def test_every_message_in_the_page_is_in_the_source():
    gone = [quote for quote in QUOTES if not any(fits(quote, message) for message in MESSAGES)]
    assert QUOTES and not gone, "\n".join(gone)


def test_every_row_says_what_why_and_what_to_do():
    assert all(len(row) == 3 and all(row) for row in ROWS), [row for row in ROWS if len(row) != 3]


# -- what the server gives back ----------------------------------------------------------------------------------------


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


PICTURE = ["picture", 0]
LOW_PASS = node("SphereGuideLowPassLoss", image=PICTURE, factor=8)
OPEN_CLIP = node("SphereGuideLoadOpenCLIP", model="toy_portraits/", dtype="fp32")
DSG = {"guidance_rate": 0.2, "interval": 1, "start_percent": 0.0, "end_percent": 1.0, "gradient": "fast"}
DSG |= {"checkpointing": False, "loss": ["loss", 0], "vae": ["toy", 2]}
RANGE = {"start_percent": 0.0, "end_percent": 1.0}


def guided(**nodes: Any) -> Prompt:
    """Two guided steps, with other nodes for those of these names, or more."""
    return {
        "toy": node("SphereGuideToyPortraits"),
        "text": node("CLIPTextEncode", text="", clip=["toy", 1]),
        "picture": node("LoadImage", image="portrait.png"),
        "loss": LOW_PASS,
        "plain": node("KSamplerSelect", sampler_name="euler_ancestral"),
        "sampler": node("SphereGuideDSG", sampler=["plain", 0], **DSG),
        "sigmas": node("BasicScheduler", model=["toy", 0], scheduler="normal", steps=2, denoise=1.0),
        "latent": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "sample": node(
            "SamplerCustom",
            **{"add_noise": True, "noise_seed": 0, "cfg": 1.0, "model": ["toy", 0], "latent_image": ["latent", 0]},
            **{"positive": ["text", 0], "negative": ["text", 0], "sampler": ["sampler", 0], "sigmas": ["sigmas", 0]},
        ),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="latent"),
        **nodes,
    }


def with_loss(class_type: str, loader: dict[str, Any] = OPEN_CLIP, **inputs: Any) -> Prompt:
    return guided(loader=loader, loss=node(class_type, **inputs))


def demo(name: str, **changes: dict[str, Any]) -> Prompt:
    """A workflow of the pack, with other inputs for the nodes of these types."""
    prompt = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for class_type, inputs in changes.items():
        prompt[node_of(prompt, class_type)]["inputs"].update(inputs)
    return prompt


TEXT = {"open_clip_model": ["loader", 0], "negative_text": "", "negative_weight": 0.5, "distance": "cosine"}
TEXT |= {"cutouts": 0, "min_size": 0.5, "max_size": 1.0, "augment": False}
STYLE = {"style": PICTURE, "clip_layers": "77", "vgg_layers": "relu1_1", "vgg_size": 256}
SEGMENTATION = node("SphereGuideLoadSegmentationModel", name="toy_portraits/", architecture="from the file name")
FACE = node("SphereGuideLoadFaceEncoder", name="toy_portraits/", embedding="output")
BOX = {"references": "average", "crop": "fixed box", "detect_every": 5, "margin": 0.1, "distance": "cosine"}
BOX |= {"box_left": 0.8, "box_top": 0.2, "box_right": 0.2, "box_bottom": 0.8}
BLUR = {"operator": "gaussian blur", "mask_fraction": 0.5, "factor": 4, "kernel_size": 255, "sigma": 3.0}
SCALED = {"schedule": "measured", "b": 1.0, "k": 0.0, **RANGE}
WEIGHTS = {f"weight_{i}": 0.0 for i in range(1, 5)}

#: what is queued; the node that stops it; how the page quotes the message; what it ends with
WRONG = {
    "broken weights": (
        with_loss("SphereGuideStyleGramLoss", node("SphereGuideLoadVGG", name="vgg19.pth"), vgg=["loader", 0], **STYLE),
        "SphereGuideLoadVGG",
        "…: … is broken or holds more than weights",
        "save its state_dict alone.",
    ),
    "model that is gone": (
        with_loss(
            "SphereGuideCLIPTextLoss", node("SphereGuideLoadOpenCLIP", model="gone/", dtype="fp32"), text="a", **TEXT
        ),
        "SphereGuideLoadOpenCLIP",
        "…: '…' is not in models/…",
        "Put it there and press R in ComfyUI, or choose another.",
    ),
    "empty text": (
        with_loss("SphereGuideCLIPTextLoss", text="a |", **TEXT),
        "SphereGuideCLIPTextLoss",
        "CLIP Text Loss: there is no text in part … of …",
        "such as: a red car | at night:0.5",
    ),
    "class that is not known": (
        with_loss(
            "SphereGuideSegmentationLoss",
            SEGMENTATION,
            **{"segmentation_model": ["loader", 0], "mask": ["picture", 1], "class_name": "hat"},
            **{"colors": "", "tolerance": 8, "unlabelled": ""},
        ),
        "SphereGuideSegmentationLoss",
        "…: the network has no class '…'",
        "Its classes: background, skin, hair, eyes, mouth, clothes, glasses.",
    ),
    "layer that is not there": (
        with_loss("SphereGuideStyleGramLoss", open_clip_model=["loader", 0], **STYLE),
        "SphereGuideStyleGramLoss",
        "Style Gram Loss: …: …",
        "It has 1, 2, 3, 4.",
    ),
    "empty box": (
        with_loss("SphereGuideFaceIDLoss", FACE, face_encoder=["loader", 0], image=PICTURE, **BOX),
        "SphereGuideFaceIDLoss",
        "FaceID Loss: the box from … is empty",
        "Left must be below right, and top below bottom.",
    ),
    "no weight": (
        guided(
            loss=node("SphereGuideCombineLosses", loss_1=["a", 0], loss_2=["a", 0], normalise=True, **WEIGHTS),
            a=LOW_PASS,
        ),
        "SphereGuideCombineLosses",
        "Combine Losses: all weights are 0",
        "Set at least one above 0.",
    ),
    "empty mask": (
        guided(
            loss=node("SphereGuideMaskLoss", loss=["a", 0], mask=["mask", 0], sees="region"),
            a=LOW_PASS,
            mask=node("SolidMask", value=0.0, width=16, height=16),
        ),
        "SphereGuideMaskLoss",
        "Mask Loss: the mask is empty",
        "Paint what shall be guided.",
    ),
    "wide blur": (
        guided(
            loss=node("SphereGuideLowPassLoss", image=["degraded", 0], factor=8),
            degraded=node("SphereGuideDegradeImage", image=["small", 0], noise=0.0, seed=0, **BLUR),
            small=node("ImageScale", image=PICTURE, upscale_method="area", width=64, height=64, crop="disabled"),
        ),
        "SphereGuideDegradeImage",
        "A blur of kernel_size … is too wide",
        "Choose a kernel_size of at most 127.",
    ),
    "guided twice": (
        guided(
            once=node("SphereGuideDSG", sampler=["plain", 0], **DSG),
            sampler=node("SphereGuideDSG", sampler=["once", 0], **DSG),
        ),
        "SamplerCustom",
        "…: this sampler is guided already",
        "Guide it once, with one loss.",
    ),
    "reference behind guidance": (
        guided(
            sampler=node("SphereGuideILVR", sampler=["once", 0], reference=["latent", 0], factor=4, **RANGE),
            once=node("SphereGuideDSG", sampler=["plain", 0], **DSG),
        ),
        "SamplerCustom",
        "ILVR Reference needs the sampler itself",
        "Connect the sampler to ILVR Reference, and that to DSG Guidance.",
    ),
    "no schedule": (
        guided(sampler=node("SphereGuideEpsilonScaling", sampler=["plain", 0], **SCALED)),
        "SphereGuideEpsilonScaling",
        "…: 'measured' takes an epsilon_schedule",
        "or choose uniform or linear.",
    ),
    "few images": (
        demo("toy_calibrate", SphereGuideDrawToyPortraits={"count": 4}),
        "SphereGuideEpsilonScalingCalibrate",
        "…: … real images can't say",
        "VAE Encode a batch of at least 8, better 32 or more.",
    ),
    "half a probe": (
        demo("toy_amed_sample", SphereGuideAMEDScheduler={"points": "expanded", "latent": ["5", 0]}),
        "SphereGuideAMEDScheduler",
        "AMED Scheduler: a probe takes positive, negative and latent",
        "Connect all three, or none.",
    ),
    "name with a colon": (
        demo("toy_amed_train", SphereGuideAMEDTrain={"name": "a:b"}),
        "SphereGuideAMEDTrain",
        "…: '…' is no name for a file",
        "'a:b' is no name for a file in models/amed. Take letters, such as toy_6.",
    ),
}


@pytest.fixture(scope="module")
def server(comfy_server: ComfyServer) -> ComfyServer:
    picture = (ROOT / "workflows" / "sphereguide_portrait.png").read_bytes()
    (comfy_server.input / "portrait.png").write_bytes(picture)
    weights = comfy_server.base / "models" / "vgg" / "vgg19.pth"
    weights.parent.mkdir(exist_ok=True)
    weights.write_bytes(b"<html>Not found</html>")
    return comfy_server


@pytest.mark.server
@pytest.mark.parametrize("case", WRONG)
def test_the_server_says_what_the_page_says_and_goes_on(server: ComfyServer, case: str) -> None:
    prompt, node_type, quote, end = WRONG[case]
    with pytest.raises(ExecutionError) as error:
        server.run(prompt)
    message = error.value.exception_message
    assert error.value.node_type == node_type
    assert quote in QUOTES and fits(quote, message, ".*?")
    assert end in message and "\n" not in message
    server.run(guided(latent=node("EmptyLatentImage", width=128, height=128, batch_size=1 + len(case) % 2)))


@pytest.mark.server
def test_what_another_computer_lacks_is_refused_by_name(server: ComfyServer) -> None:
    encoder = node("SphereGuideLoadFaceEncoder", name="gone/", embedding="output")
    with pytest.raises(PromptRejected, match=r"Value not in list.*'gone/'"):
        server.run(with_loss("SphereGuideFaceIDLoss", encoder, face_encoder=["loader", 0], image=PICTURE, **BOX))
    with pytest.raises(PromptRejected, match="SphereGuideOfTomorrow"):
        server.run(guided(loss=node("SphereGuideOfTomorrow", image=PICTURE)))
    server.run(guided())
