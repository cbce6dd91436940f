"""How the workflows are laid out: nodes and groups of each kind, from left to right."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from graph import Group, Node, Workflow

# These lie beside the workflows, for a person to drop on Load Image.
PICTURE = "sphereguide_portrait.png"
MAP = "sphereguide_map.png"
STYLE = "sphereguide_style.png"
STEPS = 20
FACTOR = 4
TOY = "toy_portraits/"  # the folder in which each loader finds the network that comes with the demo

Wire = tuple[str, str]


@dataclass(frozen=True)
class Model:
    """What loads a model, and the side of its pictures in pixels."""

    loader: Node
    size: int
    empty: str = "EmptyLatentImage"

    def latent(self, at: tuple[int, int], batch_size: int = 1) -> Node:
        widgets = {"width": self.size, "height": self.size, "batch_size": batch_size}
        return Node(self.empty, at, (300, 110), widgets)


TOYS = Model(Node("SphereGuideToyPortraits", (320, 0), (250, 70), title="Load Toy Portraits"), 128)


def checkpoint(file: str, size: int, empty: str = "EmptyLatentImage") -> Model:
    loader = Node("CheckpointLoaderSimple", (320, 0), (250, 100), {"ckpt_name": file}, title="Checkpoint")
    return Model(loader, size, empty)


def explained(text: str, height: int = 560) -> Node:
    return Node("Note", (0, 0), (270, height), {"text": paragraphs(text)}, title="What this does")


def paragraphs(text: str) -> str:
    """Text whose lines were broken for the source, with its paragraphs and list entries on one line each."""
    return re.sub(r"(?<!\n)\n(?!\n|- )", " ", text).strip()


def guidance(rate: float, **settings: Any) -> dict[str, Any]:
    """The widgets that DSG Guidance and KSampler (DSG Guided) share; `settings` are those that differ from here."""
    return {
        "guidance_rate": rate,
        "interval": 1,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "gradient": "full",
        "checkpointing": False,
        "rate_steps": 50,
        "recurrence": 0,
        "recurrence_start": 0.0,
        "recurrence_end": 1.0,
        "decode_scale": 1.0,
        "auto_strength": 0.0,
        **settings,
    }


def prompts(positive: str = "", negative: str = "") -> dict[str, Node]:
    title = "Prompt" if positive else "Prompt (may be empty)"
    wire = {"clip": ("model", "CLIP")}
    return {
        "positive": Node("CLIPTextEncode", (760, 80), (300, 100), {"text": positive}, wire, title),
        "negative": Node("CLIPTextEncode", (760, 225), (300, 100), {"text": negative}, wire, "Negative prompt"),
    }


def schedule(
    at: tuple[int, int], steps: int, title: str = "Steps", scheduler: str = "normal", model: Wire = ("model", "MODEL")
) -> Node:
    widgets = {"scheduler": scheduler, "steps": steps, "denoise": 1.0}
    return Node("BasicScheduler", at, (300, 110), widgets, {"model": model}, title)


def reroute(at: tuple[int, int], wire: Wire) -> Node:
    return Node("Reroute", at, (75, 26), {}, {"": wire})


def vae_bus(floor: int, turns: tuple[int, ...] = (290, 470)) -> dict[str, Node]:
    """The VAE's wire from the model down between the columns, to "vae" at `floor`: short pieces bend little."""
    nodes, before = {}, ("model", "VAE")
    for y in (*turns, *range(800, floor - 600, 460)):
        nodes[f"vae {y}"] = reroute((600, y), before)
        before = (f"vae {y}", "")
    return {**nodes, "vae": reroute((690, floor), before)}


