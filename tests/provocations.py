"""What goes wrong, one case a message: prompts that a server must stop, or warn of, and the files that they load.

A case says which node stops, how docs/troubleshooting.md quotes the message, and what the message tells to do.
`test_troubleshooting.py` queues them all, and asks for a case of each message that the source has.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from prompts import (
    BASE,
    BLUR,
    BROKEN,
    DEGRADE,
    DEGRADED,
    DOT,
    DSG,
    EDM,
    LOW_PASS,
    NO_RANGE,
    ONE_STEP,
    PICTURE,
    RANGE,
    TWO_PROMPTS,
    ZERO_SNR,
    area,
    calibrated,
    classified,
    clip_text,
    combined,
    custom,
    dsg,
    empty,
    expanded,
    face,
    guided,
    joined,
    longer,
    masked,
    measured,
    node,
    predicted,
    referred,
    scaled,
    segmented,
    split,
    styled,
    swept,
    trained,
    vgg,
)
from sphereguide.demo.run import Prompt

__all__ = ["ELSEWHERE", "WARNED", "WRONG", "Case"]


class Case(NamedTuple):
    """
    prompt  what is queued
    stops   the class of the node that raises; empty where none does, after a warning
    quote   how the page quotes the message
    remedy  what it says to do: its end, or near it
    needs   a package or a capability of the host (`missing`)
    """

    prompt: Prompt
    stops: str
    quote: str
    remedy: str
    needs: str = ""

    @property
    def missing(self) -> str | None:
        """Why this host can't give the message."""
        present = HOST[self.needs]() if self.needs in HOST else importlib.util.find_spec(self.needs or "comfy")
        return None if present else f"the message needs {self.needs}"


def _tells_steps() -> bool:
    import comfy.samplers

    return "sample_sigmas" in Path(comfy.samplers.__file__).read_text(encoding="utf-8")


#: What a case may need beside packages: whether the host has it.
HOST: dict[str, Callable[[], bool]] = {
    "a ComfyUI before 0.3.8": lambda: importlib.util.find_spec("comfy.patcher_extension") is None,
    "a ComfyUI that tells a model no steps": lambda: not _tells_steps(),
    "hooks": lambda: importlib.util.find_spec("comfy.hooks") is not None,
}


def cases(stops: str, table: dict[str, tuple[Prompt, str, str]], needs: str = "") -> dict[str, Case]:
    """Of one node, with a prompt, the page's quote and the remedy each."""
    return {name: Case(prompt, stops, quote, remedy, needs) for name, (prompt, quote, remedy) in table.items()}


# -- what stops a prompt -----------------------------------------------------------------------------------------------

NO_NAME = "…: '…' is no name for a file"
LETTERS = "Take letters, such as toy_6."
NUMBERED = "…: start_percent (…) is not before end_percent (…), so …"
NOT_THERE = "Put it there and press R in ComfyUI, or choose another."
NO_FIT = "…: … does not fit the architecture …"
ONE_PIXEL = "…: the latents are of one pixel"
OTHER_FILE = "Choose another architecture or file."
AGAIN = "Get it again."
UNREADABLE = "…: … can't be read"
LAYERS = "Style Gram Loss: …: …"
COLOURS = "skin=#f0be96, hair=#784628."
OTHER_KIND = "Connect an empty latent that is made for this model."
ADDS_NONE = "… steers samplers that add noise, and this sampler …"
CHANNELS = "…: the latents have … channels, and the model's have …"
OWN_VAE = "VAE Encode the images with this model's VAE."
FROM_WEIGHTS = "from where the weights come."
RAISE = "Lower the one or raise the other."

