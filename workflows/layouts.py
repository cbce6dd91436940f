"""How the workflows are laid out: nodes and groups of each kind, from left to right."""

from __future__ import annotations

import re
from dataclasses import dataclass
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


TOYS = Model(Node("SphereGuideToyPortraits", (380, 0), (250, 70), title="Load Toy Portraits"), 128)


def checkpoint(file: str, size: int, empty: str = "EmptyLatentImage") -> Model:
    loader = Node("CheckpointLoaderSimple", (380, 0), (250, 100), {"ckpt_name": file}, title="Checkpoint")
    return Model(loader, size, empty)


def explained(text: str, height: int = 560) -> Node:
    return Node("Note", (0, 0), (320, height), {"text": paragraphs(text)}, title="What this does")


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
        **settings,
    }


def prompts(positive: str = "", negative: str = "") -> dict[str, Node]:
    title = "Prompt" if positive else "Prompt (may be empty)"
    wire = {"clip": ("model", "CLIP")}
    return {
        "positive": Node("CLIPTextEncode", (760, 180), (300, 100), {"text": positive}, wire, title),
        "negative": Node("CLIPTextEncode", (760, 335), (300, 100), {"text": negative}, wire, "Negative prompt"),
    }


def schedule(
    at: tuple[int, int], steps: int, title: str = "Steps", scheduler: str = "normal", model: Wire = ("model", "MODEL")
) -> Node:
    widgets = {"scheduler": scheduler, "steps": steps, "denoise": 1.0}
    return Node("BasicScheduler", at, (300, 110), widgets, {"model": model}, title)