def steered(
    name: str,
    condition: dict[str, Node],
    what: str,
    note: str,
    guidance_rate: float,
    prompt: str = "",
    cfg: float = 1.0,
    *,
    model: Model = TOYS,
    negative: str = "",
    steps: int = STEPS,
    sampler: str = "euler_ancestral",
    note_height: int = 560,
    rates: str = "",
    **settings: Any,
) -> Workflow:
    """The model samples from `prompt`, and DSG Guidance steers it by the node called "loss" of `condition`.

    `condition` is what makes that loss, in x from 320 to 1430 and in y from 540 (the loss: from 640). `what` is the
    title of its group. `settings` are those of DSG Guidance; `rates` are several guidance_rates, one after the other.
    """
    judged = [node for node in condition.values() if node.at[0] < 1110]
    left, lowest = min(node.at[0] for node in judged) - 20, max(node.at[1] + node.size[1] for node in judged)
    bottom = 1140 if rates else 1020
    floor = max(bottom + 70, lowest + 130)  # of the VAE's wire
    swept: dict[str, Node] = {}
    wires = {"sampler": ("select", "SAMPLER"), "loss": ("loss", "loss"), "vae": ("vae of guidance", "")}
    if rates:
        swept["rates"] = values((1130, 1060), rates, "Strengths")
        wires["guidance_rate"] = ("rates", "value")
    nodes = {
        "note": explained(note, note_height),
        "model": model.loader,
        **vae_bus(floor),
        "vae below": reroute((1340, floor), ("vae", "")),
        "vae of guidance": reroute((1440, bottom + 20), ("vae below", "")),
        "vae of result": reroute((2490, floor), ("vae below", "")),
        **prompts(prompt, negative),
        **condition,
        # Guidance
        "select": Node("KSamplerSelect", (1130, 540), (300, 60), {"sampler_name": sampler}, title="Sampler"),
        **swept,
        "dsg": Node(
            "SphereGuideDSG",
            (1520, 540),
            (300, 428),
            guidance(guidance_rate, **settings),
            wires,
            "DSG Guidance",
        ),
        # Sampling
        "models": reroute((1130, 0), ("model", "MODEL")),
        "schedule": schedule((1520, 190), steps, model=("models", "")),
        "latent": model.latent((1520, 335)),
        "sample": sampling(
            (1900, 0), cfg, {**SHARED, "sampler": ("dsg", "sampler"), "sigmas": ("schedule", "SIGMAS")}, "Sample"
        ),
        # The result
        "report": Node(
            "SphereGuideReport",
            (2270, 680),
            (230, 280),
            {},
            {"samples": ("sample", "output"), "trace": ("dsg", "trace")},
            "Guidance Report",
        ),
        "decode": Node(
            "VAEDecode", (2640, 540), (200, 60), {}, {"samples": ("report", "samples"), "vae": ("vae of result", "")}
        ),
        "save": Node(
            "SaveImage",
            (2910, 250),
            (300, 350),
            {"filename_prefix": f"sphereguide/{name}"},
            {"images": ("decode", "IMAGE")},
            "Guided picture",
        ),
        "curves": Node(
            "PreviewImage", (2640, 700), (570, 280), {}, {"images": ("report", "report")}, "How guidance went"
        ),
    }
    groups = [
        Group("Model and prompt", (300, -80, 780, 530), "#3f789e"),
        Group(what, (left, 460, 1080 - left, lowest - 430), "#88A"),
        Group("Guidance: the loss steers the sampler", (1110, 460, 730, bottom - 460), "#8A8"),
        Group("Sampling", (1500, -80, 720, 530), "#A88"),
        Group("Result", (2250, 170, 980, 830), "#b06634"),
    ]
    return Workflow(nodes, groups)


