"""The workflows for checkpoints of one's own: Stable Diffusion 1.5, SDXL, SD3.

Their settings are the papers' where those have some for such models, and else those of the help pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graph import Workflow
from layouts import (
    FACTOR,
    Model,
    by_style,
    by_text_and_style,
    checkpoint,
    corrected,
    enlarged,
    face_loader,
    face_loss,
    few_calls,
    picture_of,
    rectangles,
    steered,
    taking_turns,
    taught,
)

NETWORK = "ViT-B-16:laion2b_s34b_b88k"
SEGMENTER = "lraspp_mobilenet_v3_large-d234d4ea.pth"
FACES = "20180402-114759-vggface2.pt"
NEGATIVE = "blurry, low quality"
STEPS = 50


LABELS = {"sd15": "SD 1.5", "sdxl": "SDXL", "sd3": "SD 3"}  # on the thumbnails
TITLES = {
    "style": "Style",
    "text_style": "Text and style",
    "faceid": "Face ID",
    "segmentation": "Segmentation",
    "super_resolution": "Super-resolution",
    "epsilon_scaling": "Epsilon Scaling",
    "amed_train": "AMED: train",
    "amed_sample": "AMED: sample",
}


@dataclass(frozen=True)
class Family:
    """Checkpoints that take the same settings.

    cfg         of prompts that are not guided
    pictures    how many are drawn at once, where pictures are compared
    guidance    settings of DSG Guidance that the size of the model asks for
    training    settings of Train AMED Predictor that it asks for
    memory      what the note says of those
    """

    key: str
    name: str
    model: Model
    cfg: float
    pictures: int
    guidance: dict[str, Any]
    training: dict[str, Any]
    memory: str


SD15 = Family(
    "sd15",
    "Stable Diffusion 1.5",
    checkpoint("v1-5-pruned-emaonly.safetensors", 512),
    cfg=7.0,
    pictures=4,
    guidance={},
    training={"trajectories": 512, "batch_size": 4},
    memory="turn on checkpointing, lower batch_size or set objective to each point, where that is too little",
)
SDXL = Family(
    "sdxl",
    "SDXL",
    checkpoint("sd_xl_base_1.0.safetensors", 1024),
    cfg=6.0,
    pictures=2,
    guidance={"checkpointing": True},
    training={"trajectories": 256, "batch_size": 1, "objective": "each point", "checkpointing": True},
    memory="batch_size, objective and checkpointing are set to the least already",
)
SD3 = Family(
    "sd3",
    "SD3 Medium, with its text encoders,",
    checkpoint("sd3_medium_incl_clips.safetensors", 1024, "EmptySD3LatentImage"),
    cfg=4.5,
    pictures=2,
    guidance={"checkpointing": True},
    training={},
    memory="",
)


def needs(family: Family, *more: str) -> str:
    """What has to be loaded, as a list."""
    checkpoint = f"Checkpoint: one of {family.name} in models/checkpoints."
    return "\n\nLoad:\n" + "\n".join(f"- {line}" for line in (checkpoint, *more)) + "\n\nThen queue.\n"


CLIP = (
    f"Load open_clip Model: {NETWORK}. If the list has it with (download) only, that entry fetches it. It needs pip "
    "install open-clip-torch."
)
STYLE = "Picture of the style: a picture of yours."
RATE = "guidance_rate (DSG Guidance): the strength. At 0 you see what the model paints on its own with this seed."
SEED = "noise_seed (Sample): another picture that fits."
MEMORY = "checkpointing (DSG Guidance): off is faster, and takes much more memory."


def turn(family: Family, *lines: str) -> str:
    """What to turn, as a list, and what to expect."""
    memory = [MEMORY] if family.guidance.get("checkpointing") else []
    return "\nTurn these:\n" + "\n".join(f"- {line}" for line in (*lines, SEED, *memory)) + EXPECT.format(family.name)


EXPECT = """

Expect: a guided step takes more than twice as long as a plain one, and longer the larger it decodes (decode_scale; a
TAESD VAE decodes faster). How guidance went: the loss should fall. The settings are a start, taken from the papers and
from Toy Portraits; nobody has measured them on your checkpoint. Ignores the loss: raise guidance_rate. Odd textures or
flat areas: lower it."""


def workflows_of(family: Family) -> dict[str, Workflow]:
    """The set that each family of checkpoints with a U-Net has."""
    key, model = family.key, family.model
    common = {"model": model, "negative": NEGATIVE, "note_height": 920}
    coarse = {**family.guidance, "decode_scale": 0.5}
    published = {  # of style, for Stable Diffusion
        "rate_steps": 0,
        "start_percent": 0.3,
        "end_percent": 0.7,
        "recurrence": 3,
        "recurrence_start": 0.3,
        "recurrence_end": 0.6,
    }
    return {
        f"{key}_style": steered(
            f"{key}_style",
            by_style("style.jpg", NETWORK),
            "A style",
            """