WRONG = {
    **cases(
        "SphereGuideLoadOpenCLIP",
        {
            "vocabulary from elsewhere": (
                clip_text(model="far_vocabulary/"),
                "…: tokenizer_kwargs in open_clip_config.json has '…'",
                "and put the tokenizer's files beside it.",
            ),
            "tokenizer from elsewhere": (
                clip_text(model="far_tokenizer/"),
                "…: '…' in … leads outside of the model's folder",
                "Take it out, and put the file there.",
            ),
        },
        needs="open_clip",
    ),
    **cases(
        "SphereGuideLoadSegmentationModel",
        {
            "labels without end": (segmented("many_labels/"), "…: … gives … as", FROM_WEIGHTS),
            "input of a gigapixel": (segmented("large_input/"), "…: … gives the input a size of", FROM_WEIGHTS),
            "network in parts": (
                segmented("in_parts/"),
                "…: the network in … is not whole",
                "Load one that has all of its parts in its folder.",
            ),
        },
        needs="transformers",
    ),
    **cases(
        "SphereGuideLoadImageClassifier",
        {
            "head of a trillion classes": (
                classified("resnet18_of_many.safetensors"),
                "…: the network that … describes is far larger",
                "Get the configuration and the weights again, from one place.",
            ),
            "labels that are none": (
                classified("noisy_numbers/"),
                "…: the configuration in … does not name each",
                FROM_WEIGHTS,
            ),
        },
    ),
    **cases(
        "SphereGuideLoadFaceEncoder",
        {
            "network that would be fetched": (
                face("fetching/"),
                "…: model_args in … has '…'",
                "Take it out, and put the weights beside it as model.safetensors.",
            ),
        },
        needs="timm",
    ),
    **cases(
        "SphereGuideAMEDTrain",
        {
            "training that is spoilt": (
                trained({"name": "spoilt"}),
                "…: the training in … can't be gone on with",
                "Delete the file to train anew, or give another name.",
            ),
            "trajectories of a terabyte": (
                trained({"trajectories": 1_000_000, "epochs": 2, "name": ""}, latent=empty(4096)),
                "Train AMED Predictor: what the teacher gives for … trajectories",
                "Lower trajectories, or set epochs to 1, which keeps nothing.",
            ),
        },
    ),
    **cases(
        "SphereGuideDSG",
        {
            "number beyond its limits": (
                swept("7"),
                "…: … is …, and must be a number from … to",
                "Correct it, here or at the node that gives it.",
            ),
        },
    ),
    **cases(
        "SphereGuideLoadOpenCLIP",
        {
            "no such file": (clip_text(model="gone/"), "…: '…' is not in models/…", NOT_THERE),
            "name that no file has": (clip_text(model="a\0b"), "…: '…' is not in models/…", NOT_THERE),
            "file of half a character": (clip_text(model="\ud83d"), "…: '…' is not in models/…", NOT_THERE),
            "file outside of the folder": (
                clip_text(model="../vgg/page.pth"),
                "…: '…' lies outside of models/…",
                "Put it into that folder, and choose it again.",
            ),
            "no model chosen": (
                clip_text(model="(put a model into models/open_clip)"),
                "…: there is no model in …",
                "and reload the page.",
            ),
            "weights that are not on this computer": (
                clip_text(model="ViT-B-32:laion2b_s34b_b79k"),
                "…: the weights of '…' are not on this computer",
                "Pick 'ViT-B-32:laion2b_s34b_b79k (download)', or put the files of https://huggingface.co/laion/",
            ),
            "weights of an unknown model": (
                clip_text(model="mine.safetensors"),
                "…: nothing tells which architecture the weights in '…' have",
                "or put its open_clip_config.json beside it, in a folder of its own.",
            ),
            "folder without a configuration": (
                clip_text(model="without_config/"),
                "…: there is no open_clip_config.json in …",
                "Get it from where the weights come, and put it there.",
            ),
            "configuration that was cut short": (clip_text(model="cut/"), UNREADABLE, AGAIN),
            "configuration of half a model": (
                clip_text(model="half/"),
                "…: … does not describe an open_clip model",
                "it lacks text_cfg. Get it again from where the weights come.",
            ),
            "configuration that open_clip does not know": (
                clip_text(model="strange/"),
                "…: the configuration of '…' is none that open_clip …",
                "or update it:  pip install --upgrade open-clip-torch",
            ),
            "folder without weights": (
                clip_text(model="without_weights/"),
                "…: there are no weights in …",
                "there, from where its configuration comes.",
            ),
            "weights of another model": (
                clip_text(model="mixed/"),
                "…: the weights in … are not those of the architecture",
                "Correct the name, or get both files from one place.",
            ),
            "program of OpenAI": (
                clip_text(model="program/"),
                "…: … is one of OpenAI's own files",
                "Get the same weights as open_clip_model.safetensors from https://huggingface.co/timm",
            ),
            "tokenizer that is not here": (
                clip_text(model="without_tokenizer/"),
                "…: this model needs … of the Hugging Face repository …",
                "run:  hf download somebody/words",
            ),
            "tokenizer that was cut short": (
                clip_text(model="cut_tokenizer/"),
                "…: the tokenizer in … can't be read",
                "Get its files again from https://huggingface.co/somebody/words.",
            ),
        },
        needs="open_clip",
    ),
    **cases(
        "SphereGuideLoadVGG",
        {
            "web page for weights": (
                vgg("page.pth"),
                "…: … is broken or holds more than weights",
                "Get it again, best as .safetensors, or save its state_dict alone.",
            ),
            "download that was cut short": (vgg("cut.safetensors"), UNREADABLE, AGAIN),
            "weights without names": (
                vgg("list.pth"),
                "…: … holds a …, and not weights by name",
                "(a state_dict). Load another file.",
            ),
            "weights of another network": (
                vgg("another.safetensors"),
                NO_FIT,
                "Choose another file, or the architecture that it is for.",
            ),
        },
    ),
    **cases(
        "SphereGuideLoadSegmentationModel",
        {
            "weights of no known architecture": (
                segmented("weights.safetensors"),
                "…: the name of '…' does not say which architecture",
                "Choose it in architecture.",
            ),
            "weights of another segmentation": (segmented("weights.safetensors", "fcn_resnet50"), NO_FIT, OTHER_FILE),
        },
    ),
    **cases(
        "SphereGuideLoadSegmentationModel",
        {
            "folder of a text model": (
                segmented("text/"),
                "…: transformers' … can't load …",
                "Get all of its files again, or load another.",
            ),
            "folder with half a file": (
                segmented("half/"),
                UNREADABLE,
                AGAIN,
            ),
            "backbone without a head": (
                segmented("backbone/"),
                "…: … lacks weights that …",
                "It may be a backbone without a head. Load another.",
            ),
            "palette of another network": (
                segmented("short_palette/"),
                "…: palette in … must list",
                "for each of the 7 classes. Correct it, or take it out.",
            ),
        },
        needs="transformers",
    ),
    **cases(
        "SphereGuideLoadImageClassifier",
        {
            "architecture with a typo": (
                classified("resnet18.safetensors", "resnet"),
                "…: torchvision has no classifier named '…'",
                "Set architecture to one of: alexnet, ",
            ),
            "weights without a head": (classified("resnet18.safetensors"), NO_FIT, OTHER_FILE),
            "classifier of one class": (
                classified("noisy_one/"),
                "…: … tells no classes apart",
                "Load a network of two classes or more.",
            ),
            "classifier of tomorrow": (
                classified("noisy_of_tomorrow/"),
                "…: … holds a noise-aware classifier of the architecture …",
                "The only one that is known is NoisyLatentClassifier. Load another.",
            ),
            "classifier without its labels": (
                classified("noisy_without_labels/"),
                "…: the settings in … make no classifier",
                "Get the folder again from where it comes.",
            ),
        },
    ),
    **cases(
        "SamplerCustom",
        {
            "classifier of other latents": (
                classified("noisy_8/"),
                "Classifier Loss: this noise-aware classifier is for latents of … channels",
                "Use one that was trained on latents of this model.",
            ),
            "picture of another size": (
                measured("SphereGuideInpaintingLoss", mask=["picture", 1]),
                "…: the input image has …×… pixels, where this latent calls for …×…",
                "Resize the image, or change the size of the latent.",
            ),
            "wide blur in a loss": (
                guided(loss=node("SphereGuideGaussianDeblurLoss", image=PICTURE, **BLUR), latent=empty(64)),
                "A blur of kernel_size … is too wide",
                "Choose a kernel_size of at most 127.",
            ),
            "VAE of another model": (
                guided(sampler=dsg(vae=["other", 0]), other=node("VAELoader", vae_name="stage_c.safetensors")),
                "This VAE does not decode latents of … channels",
                "Connect the VAE of the model that samples, or its TAESD VAE.",
            ),
            "guided twice": (
                guided(once=dsg(), sampler=dsg("once")),
                "…: this sampler is guided already",
                "Guide it once, with one loss.",
            ),
            "reference behind guidance": (
                guided(sampler=referred("once"), once=dsg()),
                "ILVR Reference needs the sampler itself",
                "Connect the sampler to ILVR Reference, and that to DSG Guidance.",
            ),
            "reference of another model": (
                guided(sampler=referred(reference="other"), other=node("LoadLatent", latent="16_channels.latent")),
                "ILVR Reference: the reference latent is of shape …",
                "Encode the reference with this model's VAE, with as many frames.",
            ),
            "divisor below 0": (
                scaled(schedule="linear", b=0.5, k=-0.1)
                | {"sigmas": node("BasicScheduler", model=["toy", 0], scheduler="normal", steps=9, denoise=1.0)},
                "…: with k … and b … the divisor of the noise falls to 0 or below",
                "Raise k or b.",
            ),
        },
    ),
    **cases(
        "SphereGuideLoadFaceEncoder",
        {
            "network of tomorrow": (
                face("of_tomorrow/"),
                "…: timm … knows no architecture",
                "Update it:  pip install --upgrade timm",
            ),
            "network without weights": (
                face("without_weights/"),
                "…: … has a config.json, but no model.safetensors",
                "beside it. Put it there.",
            ),
            "network of grey pictures": (
                face("grey/"),
                "…: '…' of … takes images of … channels",
                "not of 3. Load a network of colour pictures.",
            ),
            "settings that were cut short": (face("cut/"), UNREADABLE, "Get it again from where the weights come."),
            "settings that are a list": (face("list/"), UNREADABLE, "Get it again from where the weights come."),
            "settings of a newer timm": (
                face("newer/"),
                "…: timm … can't build '…'",
                "Get config.json again, or update timm:  pip install --upgrade timm",
            ),
        },
        needs="timm",
    ),
    **cases(
        "SphereGuideDegradeImage",
        {
            "wide blur": (
                guided(
                    degraded=node("SphereGuideDegradeImage", image=["small", 0], operator="gaussian blur", **DEGRADE),
                    **DEGRADED,
                ),
                "A blur of kernel_size … is too wide",
                "Choose a kernel_size of at most 127.",
            ),
            "long motion": (
                guided(
                    degraded=node(
                        "SphereGuideDegradeImage",
                        image=["small", 0],
                        operator="motion blur",
                        **DEGRADE,
                        length=200.0,
                        angle=0.0,
                    ),
                    **DEGRADED,
                ),
                "A motion of … pixels is too long",
                "Choose a length of at most 126.",
            ),
        },
    ),
    **cases(
        "SphereGuideCombineLosses",
        {
            "no weight": (
                guided(loss=combined(weight_1=0.0, weight_2=0.0), a=LOW_PASS, b=LOW_PASS),
                "Combine Losses: all weights are 0",
                "Set at least one above 0.",
            ),
            "losses of two kinds": (
                classified(
                    "noisy/",
                    a=LOW_PASS,
                    b=node("SphereGuideClassifierLoss", classifier=["loader", 0], class_name="a"),
                    loss=combined(),
                ),
                "Combine Losses: these losses look at different things",
                "Combine losses on images with each other.",
            ),
        },
    ),
    **cases(
        "SphereGuideMaskLoss",
        {
            "empty mask": (masked(0.0), "Mask Loss: the mask is empty", "Paint what shall be guided."),
        },
    ),
    **cases(
        "SphereGuideScheduleLoss",
        {
            "empty window": (
                guided(
                    a=LOW_PASS,
                    loss=node("SphereGuideScheduleLoss", loss=["a", 0], weight=1.0, curve="window", **NO_RANGE),
                ),
                "Schedule Loss: start_percent (…) is not before end_percent",
                RAISE,
            ),
        },
    ),
    **cases(
        "SphereGuideCLIPTextLoss",
        {
            "empty text": (
                clip_text("a |"),
                "CLIP Text Loss: there is no text in part … of …",
                "such as: a red car | at night:0.5",
            ),
            "texts without a weight": (
                clip_text("a:0 | b:0"),
                "CLIP Text Loss: the weights of … '…' are all 0",
                "Set one to 1.",
            ),
            "cutouts of no size": (
                clip_text(min_size=0.9, max_size=0.4),
                "…: min_size (…) is above max_size (…)",
                "Lower it.",
            ),
        },
        needs="open_clip",
    ),
    **cases(
        "SphereGuideSegmentationLoss",
        {
            "nothing to segment": (
                segmented(),
                "Segmentation Loss: nothing says what shall be where",
                "Connect color_map, mask or target.",
            ),
            "class without a mask": (
                segmented(class_name="hair"),
                "Segmentation Loss: class_name is '…', and there is no mask",
                "Connect a mask, or empty class_name.",
            ),
            "class that is not known": (
                segmented(class_name="hat", mask=["picture", 1]),
                "…: the network has no class '…'",
                "Its classes: background, skin, hair, eyes, mouth, clothes, glasses.",
            ),
            "class that two have": (
                segmented("two_skins/", class_name="skin", mask=["picture", 1]),
                "…: … are all classes named '…'",
                "Give the number of one.",
            ),
            "map without colours": (
                segmented("without_palette/", color_map=PICTURE),
                "Segmentation Loss: colors is empty",
                "as in background=#f0be96, glasses=#784628.",
            ),
            "map of other colours": (
                segmented(color_map=PICTURE, colors="skin=#010203", tolerance=0),
                "Segmentation Loss: no pixel of color_map has one of the colours",
                "Name those in colors, or raise tolerance (now 0).",
            ),
            "colours in words": (
                segmented(color_map=PICTURE, colors="skin=red"),
                "Segmentation Loss: '…' in colors is not of the form",
                COLOURS,
            ),
            "colour of two classes": (
                segmented(color_map=PICTURE, colors="skin=#f0be96, hair=#f0be96"),
                "Segmentation Loss: colors gives … to both",
                "skin and hair. Choose one.",
            ),
            "target without a pixel": (
                segmented(class_name="hair", mask=["black", 0]),
                "Segmentation Loss: no pixel of target … has a class",
                "Paint a mask, or set unlabelled to a class.",
            ),
        },
        needs="transformers",
    ),
    **cases(
        "SamplerCustom",
        {
            "target of thin lines": (
                segmented(class_name="hair", mask=["dot", 0])
                | {
                    "dot": node("MaskComposite", **DOT),
                    "wide": node("SolidMask", value=0.0, width=1024, height=1024),
                    "pixel": node("SolidMask", value=1.0, width=1, height=1),
                },
                "Segmentation Loss: on the …×… pixels that the network sees, no pixel",
                "Make its areas larger.",
            ),
        },
        needs="transformers",
    ),
    **cases(
        "SphereGuideStyleGramLoss",
        {
            "no network for a style": (
                styled(),
                "Style Gram Loss: … of open_clip_model and vgg connected",
                "Connect one: Load open_clip Model or Load VGG Features.",
            ),
        },
    ),
    **cases(
        "SphereGuideStyleGramLoss",
        {
            "layer that is not there": (
                styled(open_clip_model=["loader", 0], clip_layers="77"),
                LAYERS,
                "It has 1, 2, 3, 4.",
            ),
            "layer without a weight": (
                styled(open_clip_model=["loader", 0], clip_layers="3:much"),
                LAYERS,
                "Write its name, or name:weight with a weight above 0.",
            ),
            "no layer": (
                styled(open_clip_model=["loader", 0], clip_layers=" , "),
                LAYERS,
                "no layer is named. Write one.",
            ),
            "style of a network without blocks": (
                styled(
                    open_clip_model=["loader", 0], loader=node("SphereGuideLoadOpenCLIP", model="resnet/", dtype="fp32")
                ),
                "Style Gram Loss: the image tower of … is no vision transformer",
                "Load a ViT, such as ViT-B-16, or connect vgg instead.",
            ),
        },
        needs="open_clip",
    ),
    **cases(
        "SphereGuideFaceIDLoss",
        {
            "empty box": (
                face(box_left=0.8, box_right=0.2),
                "FaceID Loss: the box from … is empty",
                "Left must be below right, and top below bottom.",
            ),
        },
        needs="timm",
    ),
    **cases(
        "SphereGuideFaceIDLoss",
        {
            "no face": (
                face(crop="detect", image=["black", 0])
                | {"black": node("EmptyImage", width=64, height=64, batch_size=1, color=0)},
                "FaceID Loss: no face found on …",
                "or set crop to 'fixed box' or 'whole image'.",
            ),
        },
        needs="facenet_pytorch",
    ),
    **cases(
        "SphereGuideDSG",
        {
            "sampler without noise": (
                guided(plain=node("KSamplerSelect", sampler_name="euler")),
                ADDS_NONE,
                "Where a sampler has eta or s_noise, set them above 0.",
            ),
            "no VAE": (
                guided(
                    sampler=node("SphereGuideDSG", sampler=["plain", 0], **{k: v for k, v in DSG.items() if k != "vae"})
                ),
                "…: this loss looks at images, and there is no VAE",
                "Connect the VAE of the model, or a TAESD VAE, to the vae input.",
            ),
            "no guided step": (guided(sampler=dsg(start_percent=0.8, end_percent=0.2)), NUMBERED, RAISE),
            "no step to repeat": (
                guided(sampler=dsg(recurrence=1, recurrence_start=0.7, recurrence_end=0.3)),
                "…: recurrence_start (…) is not before recurrence_end",
                "Set recurrence to 0, or lower the one or raise the other.",
            ),
        },
    ),
    **cases(
        "SphereGuideDSGModel",
        {
            "KSampler for DSG Guidance (Model)": (
                guided(model=node("SphereGuideDSGModel", model=["toy", 0], **DSG), sample=custom(model=["model", 0])),
                "… needs ComfyUI 0.3.8 (December 2024) or newer",
                "use KSampler (DSG Guided), or DSG Guidance with SamplerCustom.",
            ),
        },
        needs="a ComfyUI before 0.3.8",
    ),
    **cases(
        "SamplerCustom",
        {
            "LoRA of one prompt": (
                guided(
                    sampler=dsg(gradient="full"),
                    sample=custom(positive=["own", 0]),
                    own=node(
                        "ConditioningSetProperties",
                        **{"cond_NEW": ["text", 0], "strength": 1.0, "set_cond_area": "default", "hooks": ["hooks", 0]},
                    ),
                    hooks=node("CreateHookLora", lora_name="nan.safetensors", strength_model=1.0, strength_clip=0.0),
                ),
                "…: the prompts carry different hooks",
                "and guides with the rest of the workflow as it is.",
            ),
        },
        needs="hooks",
    ),
    **cases(
        "SphereGuideILVR",
        {
            "reference with a sampler that asks about a copy": (
                guided(sampler=referred("pc"), pc=node("KSamplerSelect", sampler_name="uni_pc")),
                "… changes the state of a sampler from step to step, and this sampler (…) does not go on from it",
                "Connect another, such as euler or euler_ancestral.",
            ),
        },
    ),
    **cases(
        "SphereGuideEpsilonScaling",
        {
            "no schedule": (
                scaled(schedule="measured"),
                "…: 'measured' takes an epsilon_schedule",
                "or choose uniform or linear.",
            ),
        },
    ),
    **cases(
        "SamplerCustom",
        {
            "steps that a model is not told": (
                guided(
                    model=node(
                        "SphereGuideEpsilonScalingModel", model=["toy", 0], schedule="linear", b=1.0, k=0.0, **RANGE
                    ),
                    sample=custom(model=["model", 0]),
                ),
                "…: 'linear' counts steps, and this ComfyUI does not tell a model",
                "Use Epsilon Scaling Sampler with SamplerCustom, or choose uniform.",
            ),
        },
        needs="a ComfyUI that tells a model no steps",
    ),
    **cases(
        "SphereGuideEpsilonScalingCalibrate",
        {
            "no image": (
                calibrated(latents=empty(64, 8)),
                "…: the latent is empty",
                "It needs real images: load some, and VAE Encode them.",
            ),
            "few images": (
                calibrated(
                    few=node("LatentFromBatch", samples=["latents", 0], batch_index=0, length=4),
                    wires={"latents": ["few", 0]},
                ),
                "…: … real images can't say",
                "VAE Encode a batch of at least 8, better 32 or more.",
            ),
            "flat images": (
                calibrated("flat"),
                "…: the latents are not finite",
                "VAE Encode real images, with a VAE in fp32 if they come out black.",
            ),
            "sound": (calibrated("sound"), "…: these latents are no pictures", "Connect those of an image model."),
            "images with a mask": (
                calibrated(
                    masked=node("SetLatentNoiseMask", samples=["latents", 0], mask=["picture", 1]),
                    wires={"latents": ["masked", 0]},
                ),
                "…: the latent has a noise mask",
                "only whole images can be compared. Remove it.",
            ),
            "images of another model": (calibrated("16_channels"), CHANNELS, OWN_VAE),
            "video": (
                calibrated("video"),
                "…: the latents are of a video, and the model draws images",
                "VAE Encode images with this model's VAE.",
            ),
            "images of one pixel": (
                calibrated("pixel"),
                "…: the latents are of one pixel",
                "VAE Encode larger images.",
            ),
            "schedule without a step": (
                calibrated(sigmas=split(0), whole=BASE["sigmas"]),
                "Calibrate Epsilon Scaling: the sigmas hold no step",
                "Connect a schedule with a denoise above 0.",
            ),
            "half a schedule": (
                calibrated(sigmas=split(1), whole=BASE["sigmas"]),
                "Calibrate Epsilon Scaling: the sigmas end at noise",
                "Connect the whole schedule, not the upper part of SplitSigmas.",
            ),
            "schedule at pure noise": (
                calibrated(
                    zero=ZERO_SNR,
                    sigmas=node("BasicScheduler", model=["zero", 0], scheduler="normal", steps=1, denoise=1.0),
                    wires={"model": ["zero", 0]},
                ),
                "Calibrate Epsilon Scaling: no step of this schedule can be corrected",
                "take more steps, or leave Epsilon Scaling out.",
            ),
            "recipe of a broken model": (
                calibrated(broken=BROKEN, wires={"model": ["broken", 0]}),
                "Calibrate Epsilon Scaling: the sampler gave latents that are not finite",
                "Look at what the same sampler, steps and cfg give without calibration.",
            ),
            "sampler that asks elsewhere": (
                calibrated(
                    predictor=node("SphereGuideAMEDLoad", name="afs.safetensors"),
                    amed=node("SphereGuideAMEDSampler", predictor=["predictor", 0]),
                    sigmas=ONE_STEP,
                    wires={"sampler": ["amed", 0]},
                ),
                "Calibrate Epsilon Scaling: the sampler asked the model at none",
                "Take another sampler, such as euler.",
            ),
        },
    ),
    **cases(
        "SphereGuideAMEDLoad",
        {
            "predictor that is damaged": (
                predicted("page.safetensors"),
                "…: … can't be read, it may be damaged",
                "Get it again, or delete it and train anew.",
            ),
            "predictor that is none": (
                predicted("another.safetensors"),
                "…: … is no predictor of Train AMED Predictor",
                "Choose another; the authors' own are not read.",
            ),
            "predictor of tomorrow": (
                predicted("of_tomorrow.safetensors"),
                "…: … does not fit this version",
                "Update it, or train anew.",
            ),
            "predictor of a failed training": (
                predicted("nan.safetensors"),
                "…: … holds numbers that are not finite",
                "Train it anew, at a lower learning rate.",
            ),
        },
    ),
    **cases(
        "SphereGuideSweep",
        {
            "sweep of nothing": (swept(" , "), "Sweep Values: there are … values", "Write such as 0, 0.1, 0.2."),
            "sweep with a word": (
                swept("0, much"),
                "Sweep Values: '…' is no number",
                "Write such as 0, 0.1, 0.2, with a point in each.",
            ),
        },
    ),
    **cases(
        "SphereGuideAMEDSave",
        {
            "folder that is a file": (
                {
                    "predictor": node("SphereGuideAMEDLoad", name="toy_portraits_ipndm_4.safetensors"),
                    "save": node("SphereGuideAMEDSave", predictor=["predictor", 0], name="page.safetensors/mine"),
                },
                "The predictor can't be written to …",
                "Is there room, and may ComfyUI write there? Otherwise take another name.",
            ),
        },
    ),
    **cases(
        "SphereGuideAMEDScheduler",
        {
            "half a probe": (
                predicted(sigmas=expanded(positive=["text", 0])),
                "AMED Scheduler: a probe takes positive, negative and latent",
                "Connect all three, or none.",
            ),
            "predictor of another kind of model": (
                predicted(
                    edm=node("ModelSamplingContinuousEDM", sigma_max=5.0, sigma_min=0.1, **EDM),
                    sigmas=node(
                        "SphereGuideAMEDScheduler", predictor=["predictor", 0], model=["edm", 0], points="base"
                    ),
                ),
                "AMED Scheduler: the predictor begins at sigma …, and this model ends at …",
                "ends at 5: it is for another kind of model. Train one for this.",
            ),
            "probe of other latents": (
                predicted(
                    other=node("LoadLatent", latent="16_channels.latent"),
                    sigmas=expanded(positive=["text", 0], negative=["text", 0], latent=["other", 0]),
                ),
                "…: the latent has … channels, and the model's have …",
                OTHER_KIND,
            ),
        },
    ),
    **cases(
        "SphereGuideAMEDTrain",
        {
            "name with a colon": (
                trained({"name": "a:b"}),
                "…: '…' is no name for a file",
                "'a:b' is no name for a file in models/amed. Take letters, such as toy_6.",
            ),
            "name that is too long": (
                trained({"name": "漢" * 99}),
                NO_NAME,
                LETTERS,
            ),
            "name of half a character": (
                trained({"name": "\ud800"}),
                NO_NAME,
                LETTERS,
            ),
            "training on other latents": (
                trained({}, latent=node("LoadLatent", latent="16_channels.latent")),
                "…: the latent has … channels, and the model's have …",
                OTHER_KIND,
            ),
            "training on a video": (
                trained({}, latent=node("LoadLatent", latent="video.latent")),
                "…: the latent is a video, and the model draws images",
                OTHER_KIND,
            ),
            "schedule of no model": (
                trained(
                    {"model": ["edm", 0]},
                    edm=node("ModelSamplingContinuousEDM", sigma_max=100.0, sigma_min=200.0, **EDM),
                ),
                "There is no schedule …",
                "a rho above 0, and a model whose sigma_min is above 0 and below its sigma_max.",
            ),
            "schedule that does not fall": (
                trained({"schedule": "discrete", "steps": 20, "rho": 20.0}),
                "The schedule … with … steps gives …",
                "Take fewer steps, a rho of 0 (the schedule's own), or another schedule.",
            ),
            "less than a batch": (
                trained({"trajectories": 8, "batch_size": 16}),
                "Train AMED Predictor: … trajectories are less than one batch",
                "Raise trajectories, or lower batch_size.",
            ),
            "prompts of many lengths": (
                trained(
                    TWO_PROMPTS,
                    two=joined("text", "long"),
                    **{"long": longer("3", "text"), "3": longer("2", "text"), "2": longer("double", "text")},
                    double=longer("text", "text"),
                ),
                "Train AMED Predictor: the prompts are of …",
                "Take prompts of one length, or a single one.",
            ),
            "prompts of two kinds": (
                trained(TWO_PROMPTS, two=joined("text", "part"), part=area("text")),
                "Train AMED Predictor: the prompts are of …",
                "Make all with the same nodes.",
            ),
            "prompts of two areas": (
                trained(TWO_PROMPTS, two=joined("part", "text"), part=area("text")),
                "Train AMED Predictor: the prompts differ in '…'",
                "Combine prompts of the same kind, without areas, masks or ControlNets of their own.",
            ),
            "training of a broken model": (
                trained({"model": ["broken", 0]}, broken=BROKEN),
                "Train AMED Predictor: the loss at sigma …",
                "run it in fp32 or bf16 if that is black.",
            ),
        },
    ),
}