def restoration(
    name: str,
    operator: str,
    loss: str,
    loss_widgets: dict[str, Any],
    guidance_rate: float,
    note: str,
) -> Workflow:
    """Degrades a portrait in a known way, and guides a model that never learnt restoration to undo that."""
    measured = {"image": ("degrade", "image")}
    if loss == "SphereGuideInpaintingLoss":
        measured["mask"] = ("degrade", "mask")
    condition = {
        "picture": Node("LoadImage", (320, 540), (250, 340), {"image": PICTURE}, title="Original picture"),
        "degrade": Node(
            "SphereGuideDegradeImage",
            (760, 540),
            (300, 300),
            {
                "operator": operator,
                "mask_fraction": 0.5,
                "factor": loss_widgets.get("factor", FACTOR),
                "kernel_size": 61,
                "sigma": 3.0,
                "noise": 0.025,
                "seed": 1,
                "length": 9.0,
                "angle": 0.0,
            },
            {"image": ("picture", "IMAGE")},
            "Degrade Image",
        ),
        "degraded": Node(
            "PreviewImage", (1130, 760), (300, 240), {}, {"images": ("degrade", "image")}, "Degraded picture"
        ),
        "loss": Node(loss, (1130, 640), (300, 80), loss_widgets, measured),
    }
    return steered(name, condition, "A picture, degraded in a known way", note, guidance_rate)


def enlarged(size: int) -> dict[str, Node]:
    """A photo, cut and scaled down to what Super-Resolution Loss enlarges to pictures of that size."""
    side = size // FACTOR
    small = {"upscale_method": "lanczos", "width": side, "height": side, "crop": "center"}
    return {
        "photo": picture_of("Photo", "photo.jpg"),
        "small": Node("ImageScale", (760, 540), (300, 130), small, {"image": ("photo", "IMAGE")}, "Small picture"),
        "seen": Node(
            "PreviewImage", (1130, 760), (300, 240), {}, {"images": ("small", "IMAGE")}, "What shall be enlarged"
        ),
        "loss": Node(
            "SphereGuideSuperResolutionLoss", (1130, 640), (300, 80), {"factor": FACTOR}, {"image": ("small", "IMAGE")}
        ),
    }


def width_at(x: int) -> int:
    """Of a loader: in the first column the VAE's wire needs its room."""
    return 250 if x == 320 else 300


def open_clip(y: int = 540, x: int = 760, name: str = TOY) -> Node:
    return Node("SphereGuideLoadOpenCLIP", (x, y), (width_at(x), 90), {"model": name, "dtype": "fp32"})


def text_loss(at: tuple[int, int], text: str) -> Node:
    widgets = {
        "text": text,
        "negative_text": "",
        "negative_weight": 0.5,
        "distance": "spherical",
        "cutouts": 4,
        "min_size": 0.5,
        "max_size": 1.0,
        "augment": True,
    }
    return Node("SphereGuideCLIPTextLoss", at, (300, 350), widgets, {"open_clip_model": ("clip", "open_clip_model")})


def picture_of(title: str, picture: str, y: int = 540, x: int = 320) -> Node:
    return Node("LoadImage", (x, y), (width_at(x), 340), {"image": picture}, title=title)


def style_loss(at: tuple[int, int] = (1130, 640)) -> Node:
    layers = {"clip_layers": "3", "vgg_layers": "relu1_1, relu2_1, relu3_1, relu4_1, relu5_1", "vgg_size": 256}
    wires = {"style": ("style", "IMAGE"), "open_clip_model": ("clip", "open_clip_model")}
    return Node("SphereGuideStyleGramLoss", at, (300, 180), layers, wires)


def by_style(picture: str = STYLE, name: str = TOY) -> dict[str, Node]:
    return {
        "style": picture_of("Picture of the style", picture),
        "clip": open_clip(790, name=name),
        "loss": style_loss(),
    }


def by_text_and_style(picture: str, name: str, text: str) -> dict[str, Node]:
    """Both through one network; in y down to 1130."""
    return {
        "clip": open_clip(540, 320, name),
        "style": picture_of("Picture of the style", picture, 690),
        "text": text_loss((760, 540), text),
        "look": style_loss((760, 940)),
        "loss": combined((1130, 640), "text", "look"),
    }