def steered(
    name: str,
    condition: dict[str, Node],
    what: str,
    note: str,
    guidance_rate: float,
    prompt: str = "",
    cfg: float = 1.0,
    floor: int = 1040,
    *,
    model: Model = TOYS,
    negative: str = "",
    steps: int = STEPS,
    sampler: str = "euler_ancestral",
    note_height: int = 560,
    **settings: Any,
) -> Workflow:
    """The model samples from `prompt`, and DSG Guidance steers it by the node called "loss" of `condition`.

    `condition` is what makes that loss, in x from 380 to 1430 and in y from 540 (the loss: from 640) to `floor`, where
    the VAE's wire runs. `what` is the title of its group. `settings` are those of DSG Guidance.
    """
    nodes = {
        "note": explained(note, note_height),
        "model": model.loader,
        "vae": Node("Reroute", (720, floor), (75, 26), {}, {"": ("model", "VAE")}),
        "vae of guidance": Node("Reroute", (1380, floor), (75, 26), {}, {"": ("vae", "")}),
        "vae of result": Node("Reroute", (2420, floor), (75, 26), {}, {"": ("vae of guidance", "")}),
        **prompts(prompt, negative),
        **condition,
        # Guidance
        "select": Node("KSamplerSelect", (1130, 540), (300, 60), {"sampler_name": sampler}, title="Sampler"),
        "dsg": Node(
            "SphereGuideDSG",
            (1520, 540),
            (300, 404),
            guidance(guidance_rate, **settings),
            {"sampler": ("select", "SAMPLER"), "loss": ("loss", "loss"), "vae": ("vae of guidance", "")},
            "DSG Guidance",
        ),
        # Sampling
        "schedule": schedule((1520, 250), steps),
        "latent": model.latent((1520, 60)),
        "sample": sampling((1900, 0), cfg, ("dsg", "sampler"), ("schedule", "SIGMAS"), "Sample"),
        # The result
        "report": Node(
            "SphereGuideReport",
            (2270, 680),
            (270, 280),
            {},
            {"samples": ("sample", "output"), "trace": ("dsg", "trace")},
            "Guidance Report",
        ),
        "decode": Node(
            "VAEDecode", (2560, 540), (200, 60), {}, {"samples": ("report", "samples"), "vae": ("vae of result", "")}
        ),
        "save": Node(
            "SaveImage",
            (2830, 250),
            (300, 350),
            {"filename_prefix": f"sphereguide/{name}"},
            {"images": ("decode", "IMAGE")},
            "Guided picture",
        ),
        "curves": Node(
            "PreviewImage", (2560, 680), (570, 280), {}, {"images": ("report", "report")}, "How guidance went"
        ),
    }
    groups = [
        Group("Model and prompt", (360, -80, 720, 530), "#3f789e"),
        Group(what, (360, 460, 720, floor - 590), "#88A"),
        Group("Guidance: the loss steers the sampler", (1110, 460, 730, 560), "#8A8"),
        Group("Sampling", (1500, -80, 720, 530), "#A88"),
        Group("Result", (2250, 170, 900, 810), "#b06634"),
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
        "picture": Node("LoadImage", (380, 540), (250, 340), {"image": PICTURE}, title="Original picture"),
        "degrade": Node(
            "SphereGuideDegradeImage",
            (760, 540),
            (300, 300),
            {
                "operator": operator,
                "mask_fraction": 0.5,
                "factor": FACTOR,
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
    return 250 if x == 380 else 300


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


def picture_of(title: str, picture: str, y: int = 540) -> Node:
    return Node("LoadImage", (380, y), (250, 340), {"image": picture}, title=title)


def style_loss(at: tuple[int, int] = (1130, 640)) -> Node:
    layers = {"clip_layers": "3", "vgg_layers": "relu1_1, relu2_1, relu3_1, relu4_1, relu5_1", "vgg_size": 256}
    wires = {"style": ("style", "IMAGE"), "open_clip_model": ("clip", "open_clip_model")}
    return Node("SphereGuideStyleGramLoss", at, (300, 180), layers, wires)


def by_style(picture: str = STYLE, name: str = TOY) -> dict[str, Node]:
    return {
        "style": picture_of("Picture of the style", picture),
        "clip": open_clip(name=name),
        "loss": style_loss(),
    }


def by_text_and_style(picture: str, name: str, text: str) -> dict[str, Node]:
    """Both through one network; in y down to 1130."""
    return {
        "clip": open_clip(540, 380, name),
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
        "canvas": Node("SolidMask", (380, 540), (250, 110), whole, title="Nowhere"),
        "rectangle": Node("SolidMask", (380, 700), (250, 110), part, title="Rectangle"),
        "segmenter": segmentation_loader(880, 380, name),
        "left": placed(4, 540),
        "target": Node(
            "SphereGuideSegmentationTarget", (760, 730), (300, 80), {"class_name": left}, {"mask": ("left", "MASK")}
        ),
        "right": placed(36, 860),
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


def sweep(name: str, condition: dict[str, Node], rates: tuple[float, ...], note: str) -> Workflow:
    """One seed at each of the strengths, side by side. `condition` makes the node "loss", like that of `steered`."""
    samplers, batches = {}, {}
    last = len(rates) - 1
    for i, rate in enumerate(rates):
        samplers[f"sample {i}"] = Node(
            "SphereGuideKSampler",
            (1520 + 340 * i, 0),
            (300, 632),
            {
                "seed": 7,
                "steps": STEPS,
                "cfg": 1.0,
                "sampler_name": "euler_ancestral",
                "scheduler": "normal",
                "denoise": 1.0,
                **guidance(rate),
            },
            {
                "model": ("model", "MODEL"),
                "positive": ("positive", "CONDITIONING"),
                "negative": ("negative", "CONDITIONING"),
                "latent_image": ("latent", "LATENT"),
                "loss": ("loss", "loss"),
                "vae": ("vae of guidance", ""),
            },
            f"Strength {rate:g}",
        )
        if i:
            before = ("sample 0", "latent") if i == 1 else (f"batch {i - 1}", "LATENT")
            wires = {"samples1": before, "samples2": (f"sample {i}", "latent")}
            batches[f"batch {i}"] = Node("LatentBatch", (1520 + 340 * i, 780), (300, 60), {}, wires, "Together")
    right = 1520 + 340 * len(rates)
    nodes = {
        "note": explained(note),
        "model": TOYS.loader,
        "vae": Node("Reroute", (720, 1040), (75, 26), {}, {"": ("model", "VAE")}),
        "vae of guidance": Node("Reroute", (1430, 1040), (75, 26), {}, {"": ("vae", "")}),
        "vae of result": Node("Reroute", (right - 100, 1040), (75, 26), {}, {"": ("vae of guidance", "")}),
        **prompts(),
        "latent": TOYS.latent((1130, 335)),
        **condition,
        **samplers,
        **batches,
        "decode": Node(
            "VAEDecode",
            (right, 780),
            (200, 60),
            {},
            {"samples": (f"batch {last}", "LATENT"), "vae": ("vae of result", "")},
        ),
        "save": Node(
            "SaveImage",
            (right, 0),
            (620, 632),
            {"filename_prefix": f"sphereguide/{name}"},
            {"images": ("decode", "IMAGE")},
            "From no guidance to too much",
        ),
    }
    groups = [
        Group("Model and prompt", (360, -80, 1090, 530), "#3f789e"),
        Group("What to steer by", (360, 460, 1090, 560), "#88A"),
        Group("One seed at rising strength", (1500, -80, 340 * len(rates), 740), "#8A8"),
        Group("Side by side", (1840, 700, 340 * len(rates) + 500, 170), "#b06634"),
    ]
    return Workflow(nodes, groups)


def calibration(note: str) -> dict[str, Node]:
    """A model, its recipe of 10 Euler steps, and what Calibrate Epsilon Scaling finds for it; x up to 1490."""
    return {
        "note": explained(note),
        "model": TOYS.loader,
        "real": Node(
            "SphereGuideDrawToyPortraits", (380, 540), (250, 90), {"first": 0, "count": 32}, title="Real images"
        ),
        **prompts(),
        "encode": Node(
            "VAEEncode", (760, 540), (200, 60), {}, {"pixels": ("real", "images"), "vae": ("model", "VAE")}, "Latents"
        ),
        "select": Node("KSamplerSelect", (1130, 0), (300, 60), {"sampler_name": "euler"}, title="Sampler"),
        "schedule": schedule((1130, 130), 10),
        "calibrate": Node(
            "SphereGuideEpsilonScalingCalibrate",
            (1130, 540),
            (360, 440),
            {"cfg": 1.0, "samples": 32, "batch_size": 16, "calibration_seed": 0, "from_images": False},
            {
                "model": ("model", "MODEL"),
                "positive": ("positive", "CONDITIONING"),
                "negative": ("negative", "CONDITIONING"),
                "sampler": ("select", "SAMPLER"),
                "sigmas": ("schedule", "SIGMAS"),
                "latents": ("encode", "LATENT"),
            },
            "Calibrate Epsilon Scaling",
        ),
    }


CALIBRATION = (
    Group("Model and prompt", (360, -80, 720, 530), "#3f789e"),
    Group("What real images look like", (360, 460, 720, 200), "#88A"),
    Group("The recipe", (1110, -80, 400, 340), "#8A8"),
    Group("What it needs", (1110, 460, 400, 540), "#b06634"),
)


def calibrate(name: str, note: str) -> Workflow:
    """The measurement alone, with its plot."""
    save = Node(
        "SaveImage",
        (1600, 0),
        (1000, 420),
        {"filename_prefix": f"sphereguide/{name}"},
        {"images": ("calibrate", "curves")},
        "What was measured",
    )
    groups = [*CALIBRATION, Group("Before and after", (1580, -80, 1040, 520), "#A88")]
    return Workflow({**calibration(note), "save": save}, groups)


def sampling(at: tuple[int, int], cfg: float, sampler: Wire, sigmas: Wire, title: str) -> Node:
    return Node(
        "SamplerCustom",
        at,
        (300, 442),  # with the preview that the page puts into it
        {"add_noise": True, "noise_seed": 7, "cfg": cfg},
        {
            "model": ("model", "MODEL"),
            "positive": ("positive", "CONDITIONING"),
            "negative": ("negative", "CONDITIONING"),
            "sampler": sampler,
            "sigmas": sigmas,
            "latent_image": ("latent", "LATENT"),
        },
        title,
    )


def compared(name: str, runs: dict[str, tuple[Wire, Wire]], title: str, cfg: float = 1.0) -> dict[str, Node]:
    """The same seeds through three (sampler, sigmas), from x = 1980 on, and their pictures in one batch."""
    nodes = {
        f"sample {place}": sampling((1980 + 340 * place, 0), cfg, *wires, title)
        for place, (title, wires) in enumerate(runs.items())
    }
    for place in (1, 2):
        before = ("sample 0", "output") if place == 1 else ("batch 1", "LATENT")
        nodes[f"batch {place}"] = Node(
            "LatentBatch",
            (1980 + 340 * place, 560),
            (300, 60),
            {},
            {"samples1": before, "samples2": (f"sample {place}", "output")},
            "Together",
        )
    nodes["decode"] = Node(
        "VAEDecode", (3020, 560), (200, 60), {}, {"samples": ("batch 2", "LATENT"), "vae": ("vae of result", "")}
    )
    nodes["save"] = Node(
        "SaveImage",
        (3280, 0),
        (640, 560),
        {"filename_prefix": f"sphereguide/{name}"},
        {"images": ("decode", "IMAGE")},
        title,
    )
    return nodes


COMPARED = (
    Group("The same seeds", (1960, -80, 1020, 540), "#8A8"),
    Group("Side by side", (3000, -80, 940, 720), "#A88"),
)


def correction(at: tuple[int, int], b: float, title: str, **settings: Any) -> Node:
    """Epsilon Scaling of the sampler "select"; `settings` bring another schedule, or the wire of one."""
    widgets = {"schedule": settings.pop("schedule", "uniform"), "b": b, "k": 0.0}
    widgets |= {"start_percent": 0.0, "end_percent": 1.0}
    wires = {"sampler": ("select", "SAMPLER"), **settings}
    return Node("SphereGuideEpsilonScaling", at, (300, 210), widgets, wires, title)


def corrected(name: str, model: Model, prompt: tuple[str, str], cfg: float, batch_size: int, note: str) -> Workflow:
    """The same seeds without correction and with two uniform ones."""
    nodes = {
        "note": explained(note, 760),
        "model": model.loader,
        **prompts(*prompt),
        "select": Node("KSamplerSelect", (1130, 640), (300, 60), {"sampler_name": "euler"}, title="Sampler"),
        "schedule": schedule((1130, 0), STEPS),
        "vae": Node("Reroute", (720, 1080), (75, 26), {}, {"": ("model", "VAE")}),
        "vae of result": Node("Reroute", (2700, 1080), (75, 26), {}, {"": ("vae", "")}),
        "latent": model.latent((1130, 440), batch_size),
        "little": correction((1540, 510), 1.005, "A little"),
        "more": correction((1540, 790), 1.015, "More"),
    }
    steps = ("schedule", "SIGMAS")
    runs = {
        "Off": (("select", "SAMPLER"), steps),
        "A little": (("little", "sampler"), steps),
        "More": (("more", "sampler"), steps),
    }
    nodes |= compared(name, runs, "Off, a little, more", cfg)
    groups = [
        Group("Model and prompt", (360, -80, 720, 530), "#3f789e"),
        Group("The recipe", (1110, -80, 340, 800), "#8A8"),
        Group("Correction", (1520, 430, 340, 590), "#b58b2a"),
        *COMPARED,
    ]
    return Workflow(nodes, groups)


def side_by_side(name: str, b: float, note: str) -> Workflow:
    """The same seeds without correction, with a uniform one, and with what the calibration found."""
    nodes = {
        **calibration(note),
        "vae": Node("Reroute", (720, 1040), (75, 26), {}, {"": ("model", "VAE")}),
        "vae of result": Node("Reroute", (2700, 1040), (75, 26), {}, {"": ("vae", "")}),
        "latent": TOYS.latent((1600, 0), batch_size=4),
        "uniform": correction((1600, 240), b, "Uniform"),
        "measured": correction(
            (1600, 540),
            1.0,
            "Calibrated",
            schedule="measured",
            epsilon_schedule=("calibrate", "epsilon_schedule"),
        ),
    }
    steps = ("schedule", "SIGMAS")
    off, uniform, measured = ("select", "SAMPLER"), ("uniform", "sampler"), ("measured", "sampler")
    runs = {"Off": (off, steps), "Uniform": (uniform, steps), "Calibrated": (measured, steps)}
    nodes |= compared(name, runs, "Off, uniform, calibrated: four of each")
    nodes["curves"] = Node(
        "PreviewImage", (1980, 720), (640, 280), {}, {"images": ("calibrate", "curves")}, "What was measured"
    )
    groups = [
        *CALIBRATION,
        Group("Correction", (1580, 160, 340, 620), "#b58b2a"),
        *COMPARED,
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
) -> Workflow:
    """A learned solver of six model calls beside a stock one of as many, and of fifty."""
    of = ("model", "MODEL")
    count = {1: "one", 2: "two", 4: "four"}[batch_size]
    nodes = {
        "note": explained(note, note_height),
        "model": model.loader,
        **prompts(*prompt),
        "latent": model.latent((1130, 0), batch_size),
        "load": Node(
            "SphereGuideAMEDLoad",
            (1130, 240),
            (300, 90),
            {"name": predictor},
            title="Predictor",
        ),
        "amed sigmas": Node(
            "SphereGuideAMEDScheduler",
            (1580, 0),
            (300, 130),
            {"points": "base"},
            {"predictor": ("load", "predictor"), "model": of},
            "Its steps",
        ),
        "amed": Node("SphereGuideAMEDSampler", (1580, 240), (300, 60), {}, {"predictor": ("load", "predictor")}),
        "select": Node("KSamplerSelect", (1580, 480), (300, 60), {"sampler_name": "dpmpp_2m"}, title="Stock sampler"),
        "model of stock": Node("Reroute", (720, 600), (75, 26), {}, {"": of}),
        "six": schedule((1580, 620), 6, "Six steps", "sgm_uniform", ("model of stock", "")),
        "fifty": schedule((1580, 800), 50, "Fifty steps", "karras", ("model of stock", "")),
        "vae": Node("Reroute", (720, 1040), (75, 26), {}, {"": ("model", "VAE")}),
        "vae of result": Node("Reroute", (2700, 1040), (75, 26), {}, {"": ("vae", "")}),
        **compared(
            name,
            {
                "AMED, 6 calls": (("amed", "sampler"), ("amed sigmas", "sigmas")),
                "Stock, 6 calls": (("select", "SAMPLER"), ("six", "SIGMAS")),
                "Stock, 50 calls": (("select", "SAMPLER"), ("fifty", "SIGMAS")),
            },
            f"AMED with 6 calls, stock with 6, stock with 50: {count} of each",
            cfg,
        ),
    }
    groups = [
        Group("Model and prompt", (360, -80, 720, 530), "#3f789e"),
        Group("What was learnt", (1110, -80, 360, 430), "#b06634"),
        Group("Learned solver", (1560, -80, 340, 400), "#b58b2a"),
        Group("Stock sampler", (1560, 400, 340, 530), "#88A"),
        *COMPARED,
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

    `texts` has the nodes "positive" and "negative", in x up to 1060 + `wider`; the training takes `prompt`. `drawn` is
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
        **settings,
    }
    nodes = {
        "note": explained(note),
        "model": model.loader,
        **texts,
        "latent": model.latent((1130 + wider, 0), drawn),
        "train": Node(
            "SphereGuideAMEDTrain",
            (1130 + wider, 240),
            (360, 720),
            training,
            {
                "model": ("model", "MODEL"),
                "positive": prompt,
                "negative": ("negative", "CONDITIONING"),
                "latent": ("latent", "LATENT"),
            },
        ),
        "keep": Node(
            "SphereGuideAMEDSave", (1600 + wider, 0), (300, 60), {"name": called}, {"predictor": ("train", "predictor")}
        ),
        "curves": Node(
            "PreviewImage", (1600 + wider, 560), (640, 300), {}, {"images": ("train", "curves")}, "How it learnt"
        ),
        "sigmas": Node(
            "SphereGuideAMEDScheduler",
            (1600 + wider, 190),
            (300, 130),
            {"points": "base"},
            {"predictor": ("train", "predictor"), "model": ("model", "MODEL")},
            "Its steps",
        ),
        "amed": Node(
            "SphereGuideAMEDSampler", (1600 + wider, 400), (300, 60), {}, {"predictor": ("train", "predictor")}
        ),
        "sample": sampling(
            (1960 + wider, 0), training["cfg"], ("amed", "sampler"), ("sigmas", "sigmas"), "Few model calls"
        ),
        "decode": Node(
            "VAEDecode", (2320 + wider, 0), (200, 60), {}, {"samples": ("sample", "output"), "vae": ("model", "VAE")}
        ),
        "save": Node(
            "SaveImage",
            (2580 + wider, 0),
            (500, 500),
            {"filename_prefix": f"sphereguide/{name}"},
            {"images": ("decode", "IMAGE")},
            "Drawn with it",
        ),
    }
    groups = [
        Group("Model and prompt", (360, -80, 720 + wider, 1060), "#3f789e"),
        Group("Learning", (1110 + wider, -80, 400, 1060), "#b06634"),
        Group("What was learnt", (1580 + wider, -80, 340, 560), "#b58b2a"),
        Group("In use", (1940 + wider, -80, 1160, 600), "#8A8"),
    ]
    return Workflow(nodes, groups)


def taking_turns(*texts: str, negative: str) -> dict[str, Node]:
    """Prompts that take turns in the training, in x up to 1380: the first is "positive", together they are "all"."""

    def encoder(text: str, row: int, title: str) -> Node:
        return Node(
            "CLIPTextEncode", (760, 180 + 155 * row), (300, 100), {"text": text}, {"clip": ("model", "CLIP")}, title
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
            (1130, 260 + 155 * row),
            (250, 60),
            {},
            {"conditioning_1": (before, "CONDITIONING"), "conditioning_2": (key, "CONDITIONING")},
            "Take turns",
        )
        before = together
    return nodes
