"""The workflows for Toy Portraits, which need no download."""

from __future__ import annotations

from layouts import (
    FACTOR,
    MAP,
    PICTURE,
    STYLE,
    TOYS,
    by_style,
    calibrate,
    combined,
    face_loader,
    face_loss,
    few_calls,
    open_clip,
    picture_of,
    prompts,
    restoration,
    segmentation_loader,
    segmentation_loss,
    side_by_side,
    steered,
    taught,
    text_loss,
)

RESTORATION = f"""
Drop {PICTURE}, from the pack's folder workflows (in ComfyUI/custom_nodes), on Original picture, and queue.

Turn these:
- guidance_rate (DSG Guidance) is the strength. At 0 you see what the model paints on its own with this seed. Too high,
and the noise of the measurement shows.
- steps (Steps): more steps match the measurement more closely.
- noise_seed (Sample): another answer that fits the same measurement.
- The prompts may stay empty. With cfg above 1 they join in, at twice the time.

How guidance went: the loss should fall over the steps.

Your own picture: a portrait of 128 x 128 pixels. Another size needs the same width and height in Empty Latent Image."""

STEERING = """
Turn these:
- guidance_rate (DSG Guidance) is the strength. At 0 you see what the model paints on its own with this seed. Too high,
and the picture pleases the network that judges it more than it pleases you.
- steps (Steps): more steps give guidance more turns.
- noise_seed (Sample): another picture that fits.

How guidance went: the loss should fall over the steps.

With your own checkpoint: put a network that was trained on photos in place of the Toy Portraits one, in its loader."""


def drop(*pairs: tuple[str, str]) -> str:
    """Which picture belongs on which Load Image."""
    places = " and ".join(f"{picture} on {title}" for picture, title in pairs)
    return f"\nDrop {places}, from the pack's folder workflows (in ComfyUI/custom_nodes), and queue.\n"


PORTRAIT = "comic portrait of a smiling person with long red hair, wearing round glasses, teal background"