def combined(at: tuple[int, int], *losses: str) -> Node:
    """All with the same weight."""
    weights = {f"weight_{number}": 1.0 for number in (1, 2, 3, 4)}
    wires = {f"loss_{number}": (name, "loss") for number, name in enumerate(losses, 1)}
    return Node("SphereGuideCombineLosses", at, (300, 240), {**weights, "normalise": True}, wires)


def segmentation_loader(y: int = 540, x: int = 760, name: str = TOY) -> Node:
    widgets = {"name": name, "architecture": "from the file name"}
    return Node("SphereGuideLoadSegmentationModel", (x, y), (width_at(x), 100), widgets)


def segmentation_loss(at: tuple[int, int], class_name: str = "", **wires: Wire) -> Node:
    """By the map, or by what else `wires` bring."""
    widgets = {"class_name": class_name, "colors": "", "tolerance": 8, "unlabelled": ""}
    wires = {"segmentation_model": ("segmenter", "segmentation_model"), **(wires or {"color_map": ("map", "IMAGE")})}
    return Node("SphereGuideSegmentationLoss", at, (300, 290), widgets, wires)


def rectangles(size: int, left: str, right: str, name: str) -> dict[str, Node]:
    """One class in a rectangle on the left, another in one on the right; in y down to 1010."""

    def placed(x: int, y: int) -> Node:
        widgets = {"x": x * size // 64, "y": 24 * size // 64, "operation": "add"}
        wires = {"destination": ("canvas", "MASK"), "source": ("rectangle", "MASK")}
        return Node("MaskComposite", (760, y), (300, 150), widgets, wires)

    whole = {"value": 0.0, "width": size, "height": size}
    part = {"value": 1.0, "width": size * 3 // 8, "height": size // 2}
    return {
        "canvas": Node("SolidMask", (320, 700), (250, 110), whole, title="Nowhere"),
        "rectangle": Node("SolidMask", (320, 890), (250, 110), part, title="Rectangle"),
        "segmenter": segmentation_loader(540, 760, name),
        "right": placed(36, 700),
        "left": placed(4, 890),
        "target": Node(
            "SphereGuideSegmentationTarget", (760, 1080), (300, 80), {"class_name": left}, {"mask": ("left", "MASK")}
        ),
        "loss": segmentation_loss((1130, 640), right, mask=("right", "MASK"), target=("target", "target")),
    }


def face_loader(y: int = 540, x: int = 760, name: str = TOY) -> Node:
    return Node("SphereGuideLoadFaceEncoder", (x, y), (width_at(x), 90), {"name": name, "embedding": "output"})


def face_loss(at: tuple[int, int], crop: str = "fixed box") -> Node:
    """The box is that in which the face encoder of Toy Portraits learnt to look: `FACE_BOX` of demo/portraits.py."""
    widgets = {
        "references": "average",
        "crop": crop,
        "detect_every": 5,
        "margin": 0.1,
        "box_left": 0.2,
        "box_top": 0.26,
        "box_right": 0.8,
        "box_bottom": 0.86,
        "distance": "euclidean",
    }
    wires = {"face_encoder": ("encoder", "face_encoder"), "image": ("face", "IMAGE")}
    return Node("SphereGuideFaceIDLoss", at, (300, 310), widgets, wires)


def channel(x: int, **wires: Wire) -> dict[str, Node]:
    """Wires that go on level, at the height of the sockets of a sampler at y = `SECOND`."""
    return {f"{name} 2": reroute((x, SECOND + 28 * place), wire) for place, (name, wire) in enumerate(wires.items())}


SECOND = 500
"""Where the second of two samplers stands."""
SHARED = {
    "model": ("models", ""),
    "positive": ("positive", "CONDITIONING"),
    "negative": ("negative", "CONDITIONING"),
}


def calibration(note: str) -> dict[str, Node]:
    """A model, its recipe of 10 Euler steps, and what Calibrate Epsilon Scaling finds for it; x up to 1880."""
    return {
        "note": explained(note),
        "model": TOYS.loader,
        **prompts(),
        "models": reroute((1130, 0), ("model", "MODEL")),
        "select": Node("KSamplerSelect", (1130, 700), (200, 60), {"sampler_name": "euler"}, title="Sampler"),
        "schedule": replace(schedule((1130, 820), 10, model=("models", "")), size=(200, 110)),
        **channel(1360, **SHARED),
        **vae_bus(780),
        "real": Node(
            "SphereGuideDrawToyPortraits", (320, 1010), (250, 90), {"first": 0, "count": 32}, title="Real images"
        ),
        "encode": Node(
            "VAEEncode", (1130, 1010), (200, 60), {}, {"pixels": ("real", "images"), "vae": ("vae", "")}, "Latents"
        ),
        "calibrate": Node(
            "SphereGuideEpsilonScalingCalibrate",
            (1520, 680),
            (360, 460),
            {"cfg": 1.0, "samples": 32, "batch_size": 16, "calibration_seed": 0, "from_images": False},
            {
                "model": ("model 2", ""),
                "positive": ("positive 2", ""),
                "negative": ("negative 2", ""),
                "sampler": ("select", "SAMPLER"),
                "sigmas": ("schedule", "SIGMAS"),
                "latents": ("encode", "LATENT"),
            },
            "Calibrate Epsilon Scaling",
        ),
    }


CALIBRATION = (
    Group("Model and prompt", (300, -80, 780, 530), "#3f789e"),
    Group("What real images look like", (300, 930, 290, 190), "#88A"),
    Group("The recipe", (1110, 620, 240, 470), "#8A8"),
    Group("What it needs", (1500, 600, 400, 560), "#b06634"),
)


def calibrate(name: str, note: str) -> Workflow:
    """The measurement alone, with its plot."""
    save = Node(
        "SaveImage",
        (1980, 680),
        (1000, 420),
        {"filename_prefix": f"sphereguide/{name}"},
        {"images": ("calibrate", "curves")},
        "What was measured",
    )
    groups = [*CALIBRATION, Group("Before and after", (1960, 600, 1040, 520), "#A88")]
    return Workflow({**calibration(note), "save": save}, groups)


def sampling(at: tuple[int, int], cfg: float, wires: dict[str, Wire], title: str) -> Node:
    """`wires` bring model, positive, negative, sampler and sigmas, and may bring the latent."""
    widgets = {"add_noise": True, "noise_seed": 7, "cfg": cfg}
    # with the preview that the page puts into it
    return Node("SamplerCustom", at, (300, 442), widgets, {"latent_image": ("latent", "LATENT"), **wires}, title)


def row(
    name: str, key: str, at: tuple[int, int], cfg: float, wires: dict[str, Wire], titles: tuple[str, str]
) -> dict[str, Node]:
    """A sampler, and on its right what it draws."""
    x, y = at
    wires_of_decode = {"samples": (f"sample {key}", "output"), "vae": ("vae of result", "")}
    pictures = {"images": (f"decode {key}", "IMAGE")}
    return {
        f"sample {key}": sampling(at, cfg, wires, titles[0]),
        f"decode {key}": Node("VAEDecode", (x + 410, y), (180, 60), {}, wires_of_decode),
        f"save {key}": Node(
            "SaveImage", (x + 660, y), (620, 440), {"filename_prefix": f"sphereguide/{name}"}, pictures, titles[1]
        ),
    }


def correction(at: tuple[int, int], title: str, sampler: Wire = ("select", "SAMPLER"), **wires: Wire) -> Node:
    """Epsilon Scaling: uniform, or measured where a schedule is among `wires`."""
    measured = "epsilon_schedule" in wires
    widgets = {"schedule": "measured" if measured else "uniform", "b": 1.0, "k": 0.0}
    widgets |= {"start_percent": 0.0, "end_percent": 1.0}
    return Node("SphereGuideEpsilonScaling", at, (300, 230), widgets, {"sampler": sampler, **wires}, title)


def values(at: tuple[int, int], numbers: str, title: str) -> Node:
    return Node("SphereGuideSweep", at, (300, 60), {"values": numbers}, title=title)


def corrected(name: str, model: Model, prompt: tuple[str, str], cfg: float, batch_size: int, note: str) -> Workflow:
    """The same seeds with b of 1, which is off, and two above."""
    nodes = {
        "note": explained(note, 760),
        "model": model.loader,
        **prompts(*prompt),
        "models": reroute((1130, 0), ("model", "MODEL")),
        "schedule": schedule((1520, 190), STEPS, model=("models", "")),
        "latent": model.latent((1520, 335), batch_size),
        **vae_bus(900),
        "vae of result": reroute((2170, 900), ("vae", "")),
        "select": Node("KSamplerSelect", (1130, 540), (300, 60), {"sampler_name": "euler"}, title="Sampler"),
        "b": values((1130, 680), "1, 1.005, 1.015", "Values of b"),
        "correction": correction((1520, 540), "Epsilon Scaling", b=("b", "value")),
        **row(
            name,
            "each",
            (1900, 0),
            cfg,
            {**SHARED, "sampler": ("correction", "sampler"), "sigmas": ("schedule", "SIGMAS")},
            ("Sample", "Off, a little, more"),
        ),
    }
    groups = [
        Group("Model and prompt", (300, -80, 780, 530), "#3f789e"),
        Group("Correction", (1110, 460, 730, 330), "#b58b2a"),
        Group("Sampling", (1500, -80, 720, 530), "#8A8"),
        Group("Side by side", (2260, -80, 940, 540), "#A88"),
    ]
    return Workflow(nodes, groups)


def side_by_side(name: str, b: str, note: str) -> Workflow:
    """The same seeds with several uniform corrections, and with what the calibration found."""
    shared = {**SHARED, "sigmas": ("schedule", "SIGMAS"), "sampler": ("select", "SAMPLER")}
    nodes = {
        **calibration(note),
        **channel(1360, **shared),
        "sigmas up": reroute((2290, 440), ("sigmas 2", "")),
        "sampler 3": reroute((1890, 612), ("sampler 2", "")),
        "b": values((1520, 225), b, "Values of b"),
        "uniform": correction((1980, 190), "Uniform", ("sampler 2", ""), b=("b", "value")),
        "measured": correction(
            (1980, 680), "Calibrated", ("sampler 3", ""), epsilon_schedule=("calibrate", "epsilon_schedule")
        ),
        "latent": TOYS.latent((2080, 1010), batch_size=4),
        "vae below": reroute((800, 1240), ("vae", "")),
        "vae of result": reroute((2770, 1240), ("vae below", "")),
        **row(
            name,
            "uniform",
            (2460, 0),
            1.0,
            {**SHARED, "sampler": ("uniform", "sampler"), "sigmas": ("sigmas up", "")},
            ("Sample", "Without, and uniform"),
        ),
        **row(
            name,
            "measured",
            (2460, SECOND),
            1.0,
            {**{key: (f"{key} 2", "") for key in (*SHARED, "sigmas")}, "sampler": ("measured", "sampler")},
            ("Sample", "Calibrated"),
        ),
    }
    groups = [
        *CALIBRATION,
        Group("The same at each step", (1500, 110, 800, 330), "#b58b2a"),
        Group("What was found", (1960, 642, 340, 290), "#b58b2a"),
        Group("The same seeds", (2440, -80, 340, 1040), "#8A8"),
        Group("Side by side", (2820, -80, 940, 1040), "#A88"),
    ]
    return Workflow(nodes, groups)


def few_calls(
    name: str,
    model: Model,
    predictor: str,
    prompt: tuple[str, str],
    cfg: float,
    batch_size: int,
    note: str,
    note_height: int = 560,
    known: tuple[str, str] = ("dpmpp_2m", "sgm_uniform"),
) -> Workflow:
    """A learned solver of six model calls beside a stock one of as many, and of fifty.

    known  the stock sampler and its scheduler
    """
    count = {1: "one", 2: "two", 4: "four"}[batch_size]
    stock = schedule((1520, 920), 6, "Stock steps", known[1])
    nodes = {
        "note": explained(note, note_height),
        "model": model.loader,
        **prompts(*prompt),
        "models": reroute((1130, 0), ("model", "MODEL")),
        **channel(1360, **SHARED),
        "load": Node("SphereGuideAMEDLoad", (760, 540), (300, 90), {"name": predictor}, title="Predictor"),
        "amed": Node("SphereGuideAMEDSampler", (1520, 190), (300, 60), {}, {"predictor": ("load", "predictor")}),
        "amed sigmas": Node(
            "SphereGuideAMEDScheduler",
            (1520, 310),
            (300, 130),
            {"points": "base"},
            {"predictor": ("load", "predictor"), "model": ("models", "")},
            "Its steps",
        ),
        "latent": model.latent((1520, 620), batch_size),
        "steps": values((760, 840), "6, 50", "Numbers of steps"),
        "select": Node("KSamplerSelect", (1520, 820), (300, 60), {"sampler_name": known[0]}, title="Stock sampler"),
        "stock": replace(stock, wires={"model": ("model 2", ""), "steps": ("steps", "whole")}),
        **vae_bus(1140),
        "vae of result": reroute((2210, 1140), ("vae", "")),
        **row(
            name,
            "amed",
            (1900, 0),
            cfg,
            {**SHARED, "sampler": ("amed", "sampler"), "sigmas": ("amed sigmas", "sigmas")},
            ("Learned solver", f"AMED with 6 calls, {count} pictures"),
        ),
        **row(
            name,
            "stock",
            (1900, SECOND),
            cfg,
            {
                **{key: (f"{key} 2", "") for key in SHARED},
                "sampler": ("select", "SAMPLER"),
                "sigmas": ("stock", "SIGMAS"),
            },
            ("Stock sampler", f"Stock with 6 calls, then with 50, {count} each"),
        ),
    }
    groups = [
        Group("Model and prompt", (300, -80, 780, 530), "#3f789e"),
        Group("What was learnt", (740, 460, 340, 190), "#b06634"),
        Group("Six calls, and fifty", (740, 760, 340, 160), "#88A"),
        Group("Learned solver", (1500, 110, 340, 350), "#b58b2a"),
        Group("Stock sampler", (1500, 740, 340, 310), "#88A"),
        Group("The same seeds", (1880, -80, 340, 1040), "#8A8"),
        Group("Side by side", (2260, -80, 940, 1040), "#A88"),
    ]
    return Workflow(nodes, groups)


def taught(
    name: str,
    model: Model,
    texts: dict[str, Node],
    prompt: Wire,
    called: str,
    note: str,
    drawn: int = 4,
    wider: int = 0,
    **settings: Any,
) -> Workflow:
    """Trains a predictor, saves it, and draws with it.

    `texts` has the nodes "positive" and "negative", in x up to 980 + `wider`; the training takes `prompt`. `drawn` is
    the number of pictures, and `settings` are those of the training.
    """
    training = {
        "cfg": 1.0,
        "student": "ipndm",
        "steps": 3,
        "schedule": "polynomial",
        "rho": 0.0,
        "afs": False,
        "max_order": 4,
        "scale_dir": 0.1,
        "scale_time": 0.3,
        "teacher": "ipndm",
        "teacher_points": 4,
        "trajectories": 128,
        "epochs": 3,
        "batch_size": 16,
        "objective": "endpoint",
        "learning_rate": 0.02,
        "training_seed": 0,
        "name": called,
        "checkpointing": False,
        "parallel": 2,
        **settings,
    }
    x = 1130 + wider
    nodes = {
        "note": explained(note),
        "model": model.loader,
        **texts,
        "latent": model.latent((1115 if wider else 760, 620), drawn),
        "latent 2": reroute((1420 if wider else 1140, 250 if wider else 400), ("latent", "LATENT")),
        "models": reroute((x - 100, 0), ("model", "MODEL")),
        "train": Node(
            "SphereGuideAMEDTrain",
            (x, 500),
            (360, 720),
            training,
            {
                "model": ("models", ""),
                "positive": prompt,
                "negative": ("negative", "CONDITIONING"),
                "latent": ("latent", "LATENT"),
            },
        ),
        "amed": Node("SphereGuideAMEDSampler", (x + 470, 330), (300, 60), {}, {"predictor": ("train", "predictor")}),
        "sigmas": Node(
            "SphereGuideAMEDScheduler",
            (x + 470, 450),
            (300, 130),
            {"points": "base"},
            {"predictor": ("train", "predictor"), "model": ("models", "")},
            "Its steps",
        ),
        "keep": Node(
            "SphereGuideAMEDSave", (x + 470, 680), (300, 60), {"name": called}, {"predictor": ("train", "predictor")}
        ),
        "curves": Node(
            "PreviewImage", (x + 470, 800), (640, 420), {}, {"images": ("train", "curves")}, "How it learnt"
        ),
        **vae_bus(1280, (640,)),
        "vae of result": reroute((x + 1100, 1280), ("vae", "")),
        "sample": sampling(
            (x + 830, 0),
            training["cfg"],
            {
                **SHARED,
                "sampler": ("amed", "sampler"),
                "sigmas": ("sigmas", "sigmas"),
                "latent_image": ("latent 2", ""),
            },
            "Few model calls",
        ),
        "decode": Node(
            "VAEDecode",
            (x + 1190, 500),
            (200, 60),
            {},
            {"samples": ("sample", "output"), "vae": ("vae of result", "")},
        ),
        "save": Node(
            "SaveImage",
            (x + 1460, 0),
            (500, 560),
            {"filename_prefix": f"sphereguide/{name}"},
            {"images": ("decode", "IMAGE")},
            "Drawn with it",
        ),
    }
    groups = [
        Group("Model and prompt", (300, -80, x - 330, 830), "#3f789e"),
        Group("Learning", (x - 20, 430, 400, 810), "#b06634"),
        Group("What was learnt", (x + 450, 250, 340, 510), "#b58b2a"),
        Group("In use", (x + 810, -80, 1170, 660), "#8A8"),
    ]
    return Workflow(nodes, groups)


def taking_turns(*texts: str, negative: str) -> dict[str, Node]:
    """Prompts that take turns in the training, in x up to 1380: the first is "positive", together they are "all"."""

    def encoder(text: str, row: int, title: str) -> Node:
        return Node(
            "CLIPTextEncode", (760, 80 + 145 * row), (300, 100), {"text": text}, {"clip": ("model", "CLIP")}, title
        )

    keys = ["positive", *(f"prompt {number}" for number in range(2, len(texts) + 1))]
    nodes = {
        key: encoder(text, row, f"Prompt {row + 1}") for row, (key, text) in enumerate(zip(keys, texts, strict=True))
    }
    nodes["negative"] = encoder(negative, len(texts), "Negative prompt")
    before = "positive"
    for row, key in enumerate(keys[1:]):
        together = "all" if key == keys[-1] else f"and {key}"
        nodes[together] = Node(
            "ConditioningCombine",
            (1130, 160 + 145 * row),
            (250, 60),
            {},
            {"conditioning_1": (before, "CONDITIONING"), "conditioning_2": (key, "CONDITIONING")},
            "Take turns",
        )
        before = together
    return nodes
