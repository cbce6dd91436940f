"""Prompts in the API's format, each short, with whatever nodes a test wants to be different."""

from __future__ import annotations

from typing import Any

from sphereguide.demo.run import Prompt


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


PICTURE = ["picture", 0]
LOW_PASS = node("SphereGuideLowPassLoss", image=PICTURE, factor=8)
RANGE = {"start_percent": 0.0, "end_percent": 1.0}
NO_RANGE = {"start_percent": 0.5, "end_percent": 0.5}
STEPS = {"interval": 1, **RANGE, "gradient": "fast", "checkpointing": False}
DSG = {"guidance_rate": 0.2, **STEPS, "loss": ["loss", 0], "vae": ["toy", 2]}
BASE = {
    "toy": node("SphereGuideToyPortraits"),
    "text": node("CLIPTextEncode", text="", clip=["toy", 1]),
    "picture": node("LoadImage", image="portrait.png"),
    "plain": node("KSamplerSelect", sampler_name="euler_ancestral"),
    "sigmas": node("BasicScheduler", model=["toy", 0], scheduler="normal", steps=2, denoise=1.0),
}
SAMPLED = {"model": ["toy", 0], "positive": ["text", 0], "negative": ["text", 0]}
CUSTOM = {**SAMPLED, "add_noise": True, "noise_seed": 0, "cfg": 1.0, "latent_image": ["latent", 0]}


def empty(side: int = 128, batch: int = 1) -> dict[str, Any]:
    return node("EmptyLatentImage", width=side, height=side, batch_size=batch)


def dsg(sampler: str = "plain", **changes: Any) -> dict[str, Any]:
    return node("SphereGuideDSG", sampler=[sampler, 0], **{**DSG, **changes})


def custom(**changes: Any) -> dict[str, Any]:
    wires = {"sampler": ["sampler", 0], "sigmas": ["sigmas", 0]}
    return node("SamplerCustom", **{**CUSTOM, **wires, **changes})


def guided(**nodes: Any) -> Prompt:
    """Two guided steps, with other nodes for those of these names, or more."""
    return {
        **BASE,
        "loss": LOW_PASS,
        "sampler": dsg(),
        "latent": empty(),
        "sample": custom(),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="latent"),
        **nodes,
    }


def with_loss(class_type: str, loader: dict[str, Any] | None = None, **inputs: Any) -> Prompt:
    """The same by another loss, whose network `loader` loads: Toy Portraits' own CLIP, if none is given."""
    return guided(loader=loader or OPEN_CLIP, loss=node(class_type, **inputs))


def measured(class_type: str, **inputs: Any) -> Prompt:
    """The same by a loss that compares with a small picture."""
    small = node("ImageScale", image=PICTURE, upscale_method="area", width=32, height=32, crop="disabled")
    return guided(small=small, loss=node(class_type, image=["small", 0], **inputs))


def classified(name: str, architecture: str = "", **nodes: Any) -> Prompt:
    loader = node("SphereGuideLoadImageClassifier", name=name, architecture=architecture)
    loss = node("SphereGuideClassifierLoss", classifier=["loader", 0], class_name="a")
    return guided(**{"loader": loader, "loss": loss, **nodes})


def segmented(name: str = "toy_portraits/", architecture: str = "from the file name", **inputs: Any) -> Prompt:
    loader = node("SphereGuideLoadSegmentationModel", name=name, architecture=architecture)
    wires = {"segmentation_model": ["loader", 0]}
    settings = {"class_name": "", "colors": "", "tolerance": 8, "unlabelled": ""}
    return with_loss("SphereGuideSegmentationLoss", loader, **{**wires, **settings, **inputs}) | {
        "black": node("SolidMask", value=0.0, width=16, height=16)
    }


def clip_text(text: str = "a", model: str = "toy_portraits/", **changes: Any) -> Prompt:
    loader = node("SphereGuideLoadOpenCLIP", model=model, dtype="fp32")
    wires = {"open_clip_model": ["loader", 0], "text": text, "negative_text": "", "negative_weight": 0.5}
    return with_loss("SphereGuideCLIPTextLoss", loader, **{**wires, **VIEWS, **changes})


def styled(**inputs: Any) -> Prompt:
    settings = {"style": PICTURE, "clip_layers": "3", "vgg_layers": "relu1_1", "vgg_size": 256}
    return with_loss("SphereGuideStyleGramLoss", inputs.pop("loader", None), **{**settings, **inputs})


def vgg(name: str) -> Prompt:
    return styled(loader=node("SphereGuideLoadVGG", name=name), vgg=["loader", 0])


def face(name: str = "toy_portraits/", image: list[Any] = PICTURE, **changes: Any) -> Prompt:
    loader = node("SphereGuideLoadFaceEncoder", name=name, embedding="output")
    box = {"box_left": 0.1, "box_top": 0.1, "box_right": 0.9, "box_bottom": 0.9}
    crop = {"references": "average", "crop": "fixed box", "detect_every": 0, "margin": 0.1, "distance": "cosine"}
    wires = {"face_encoder": ["loader", 0], "image": image}
    return with_loss("SphereGuideFaceIDLoss", loader, **{**wires, **box, **crop, **changes})


def combined(**weights: float) -> dict[str, Any]:
    weights = {**{f"weight_{i}": 1.0 for i in range(1, 5)}, **weights}
    return node("SphereGuideCombineLosses", loss_1=["a", 0], loss_2=["b", 0], normalise=True, **weights)