WORKFLOWS = {
    "toy_inpainting": restoration(
        "inpainting",
        "inpainting",
        "SphereGuideInpaintingLoss",
        {},
        guidance_rate=0.2,
        note="""
Half of the pixels are missing, one by one at random, and there is noise on the rest. The model only knows how to paint
portraits; nobody taught it to repair them. Inpainting Loss measures how far each estimate of the finished picture is
from the pixels that are known, and DSG Guidance turns the sampler's noise so that the result agrees with them.
"""
        + RESTORATION,
    ),
    "toy_super_resolution": restoration(
        "super_resolution",
        "super-resolution",
        "SphereGuideSuperResolutionLoss",
        {"factor": FACTOR},
        guidance_rate=0.14,
        note="""
The portrait is scaled down to 32 x 32 pixels, with noise. The model only knows how to paint portraits;
nobody taught it to enlarge them. Super-Resolution Loss scales each estimate of the finished picture down in the same
way and compares, and DSG Guidance turns the sampler's noise so that the result agrees. Set the same factor in Degrade
Image and in the loss.
"""
        + RESTORATION,
    ),
    "toy_thumbnail": restoration(
        "thumbnail",
        "super-resolution",
        "SphereGuideSuperResolutionLoss",
        {"factor": 16},
        guidance_rate=0.14,
        note="""
The portrait is scaled down to 8 x 8 pixels, with noise: 192 numbers, far too few to say what it was. The model only
knows how to paint portraits. Super-Resolution Loss scales each estimate of the finished picture down in the same way
and compares, and DSG Guidance turns the sampler's noise so that the result agrees: a portrait, and one that makes this
thumbnail. What the thumbnail does not tell, such as the shape of the eyes, each noise_seed answers for itself.
"""
        + RESTORATION,
    ),
    "toy_deblur": restoration(
        "deblur",
        "gaussian blur",
        "SphereGuideGaussianDeblurLoss",
        {"kernel_size": 61, "sigma": 3.0},
        guidance_rate=0.14,
        note="""
The portrait is blurred (sigma 3 pixels), with noise. The model only knows how to paint portraits; nobody taught it to
sharpen them. Gaussian Deblur Loss blurs each estimate of the finished picture in the same way and compares, and DSG
Guidance turns the noise of the sampler so that the result agrees. Set the same kernel_size and sigma in Degrade Image
and in the loss.
"""
        + RESTORATION,
    ),
    "toy_clip_text": steered(
        "clip_text",
        {
            "clip": open_clip(),
            "loss": text_loss((1130, 640), "a person with red hair, yellow clothes, teal background"),
        },
        "The network that judges",
        """
The prompt is empty. CLIP Text Loss asks an open_clip model how well each estimate of the finished picture agrees with
the text in it, and DSG Guidance turns the sampler's noise so that the picture agrees better. This works with models
that know no text at all. It needs pip install open-clip-torch.

Queue, then change the text. Parts of it are joined by | and weighed: red hair | glasses:0.5
"""
        + STEERING,
        guidance_rate=0.1,
    ),
    "toy_segmentation": steered(
        "segmentation",
        {
            "map": picture_of("Map of colours", MAP, 700, 760),
            "segmenter": segmentation_loader(),
            "loss": segmentation_loss((1130, 640)),
        },
        "What shall be where",
        """
A map says what shall be where, in colours that stand for hair, skin, clothes and so on. Segmentation Loss asks a
network that names the class of each pixel how far each estimate of the finished picture is from that map, and DSG
Guidance turns the sampler's noise so that the picture agrees.
"""
        + drop((MAP, "Map of colours"))
        + STEERING,
        guidance_rate=0.1,
    ),
    "toy_style": steered(
        "style",
        by_style(),
        "A style",
        """
Style Gram Loss compares which features of a network go together in each estimate of the finished picture, wherever they
lie, with those of a picture: its colours and textures, not its subject. DSG Guidance turns the sampler's noise so that
they agree. It needs pip install open-clip-torch.
"""
        + drop((STYLE, "Picture of the style"))
        + STEERING,
        guidance_rate=0.2,
    ),
    "toy_text_style": steered(
        "text_style",
        by_style(),
        "A style",
        """
The prompt says what to paint, and cfg sees to it as always; the style comes from a picture, through Style Gram Loss.
The two don't know of each other: guidance adds to any workflow that samples. It needs pip install open-clip-torch.
"""
        + drop((STYLE, "Picture of the style"))
        + STEERING,
        guidance_rate=0.2,
        prompt="a laughing person with long hair, wearing square glasses",
        cfg=3.0,
    ),
    "toy_faceid": steered(
        "faceid",
        {
            "face": picture_of("Reference face", PICTURE, 690, 760),
            "encoder": face_loader(),
            "loss": face_loss((1130, 640)),
        },
        "A face",
        """
FaceID Loss asks a face recognition network how far the face of each estimate of the finished picture is from that of a
reference, and DSG Guidance turns the sampler's noise so that it is the same person: the shape of the face, not its hair
or background. It needs pip install timm.

For photos set crop to detect, which finds the face by itself. Cartoons have theirs in a fixed box.
"""
        + drop((PICTURE, "Reference face"))
        + STEERING,
        guidance_rate=0.3,
    ),
    "toy_strength_sweep": steered(
        "strength_sweep",
        {
            "clip": open_clip(),
            "loss": text_loss((1130, 640), "a person with red hair, yellow clothes, teal background"),
        },
        "The network that judges",
        """
The same seed seven times, with guidance_rate from 0 to 1: no guidance first. Here all that the text says is there at
0.3, and at 0.5 the face falls apart; beyond that it is luck, and at 1 this seed has a face again. Where it falls apart
depends on the loss, the model, the seed and the number of steps, so sweep once for each of your recipes, and then work
below it.

Queue: it takes as long as seven pictures. It needs pip install open-clip-torch.

Turn these:
- values (Strengths): closer together, to look closely at a range.
- the loss: put any other in its place.
- Strengths can go into any other setting too. Right-click the node that has it, and convert the widget to an input.""",
        guidance_rate=0.2,
        rates="0, 0.1, 0.2, 0.3, 0.5, 0.75, 1",
    ),
    "toy_combined": steered(
        "combined",
        {
            "clip": open_clip(540, 320),
            "face": picture_of("Reference face", PICTURE, 1070),
            "encoder": face_loader(940, 320),
            "map": picture_of("Map of colours", MAP, 1590),
            "segmenter": segmentation_loader(1450, 320),
            "text": text_loss((760, 540), "a person with blue hair, orange background"),
            "identity": face_loss((760, 940)),
            "layout": segmentation_loss((760, 1450)),
            "loss": combined((1130, 640), "text", "identity", "layout"),
        },
        "A text, a face and a layout",
        """
Three losses at once: the text says the colours, the reference who it is, the map what is where. Combine Losses gives
each its weight; with normalise on, equal weights pull equally, whatever numbers the losses give. It needs pip install
open-clip-torch timm.
"""
        + drop((PICTURE, "Reference face"), (MAP, "Map of colours"))
        + STEERING,
        guidance_rate=0.2,
    ),
    "toy_epsilon_scaling": side_by_side(
        "epsilon_scaling",
        "1, 1.05",
        """
With few steps a sampler loses detail. Epsilon Scaling divides the noise that the model predicts by a number close to 1,
and gives it back. Here: four portraits of ten Euler steps without it, with the same number at each step (b), and with
what Calibrate Epsilon Scaling finds.

Queue: it measures first, for about a minute.

Turn these:
- values (Values of b): above 1 gives detail, then grain; below 1 smooths; 1 is off.
- steps (Steps), sampler_name (Sampler): each recipe needs a correction of its own. More steps need less.
- noise_seed in both: other portraits.""",
    ),
    "toy_amed_sample": few_calls(
        "amed_sample",
        TOYS,
        "toy_portraits_ipndm_6.safetensors",
        (PORTRAIT, ""),
        1.0,
        4,
        """
A sampler of few steps goes wrong since it asks the model at the wrong times. AMED has learnt, for this model, where
to ask. Here: four portraits of six model calls with a learned solver; below, of six with a stock sampler, and of fifty
with it. The first four should look like the last four.

Queue.

Turn these:
- name (Predictor): toy_portraits_ipndm_4 and _8 make four and eight calls. Put as many in place of the 6
  (Numbers of steps).
- sampler_name and scheduler (Stock sampler): these two come nearest of all with six calls. Try.
- noise_seed in both: other portraits.
- points (Its steps): expanded, with euler in place of AMED Sampler, is the same schedule for stock samplers.""",
        known=("uni_pc", "simple"),
    ),
    "toy_amed_train": taught(
        "amed_train",
        TOYS,
        prompts(PORTRAIT),
        ("positive", "CONDITIONING"),
        "toy_try",
        """
Teaches a predictor for Toy Portraits: where a sampler of six model calls should ask, to come out where one of many
does. Then draws four portraits with it.

Queue: some minutes on a computer without a GPU. Cancel keeps the best so far, and queueing again goes on from there.

Turn these:
- steps (Train AMED Predictor): each is two model calls; with epd and epd_ipndm 1 + parallel.
- trajectories and epochs: more learn better, and take longer.
- student: amed is AMED-Solver, epd and epd_ipndm are EPD-Solver, the others AMED-Plugin on a known solver.
- cfg: the one that you will draw with, in the sampler too.""",
    ),
    "toy_calibrate": calibrate(
        "calibrate",
        """
Measures which Epsilon Scaling a recipe needs: model, prompt, cfg, sampler and steps. It compares what the recipe draws
with real images, and says on the node what to use, or to leave it off.

Queue, and read the verdict on Calibrate Epsilon Scaling. On the right: how long the predicted noise is in training and
in sampling, the correction of each step, and how much detail the pictures have beside the real ones, 1 being right.

Turn these:
- sampler_name and steps: what they need differs.
- samples: more make the verdict surer, and take longer.

With your own checkpoint: VAE Encode of 32 or more pictures of the kind that your prompt asks for, in place of Draw Toy
Portraits.""",
    ),
}