# -- what is warned of in the log --------------------------------------------------------------------------------------

WARNED = {
    **cases(
        "",
        {
            "text that is too long": (
                clip_text("word " * 99),
                "This open_clip model reads … tokens",
                "what is beyond them is left out of: word word",
            ),
        },
        needs="open_clip",
    ),
    **cases(
        "",
        {
            "folder without its preprocessing": (
                segmented("without_preprocessor/", class_name="hair", mask=["black", 0], unlabelled="skin"),
                "…: … has no preprocessor_config.json",
                "put the file there if the network was trained with others.",
            ),
        },
        needs="transformers",
    ),
    **cases(
        "",
        {
            "several faces": (
                face(crop="detect", image=["two", 0]) | {"two": node("LoadImage", image="faces.png")},
                "FaceID Loss: … shows … faces",
                "of which the largest counts. Crop the picture to choose another.",
            ),
        },
        needs="facenet_pytorch",
    ),
    **cases(
        "",
        {
            "no step in the range": (
                guided(sampler=dsg(start_percent=0.99)),
                "…: no step of this run lies where start_percent",
                "Widen them, or take more steps.",
            ),
            "nothing to follow": (
                guided(
                    loss=node("SphereGuideInpaintingLoss", image=PICTURE, mask=["white", 0]),
                    white=node("SolidMask", value=1.0, width=16, height=16),
                ),
                "…: in … of … guided steps the gradient of the loss was zero or not finite",
                "The loss may not depend on the image, be already fulfilled, or have given NaN.",
            ),
            "scheduler for another model": (
                predicted(
                    zero=ZERO_SNR,
                    sigmas=node(
                        "SphereGuideAMEDScheduler", predictor=["predictor", 0], model=["zero", 0], points="base"
                    ),
                ),
                "AMED … the predictor was trained for something else",
                "Train one for this.",
            ),
            "predictor with another cfg": (
                predicted(sample=custom(cfg=7.0)),
                "AMED … the predictor was trained for something else",
                "this run has cfg 7 and not 1. Its choices may not help here; train one for this.",
            ),
            "steps of another scheduler": (
                predicted(sigmas=BASE["sigmas"]),
                "AMED Sampler: these steps are not the predictor's",
                "Connect the SIGMAS of AMED Scheduler (base), or a part of them.",
            ),
        },
    ),
    **cases(
        "SphereGuideAMEDTrain",
        {
            "name of another training": (
                trained({"name": "mine", **TWO_PROMPTS}, two=joined("text", "part"), part=area("text")),
                "…: … is of a training with other settings",
                "goes to mine.training.before. This one begins anew.",
            ),
        },
    ),
}