def masked(value: float) -> Prompt:
    mask = node("SolidMask", value=value, width=16, height=16)
    return guided(
        loss=node("SphereGuideMaskLoss", loss=["a", 0], mask=["mask", 0], sees="region"), a=LOW_PASS, mask=mask
    )


def swept(values: str) -> Prompt:
    return guided(sweep=node("SphereGuideSweep", values=values), sampler=dsg(guidance_rate=["sweep", 0]))


def scaled(**changes: Any) -> Prompt:
    settings = {"schedule": "uniform", "b": 1.0, "k": 0.0, **RANGE}
    return guided(sampler=node("SphereGuideEpsilonScaling", sampler=["plain", 0], **{**settings, **changes}))


def referred(sampler: str = "plain", reference: str = "latent", **changes: Any) -> dict[str, Any]:
    wires = {"sampler": [sampler, 0], "reference": [reference, 0]}
    return node("SphereGuideILVR", **{**wires, "factor": 4, **RANGE, **changes})


def calibrated(file: str = "real", **nodes: Any) -> Prompt:
    """Calibrate Epsilon Scaling on a file of `write_broken_files`."""
    wires = {**SAMPLED, "sampler": ["plain", 0], "sigmas": ["sigmas", 0], "latents": ["latents", 0]}
    settings = {"cfg": 1.0, "samples": 2, "batch_size": 2, "calibration_seed": 0, "from_images": False}
    wires |= nodes.pop("wires", {})
    return {
        **BASE,
        "latents": node("LoadLatent", latent=f"{file}.latent"),
        "calibrate": node("SphereGuideEpsilonScalingCalibrate", **wires, **settings),
        **nodes,
    }


def trained(train: dict[str, Any], **nodes: Any) -> Prompt:
    """Train AMED Predictor on latents of 2×2, in a batch of all that it takes."""
    settings = {"cfg": 1.0, "student": "euler", "steps": 1, "schedule": "polynomial", "rho": 0.0, "afs": False}
    settings |= {"max_order": 1, "scale_dir": 0.1, "scale_time": 0.3, "teacher": "heun", "teacher_points": 1}
    settings |= {"trajectories": 64, "epochs": 1, "batch_size": 64, "objective": "endpoint", "learning_rate": 0.02}
    settings |= {"training_seed": 0, "name": "", "checkpointing": False}
    wires = {**SAMPLED, "latent": ["latent", 0]}
    return {
        **BASE,
        "latent": empty(16),
        "train": node("SphereGuideAMEDTrain", **{**wires, **settings, **train}),
        **nodes,
    }


def predicted(name: str = "toy_portraits_ipndm_4.safetensors", **nodes: Any) -> Prompt:
    """Sampled with an AMED predictor; `sigmas` may be others than its own."""
    own = node("SphereGuideAMEDScheduler", predictor=["predictor", 0], model=["toy", 0], points="base")
    return guided(
        **{
            "predictor": node("SphereGuideAMEDLoad", name=name),
            "sampler": node("SphereGuideAMEDSampler", predictor=["predictor", 0]),
            "sigmas": own,
            "sample": custom(),
            **nodes,
        }
    )


def expanded(**wires: Any) -> dict[str, Any]:
    """AMED Scheduler with a probe, or a part of one."""
    return node("SphereGuideAMEDScheduler", predictor=["predictor", 0], model=["toy", 0], points="expanded", **wires)


OPEN_CLIP = node("SphereGuideLoadOpenCLIP", model="toy_portraits/", dtype="fp32")
VIEWS = {"distance": "cosine", "cutouts": 0, "min_size": 0.5, "max_size": 1.0, "augment": False}
BLUR = {"kernel_size": 255, "sigma": 3.0}
DEGRADE = {"mask_fraction": 0.5, "factor": 4, **BLUR, "noise": 0.0, "seed": 0}
SMALL = node("ImageScale", image=PICTURE, upscale_method="area", width=64, height=64, crop="disabled")
DEGRADED = {"small": SMALL, "loss": node("SphereGuideLowPassLoss", image=["degraded", 0], factor=8)}
ZERO_SNR = node("ModelSamplingDiscrete", model=["toy", 0], sampling="eps", zsnr=True)
EDM = {"model": ["toy", 0], "sampling": "eps"}
BROKEN = node("LoraLoaderModelOnly", model=["toy", 0], lora_name="nan.safetensors", strength_model=1.0)
ONE_STEP = node("BasicScheduler", model=["toy", 0], scheduler="normal", steps=1, denoise=1.0)


def split(step: int) -> dict[str, Any]:
    return node("SplitSigmas", sigmas=["whole", 0], step=step)


def area(of: str) -> dict[str, Any]:
    return node("ConditioningSetArea", conditioning=[of, 0], width=64, height=64, x=0, y=0, strength=1.0)


def joined(first: str, second: str) -> dict[str, Any]:
    return node("ConditioningCombine", conditioning_1=[first, 0], conditioning_2=[second, 0])


def longer(first: str, second: str) -> dict[str, Any]:
    return node("ConditioningConcat", conditioning_to=[first, 0], conditioning_from=[second, 0])


DOT = {"destination": ["wide", 0], "source": ["pixel", 0], "x": 512, "y": 512, "operation": "add"}
TWO_PROMPTS = {"positive": ["two", 0]}