The prompt says what to paint, as ever; the style comes from a picture. Style Gram Loss compares its colours and strokes
with those of each estimate of the finished picture, and DSG Guidance turns the sampler's noise so that they agree. The
settings are those of the DSG paper: 100 steps, guided in the middle of the schedule, where most steps are done four
times (recurrence)."""
            + needs(family, CLIP, STYLE)
            + turn(
                family,
                f"{RATE} From 0.05 to 0.2.",
                "recurrence (DSG Guidance): 0 takes half the time.",
                "start_percent and end_percent: earlier changes the composition too.",
            ),
            0.1,
            "a cat sitting on a chair in a garden",
            5.0,
            steps=100,
            **common,
            **coarse,
            **published,
        ),
        f"{key}_text_style": steered(
            f"{key}_text_style",
            by_text_and_style("style.jpg", NETWORK, "a painting of a lighthouse in a storm, huge waves, dark clouds"),
            "A text and a style",
            """
Two losses at once, through one open_clip model: CLIP Text Loss asks how well each estimate of the finished picture
agrees with its text, Style Gram Loss how well with the colours and strokes of a picture. Combine Losses weighs them,
and DSG Guidance turns the sampler's noise. The prompt stays: the loss is a second opinion, for what the model's own
text encoder misses."""
            + needs(family, CLIP, STYLE)
            + turn(
                family,
                f"{RATE} From 0.1 to 0.3.",
                "weight_1 and weight_2 (Combine Losses): text and style.",
                "text (CLIP Text Loss): parts are joined by | and weighed: dark clouds | people:-0.5",
            ),
            0.2,
            "a lighthouse in a storm",
            5.0,
            steps=STEPS,
            **common,
            **coarse,
        ),
        f"{key}_faceid": steered(
            f"{key}_faceid",
            {
                "face": picture_of("Reference face", "face.jpg", 690, 760),
                "encoder": face_loader(name=FACES),
                "loss": face_loss((1130, 640), "detect"),
            },
            "A face",
            """
FaceID Loss asks a face recognition network how far the face of each estimate of the finished picture is from that of a
reference, and DSG Guidance turns the sampler's noise so that it is the same person. Hair, clothes and light stay with
the prompt, which should ask for a portrait. The face is found on the estimate once there is one; until then the box is
where it should be."""
            + needs(
                family,
                f"Load Face Encoder: {FACES} of facenet-pytorch, in models/face_encoders. Its help page says how to "
                "install that.",
                "Reference face: a photo that shows it large and from the front.",
            )
            + turn(
                family,
                f"{RATE} From 0.1 to 0.3.",
                "box_left … box_bottom (FaceID Loss): where the face shall be.",
            ),
            0.2,
            "portrait photo of a person in a space suit, face seen from the front, soft light",
            family.cfg,
            steps=STEPS,
            **common,
            **(coarse if model.size > 512 else family.guidance),
        ),
        f"{key}_segmentation": steered(
            f"{key}_segmentation",
            rectangles(model.size, "dog", "cat", SEGMENTER),
            "What shall be where",
            """