def tested(file: str, tests: dict[str, str]) -> dict[str, tuple[str, str]]:
    return {quote: (file, test) for quote, test in tests.items()}


#: What no prompt provokes in a server with all that these tests need: how the message begins, and the test that does.
ELSEWHERE = {
    # files that somebody has tampered with
    **tested(
        "test_hostile_files.py",
        {
            "…: … can't be read: pretrained_cfg and model_args must be": "test_settings_that_have_no_names_are_refused",
            "Train AMED Predictor: the training in …": "test_a_training_that_can_not_go_on_says_so",
            "…: PyTorch … has a known hole …": "test_pickles_come_with_a_warning_where_pytorch_has_a_hole",
        },
    ),
    # a pack, or packages, that are not whole
    **tested(
        "test_toy_models.py",
        {"The Toy Portraits weights …": "test_a_truncated_file_is_named"},
    ),
    **tested(
        "test_face_loss.py",
        {"… needs the Python package …": "test_a_missing_package_is_named_with_the_command_that_installs_it"},
    ),
    # a checkpoint of a U-Net alone
    **tested(
        "test_guidance_node.py",
        {"…: the checkpoint that this VAE comes from holds none": "test_a_checkpoint_without_a_vae_is_named"},
    ),
    # what only a sampler, or a classifier, of another pack would do
    **tested(
        "test_diffrgd.py",
        {
            "…: this sampler adds its noise in a way that does not show the mean of its step": (
                "test_a_sampler_that_hides_its_noise_is_refused"
            )
        },
    ),
    **tested(
        "test_successors.py",
        {
            "…: this loss looks at the noisy image, and with preset …": (
                "test_a_loss_on_noisy_latents_has_no_estimate_to_move"
            )
        },
    ),
    # newer hosts refuse it themselves
    **tested("test_limits.py", {"…: … is …, and must come by a wire": "test_a_text_is_no_wire"}),
    # pictures, and networks, that the other cases do without
    **tested(
        "test_style_loss.py",
        {"Style Gram Loss: a picture of …×… pixels": "test_a_strip_of_a_picture_is_refused"},
    ),
    **tested(
        "test_segmentation_loss.py",
        {"Segmentation Loss: a picture of …×… pixels": "test_a_strip_of_a_picture_is_refused"},
    ),
    # the network
    **tested(
        "test_clip_loss.py",
        {
            "…: open_clip can't list": "test_an_open_clip_that_is_broken_takes_no_node_with_it_and_says_so",
            "…: '…' could not be downloaded": "test_a_failed_download_says_where_to_get_the_file",
        },
    ),
    # several GPUs, a full one, weights and latents of large models, nodes of other packs
    **tested(
        "test_guidance_node.py",
        {
            "… draws with matplotlib": "test_without_matplotlib_the_latent_passes_and_the_report_names_the_command",
            "…: out of memory": "test_out_of_memory_in_the_gradient_is_tried_again_with_checkpointing",
            "This loss looks at single images": "test_a_smaller_decode_reserves_less_and_refuses_several_frames",
        },
    ),
    **tested(
        "test_autograd.py",
        {
            "…: ComfyUI spreads this model": "test_a_model_that_is_spread_over_gpus_is_refused",
            "…: no gradient can be taken through this model": "test_a_layer_without_a_backward_pass_is_named",
            "…: this model samples several latents as one": "test_several_latents_as_one_are_refused",
            "The model has weights of type": "test_weights_that_hide_what_they_are_made_of_are_refused_with_a_way_out",
        },
    ),
    **tested(
        "test_dsg.py",
        {
            "…: this model runs without gradients": "test_a_model_without_gradients_is_refused_with_a_way_out",
            "…: the sampler drew no noise": "test_a_sampler_that_draws_elsewhere_in_the_schedule_runs_and_says_so",
        },
    ),
    **tested(
        "test_epsilon.py",
        {"…: this sampler (…) does not show": "test_a_sampler_that_hides_how_it_samples_is_refused"},
    ),
    **tested(
        "test_ilvr.py",
        {"ILVR Reference: this sampler (…)": "test_a_sampler_that_hides_how_it_samples_is_refused"},
    ),
    **tested(
        "test_amed.py",
        {
            "AMED Sampler: the model is called": "test_a_model_in_tiles_and_one_without_a_bottleneck_give_zeros",
            "Train AMED Predictor: this model": "test_a_model_without_gradients_is_not_trained_on",
            "Train AMED Predictor: there is no … prompt": "test_a_missing_prompt_is_refused",
            # the page offers these as lists: only a script can get them wrong
            "Train AMED Predictor: there is no objective": "test_an_objective_that_there_is_not_is_refused",
            "There is no schedule '…'": "test_schedules_that_can_not_be_are_refused",
        },
    ),
    **tested(
        "test_quickstart.py",
        {
            "This is Python …, and SphereGuide": "test_older_python_is_refused",
            "This is Python …, and the ComfyUI": "test_newer_python_needs_a_checkout",
            "There is no PyTorch of today": "test_machines_without_pytorch_are_told_what_to_do",
            "This version of SphereGuide": "test_arguments_of_a_benchmark_are_passed_on",
            "COMFYUI_PATH": "test_comfyui_path_without_a_comfyui_is_named_with_a_remedy",
            "Could not set up": "test_a_folder_that_can_not_be_written_to_is_named_and_no_traceback",
            "Could not make": "test_an_environment_that_can_not_be_made_shows_why_and_what_to_do",
            "Could not install": "test_failed_installation_shows_the_end_of_pip_s_log_and_what_to_do",
        },
    ),
}