A dog on the left and a cat on the right, which a prompt alone mixes up. Two rectangles say what shall be where, and
Segmentation Loss asks a network that names the class of each pixel how far each estimate of the finished picture is
from that; DSG Guidance turns the sampler's noise. What lies outside of the rectangles is free."""
            + needs(
                family,
                f"Load Segmentation Model: {SEGMENTER} of torchvision, in models/segmentation. It knows the classes of "
                "PASCAL VOC: person, bird, car, chair … Its help page has the address.",
            )
            + turn(
                family,
                f"{RATE} From 0.05 to 0.2.",
                "class_name (Segmentation Target: left; Segmentation Loss: right), and the prompt with it.",
                f"x and y of both places, width and height of the rectangle; the picture has {model.size}.",
                "Or connect masks of your own: Load Image has one of what you paint in its mask editor.",
            ),
            0.1,
            "photo of a dog and a cat in a meadow",
            family.cfg,
            steps=STEPS,
            **common,
            **coarse,
        ),
        f"{key}_super_resolution": super_resolution(family, "euler_ancestral", "", **family.guidance),
        f"{key}_epsilon_scaling": corrected(
            f"{key}_epsilon_scaling",
            model,
            ("a stone bridge over a mountain stream, autumn", NEGATIVE),
            family.cfg,
            family.pictures,
            f"""
Long steps lose detail, the more the fewer they are. Epsilon Scaling divides the noise that the model predicts by b, and
a b above 1 gives some of it back. Here: the same seeds without it, with b 1.005 and with 1.015.{needs(family)}
Turn these:
- values (Values of b): above 1 gives texture and detail, then grain; below 1 smooths; 1 is off. Go by 0.001.
- steps (Steps), sampler_name (Sampler), cfg (Sample): each recipe needs a b of its own, and may need none. More
steps need less.
- noise_seed (Sample): other pictures.

Expect: small differences, in textures and fine detail. What is best here nobody has measured: Calibrate Epsilon Scaling
does, if you give it 32 or more real pictures of the kind that your prompt asks for. toy_calibrate shows how.""",
        ),
        f"{key}_amed_train": taught(
            f"{key}_amed_train",
            model,
            taking_turns(
                "portrait photo of an old fisherman, soft light",
                "a mountain lake at dawn, pine forest, oil painting",
                "a red vintage car in a narrow street, rain",
                negative=NEGATIVE,
            ),
            ("all", "CONDITIONING"),
            f"{key}_ipndm_6",
            f"""
Teaches a predictor for a checkpoint of {family.name}: choose yours on the left. The three prompts take turns
while it learns; put kinds of pictures there that you will ask for.

Queue. It needs a GPU with much memory: {family.memory}. Cancel keeps the best so far, and queueing again goes on from
there.

Turn these:
- steps (Train AMED Predictor): each is two model calls, doubled by cfg as always.
- cfg: the one that you will draw with, in the sampler too. Each needs a predictor of its own.
- trajectories: the paper takes 5000.

Then: {key}_amed_sample draws with it.""",
            family.pictures,
            wider=400,
            cfg=family.cfg,
            scale_dir=0.01,
            scale_time=0.2,
            schedule="discrete",
            **family.training,
        ),
        f"{key}_amed_sample": few_calls(
            f"{key}_amed_sample",
            model,
            f"{key}_ipndm_6.safetensors",
            ("portrait photo of an old fisherman, soft light", NEGATIVE),
            family.cfg,
            family.pictures,
            f"""
A sampler of few steps goes wrong since it asks the model at the wrong times. AMED learns, for one model and one cfg,
where to ask. Here: pictures of six model calls with a learned solver; below, of six with a stock sampler, and of fifty
with it.

Load:
- Checkpoint: the one of {family.name} that the predictor was trained for.
- Predictor: what {key}_amed_train has saved, in models/amed. Train first.

Then queue.

Turn these:
- cfg in both: the one of the training. The predictor says which, on its output about.
- sampler_name and scheduler (Stock sampler): is there one that does as well?
- noise_seed in both: other pictures.
- values (Numbers of steps): what the stock sampler gets.

Expect: the upper pictures should look more like the last of the lower than the first of these do. If they don't, the
predictor is no good: train it longer, with more trajectories.""",
            760,
        ),
    }


def super_resolution(family: Family, sampler: str, about: str, **settings: Any) -> Workflow:
    side = family.model.size // FACTOR
    name = f"{family.key}_super_resolution"
    return steered(
        name,
        enlarged(family.model.size),
        "A photo, scaled down",
        f"""
Small picture cuts a square out of your photo and scales it down to {side} x {side} pixels. The model is asked for a
picture of {family.model.size} x {family.model.size} that shows the same when it is scaled down in that way:
Super-Resolution Loss compares, and DSG Guidance turns the sampler's noise so that they agree. {about}"""
        + needs(family, "Photo: one of yours, of any size.")
        + turn(
            family,
            f"{RATE} From 0.1 to 0.2; too high, and the errors of the small picture show.",
            "The prompts: say what the photo shows. What the small picture does not tell, the model invents, faces "
            "too.",
            f"factor: the sides of Small picture are those of the empty latent divided by it, so {side} and "
            f"{family.model.size} with {FACTOR}.",
        ),
        0.15,
        "a sharp, detailed photo",
        family.cfg,
        model=family.model,
        negative=NEGATIVE,
        steps=STEPS,
        sampler=sampler,
        note_height=920,
        **settings,
    )


WORKFLOWS = {
    **workflows_of(SD15),
    **workflows_of(SDXL),
    "sd3_super_resolution": super_resolution(
        SD3,
        "lcm",
        "SD3 is a flow model: lcm, which renews all of the noise at each step, samples it in every ComfyUI; since 2025 "
        "euler_ancestral and dpmpp_2m_sde do too (with rate_steps 50), and are worth a comparison.",
        **SD3.guidance,
        rate_steps=0,
    ),
}
