"""AMED: learned solvers for few model calls."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.samplers
import comfy.utils
import folder_paths
import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from .. import host
from ..models.network import choices, models_folder, path_of, shortened
from ..samplers.amed import predictor as files
from ..samplers.amed.predictor import AMEDPredictor, AMEDSettings
from ..samplers.amed.sampling import amed_sampler, base_sigmas, expanded_sigmas, mismatches, probed_midpoints
from ..samplers.amed.schedules import SCHEDULES
from ..samplers.amed.students import MOST_PARALLEL, STUDENTS
from ..samplers.amed.training import OBJECTIVES, PUBLISHED, TEACHERS, History, Plan, Progress, settings_for, train
from .figure import drawn, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("sphereguide")

FOLDER = "amed"
EMPTY = f"models/{FOLDER} is empty"
POINTS = ("base", "expanded")

models_folder(FOLDER)


class AMEDTrain:
    DESCRIPTION = (
        "Teaches a small network where a few-step sampler should ask this model, so that it comes out where a sampler "
        "of many steps does: 4 to 8 model calls in place of 20 to 50. Once for a model, a cfg and a number of steps: "
        "minutes for Toy Portraits, longer for large models, which want a GPU with much memory. AMED-Solver and "
        "AMED-Plugin, Zhou et al., CVPR 2024, arXiv 2312.00094; EPD-Solver, Zhu et al., ICCV 2025, arXiv 2507.14797."
    )
    CATEGORY = "SphereGuide/amed"
    FUNCTION = "train"
    OUTPUT_NODE = True
    RETURN_TYPES = ("AMED_PREDICTOR", "IMAGE", "STRING")
    RETURN_NAMES = ("predictor", "curves", "report")
    OUTPUT_TOOLTIPS = (
        "For AMED Scheduler and AMED Sampler, and for Save AMED Predictor.",
        "The loss at each time point, and how near the pictures come to the teacher's.",
        "What the node shows.",
    )
    SEARCH_ALIASES = ["amed", "few steps", "distillation", "fast sampler", "learned solver", "turbo", "lightning"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model, with the LoRAs and patches that it will be used with."}),
                "positive": (
                    "CONDITIONING",
                    {
                        "tooltip": (
                            "A prompt, or several of Conditioning (Combine): the trajectories take them in turn. Kinds "
                            "of pictures that you will ask for."
                        )
                    },
                ),
                "negative": ("CONDITIONING", {"tooltip": "The negative prompt that you will use."}),
                "latent": ("LATENT", {"tooltip": "Empty Latent Image of the size that you will draw."}),
                "cfg": (
                    "FLOAT",
                    {"default": 7.0, "min": 0.0, "max": 100.0, "step": 0.1, "tooltip": "The cfg that you will use."},
                ),
                "student": (
                    list(STUDENTS),
                    {
                        "default": "ipndm",
                        "tooltip": (
                            "The solver that is helped. ipndm is the best in the paper and here. amed is AMED-Solver; "
                            "euler to dpmpp are AMED-Plugin on Euler, DPM-Solver-2, iPNDM and DPM-Solver++; epd and "
                            "epd_ipndm are EPD-Solver and its plugin, with the same table for all pictures."
                        ),
                    },
                ),
                "steps": (
                    "INT",
                    {
                        "default": 3,
                        "min": 1,
                        "max": 20,
                        "tooltip": (
                            "Each takes two model calls: 2 to 4 steps are 4 to 8. Of epd each takes one more than "
                            "parallel says. One call less with afs."
                        ),
                    },
                ),
                "schedule": (
                    list(SCHEDULES),
                    {
                        "tooltip": (
                            "Where the steps begin. polynomial is that of EDM and Karras; logsnr uniform in the log of "
                            "sigma; time_uniform and discrete in time, which the authors take for Stable Diffusion."
                        )
                    },
                ),
                "rho": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 20.0,
                        "step": 0.1,
                        "tooltip": "The power of the schedule. 0 takes its own: 7 for polynomial, 1 for the others.",
                    },
                ),
                "afs": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": (
                            "Analytical first step: takes the first direction from the noise alone, and saves one "
                            "model call. Costs more than it saves where sigma_max is small, as Stable Diffusion's is."
                        ),
                    },
                ),
                "max_order": (
                    "INT",
                    {
                        "default": 4,
                        "min": 1,
                        "max": 4,
                        "tooltip": "How many directions ipndm, epd_ipndm (up to 4) and dpmpp (up to 3) look back at.",
                    },
                ),
                "scale_dir": (
                    "FLOAT",
                    {
                        "default": 0.1,
                        "min": 0.0,
                        "max": 0.5,
                        "step": 0.001,
                        "tooltip": "By how much a step may be longer or shorter. 0 to 0.01 in the paper.",
                    },
                ),
                "scale_time": (
                    "FLOAT",
                    {
                        "default": 0.3,
                        "min": 0.0,
                        "max": 0.5,
                        "step": 0.01,
                        "tooltip": "By how much the time that the model is told may be off. 0 to 0.2 in the papers.",
                    },
                ),
                "teacher": (
                    [*TEACHERS, PUBLISHED],
                    {
                        "default": "ipndm",
                        "tooltip": (
                            "The solver that is imitated. As published: heun with 1 point for amed, euler and dpm2; "
                            "the student's own with 2 for ipndm and dpmpp."
                        ),
                    },
                ),
                "teacher_points": (
                    "INT",
                    {
                        "default": 4,
                        "min": 1,
                        "max": 100,
                        "tooltip": "How many more points the teacher has in each step. Not for 'as published'.",
                    },
                ),
                "trajectories": (
                    "INT",
                    {
                        "default": 192,
                        "min": 1,
                        "max": 1000000,
                        "tooltip": "From how many noises to learn. The authors take 10000, 5000 for Stable Diffusion.",
                    },
                ),
                "epochs": (
                    "INT",
                    {
                        "default": 6,
                        "min": 1,
                        "max": 1000,
                        "tooltip": "How often to use each. What the teacher gave in the first is kept in memory.",
                    },
                ),
                "batch_size": (
                    "INT",
                    {
                        "default": 16,
                        "min": 1,
                        "max": 1024,
                        "tooltip": (
                            "Trajectories at once. Each takes the memory of a guided picture; with objective endpoint "
                            "that of one for each model call."
                        ),
                    },
                ),
                "objective": (
                    list(OBJECTIVES),
                    {
                        "tooltip": (
                            "endpoint: that the finished latents are right. each point: that they are at every time "
                            "point, one after the other, as published; a part of the memory, and less good here."
                        )
                    },
                ),
                "learning_rate": (
                    "FLOAT",
                    {
                        "default": 0.02,
                        "min": 0.00001,
                        "max": 1.0,
                        "step": 0.00001,
                        "tooltip": "Of Adam; it falls to 0. 0.005 in the paper, for each point.",
                    },
                ),
                "training_seed": (  # not `seed`, which the page would change with each run
                    "INT",
                    {"default": 0, "min": 0, "max": 2**32 - 1, "tooltip": "Another seed trains with other noise."},
                ),
                "name": (
                    "STRING",
                    {
                        "default": "my_predictor",
                        "tooltip": (
                            "What is reached is kept in models/amed/<name>.training.safetensors. After Cancel, queue "
                            "again to go on, or load that file: it holds the best so far. Empty: nothing is kept."
                        ),
                    },
                ),
                "checkpointing": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "Needs less memory, and takes longer."},
                ),
            },
            # Optional, so that workflows from before it existed still run; its widget comes last for the same reason.
            "optional": {
                "parallel": (
                    "INT",
                    {
                        "default": 2,
                        "min": 1,
                        "max": MOST_PARALLEL,
                        "tooltip": (
                            "For epd and epd_ipndm: how many directions each step takes the mean of, each with a model "
                            "call of its own. 2 in the paper."
                        ),
                    },
                )
            },
        }

    def train(
        self,
        model: Any,
        positive: Any,
        negative: Any,
        latent: dict[str, Any],
        cfg: float,
        student: str,
        steps: int,
        schedule: str,
        rho: float,
        afs: bool,
        max_order: int,
        scale_dir: float,
        scale_time: float,
        teacher: str,
        teacher_points: int,
        name: str,
        training_seed: int,
        parallel: int = 2,
        **plan: Any,
    ) -> dict[str, Any]:
        title = "Train AMED Predictor"
        kept = _file(name, title, ".training") if name.strip() else None
        figure = new_figure(title, 10, 4)  # before the work of minutes
        settings = settings_for(
            model,
            teacher,
            teacher_points,
            cfg=cfg,
            student=student,
            steps=steps,
            schedule=schedule,
            rho=rho,
            afs=afs,
            max_order=max_order,
            scale_dir=scale_dir,
            scale_time=scale_time,
            parallel=parallel,
        )
        guider = comfy.samplers.CFGGuider(model)
        guider.set_cfg(cfg)
        shape = _shape(model, latent, title)
        shown = _shown(model)
        predictor, history = train(
            guider, (positive, negative), shape, settings, Plan(seed=training_seed, **plan), kept, shown
        )
        report = said(predictor)
        return {"ui": {"text": [report]}, "result": (predictor, curves(history, settings, figure), report)}


class AMEDSave:
    DESCRIPTION = "Saves a trained predictor, with all of its settings, under models/amed. 40 KB or less."
    CATEGORY = "SphereGuide/amed"
    FUNCTION = "save"
    OUTPUT_NODE = True
    RETURN_TYPES = ()
    OUTPUT_TOOLTIPS = ()
    SEARCH_ALIASES = ["amed", "save predictor", "few steps"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "predictor": ("AMED_PREDICTOR", {"tooltip": "From Train AMED Predictor."}),
                "name": (
                    "STRING",
                    {
                        "default": "my_predictor",
                        "tooltip": "The file is models/amed/<name>.safetensors; one of that name is replaced.",
                    },
                ),
            }
        }

    def save(self, predictor: AMEDPredictor, name: str) -> dict[str, Any]:
        files.save(predictor, _file(name, "Save AMED Predictor"))
        return {}


class AMEDLoad:
    DESCRIPTION = "Loads a predictor of Train AMED Predictor from models/amed, or one of those for Toy Portraits."
    CATEGORY = "SphereGuide/amed"
    FUNCTION = "load"
    RETURN_TYPES = ("AMED_PREDICTOR", "STRING")
    RETURN_NAMES = ("predictor", "about")
    OUTPUT_TOOLTIPS = ("For AMED Scheduler and AMED Sampler.", "What it was trained for.")
    SEARCH_ALIASES = ["amed", "few steps", "fast sampler", "learned solver"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "A file in models/amed. One of ….training.safetensors holds the best so far of a training."
        return {"required": {"name": (choices(FOLDER) or [EMPTY], {"tooltip": tooltip})}}

    @classmethod
    def IS_CHANGED(cls, name: str) -> str:
        """A training goes on, and Save replaces: the file counts, not its name."""
        path = folder_paths.get_full_path(FOLDER, name)
        return f"{Path(path).stat().st_mtime_ns}" if path else ""

    def load(self, name: str) -> tuple[AMEDPredictor, str]:
        title = "Load AMED Predictor"
        predictor = files.load(path_of(FOLDER, name, title, "Make one with Train AMED Predictor."), title)
        return predictor, predictor.about()


class AMEDScheduler:
    DESCRIPTION = (
        "The sigmas of a predictor. base: for AMED Sampler. expanded: with the times between them that the predictor "
        "chooses on the average, for any sampler with one model call a step, such as euler, dpmpp_2m or ipndm."
    )
    CATEGORY = "SphereGuide/amed"
    FUNCTION = "sigmas"
    RETURN_TYPES = ("SIGMAS",)
    RETURN_NAMES = ("sigmas",)
    OUTPUT_TOOLTIPS = ("For SamplerCustom or SamplerCustomAdvanced.",)
    SEARCH_ALIASES = ["amed", "scheduler", "few steps", "learned schedule"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "predictor": ("AMED_PREDICTOR", {"tooltip": "From Load AMED Predictor or Train AMED Predictor."}),
                "model": (
                    "MODEL",
                    {"tooltip": "The model that will be sampled: one that the predictor was trained for."},
                ),
                "points": (
                    list(POINTS),
                    {"tooltip": "base: for AMED Sampler. expanded: for stock samplers, one model call a step."},
                ),
            },
            "optional": {
                "positive": (
                    "CONDITIONING",
                    {
                        "tooltip": (
                            "For expanded, with negative and latent: the times are those of a trajectory of this "
                            "prompt. Without them they are those of the training."
                        )
                    },
                ),
                "negative": ("CONDITIONING", {"tooltip": "For expanded, with positive and latent."}),
                "latent": ("LATENT", {"tooltip": "For expanded, with positive and negative: size and batch."}),
            },
        }

    def sigmas(
        self,
        predictor: AMEDPredictor,
        model: Any,
        points: str,
        positive: Any = None,
        negative: Any = None,
        latent: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        settings, most = predictor.settings, float(model.get_model_object("model_sampling").sigma_max)
        if settings.sigmas[0] > 1.01 * most:
            raise ValueError(
                f"AMED Scheduler: the predictor begins at sigma {settings.sigmas[0]:.4g}, and this model ends at "
                f"{most:.4g}: it is for another kind of model. Train one for this."
            )
        fits = "It was trained for this model."
        if found := "; ".join(mismatches(predictor, model, None)):
            fits = f"It was trained for something else: this model has {found}. Train one for this."
            log.warning(
                "AMED Scheduler: the predictor was trained for something else: this model has %s. Train one for this.",
                found,
            )
        report = f"{predictor.about()}\n{fits}"
        if points == "base":
            return {"ui": {"text": [report]}, "result": (base_sigmas(predictor),)}
        given = [value is not None for value in (positive, negative, latent)]
        if any(given) and not all(given):
            raise ValueError("AMED Scheduler: a probe takes positive, negative and latent. Connect all three, or none.")
        midpoints = settings.midpoints
        if latent is not None:
            _shape(model, latent, "AMED Scheduler")  # for its errors
            guider = comfy.samplers.CFGGuider(model)
            guider.set_conds(positive, negative)
            guider.set_cfg(predictor.settings.cfg)
            midpoints = probed_midpoints(predictor, guider, host.fitted(model, latent))
        return {"ui": {"text": [report]}, "result": (expanded_sigmas(predictor, midpoints),)}


class AMEDSampler:
    DESCRIPTION = (
        "Samples with a predictor: two model calls a step, at times that it chooses for each picture; of epd more, and "
        "the same for all. For the sigmas of AMED Scheduler (base); steps of other sigmas are made without the "
        "predictor, and the log says so. AMED, Zhou et al., CVPR 2024, arXiv 2312.00094; EPD-Solver, Zhu et al., ICCV "
        "2025, arXiv 2507.14797."
    )
    CATEGORY = "SphereGuide/amed"
    FUNCTION = "sampler"
    RETURN_TYPES = ("SAMPLER",)
    RETURN_NAMES = ("sampler",)
    OUTPUT_TOOLTIPS = ("For SamplerCustom or SamplerCustomAdvanced, with the sigmas of AMED Scheduler.",)
    SEARCH_ALIASES = ["amed", "few steps", "fast sampler", "learned solver"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        predictor = ("AMED_PREDICTOR", {"tooltip": "From Load AMED Predictor or Train AMED Predictor."})
        return {"required": {"predictor": predictor}}

    def sampler(self, predictor: AMEDPredictor) -> tuple[comfy.samplers.KSAMPLER]:
        return (amed_sampler(predictor),)


def _file(name: str, title: str, kind: str = "") -> Path:
    """models/amed/<name><kind>.safetensors. Raises ValueError, for the node of that title, for a name that is none."""
    folder = Path(folder_paths.models_dir, FOLDER).resolve()
    name = name.encode(errors="replace").decode()  # half a character stops the host that reports it
    usable = len(name.encode()) <= 200 and not set(name) & set('<>:"|?*\\') and (name.isprintable() or not name)
    path = (folder / f"{name.strip()}{kind}.safetensors").resolve() if usable else folder
    if folder not in path.parents or path.name.startswith("."):
        raise ValueError(
            f"{title}: '{shortened(name, 200)}' is no name for a file in models/{FOLDER}. Take letters, such as toy_6."
        )
    return path


def _shape(model: Any, latent: dict[str, Any], title: str) -> tuple[int, ...]:
    """Of one latent. Raises ValueError, for the node of that title, for one that is not this model's."""
    shape = tuple(host.fitted(model, latent).shape[1:])
    channels = model.model.latent_format.latent_channels
    if shape[0] != channels:
        raise ValueError(
            f"{title}: the latent has {shape[0]} channels, and the model's have {channels}. Connect an empty latent "
            "that is made for this model."
        )
    if len(shape) - 1 > host.latent_dimensions(model):
        raise ValueError(
            f"{title}: the latent is a video, and the model draws images. Connect an empty latent that is made for "
            "this model."
        )
    return shape


def _shown(model: Any) -> Any:
    """Says on the page how far the training is: the bar, and as its preview the latest latents, loss and time left."""
    bar, previewer = comfy.utils.ProgressBar(1), host.previewer(model)

    def show(progress: Progress) -> None:
        width, picture = 256, Image.new("RGB", (64, 64))
        if previewer is not None:
            picture = previewer.decode_latent_to_preview(progress.latents[:1])
        preview = Image.new("RGB", (width, width * picture.height // picture.width + 44))
        preview.paste(picture.resize((width, preview.height - 44)))
        ImageDraw.Draw(preview).text((6, preview.height - 38), str(progress), fill="white", spacing=6)
        bar.update_absolute(progress.iteration, progress.iterations, ("JPEG", preview, None))
        progress.log()

    return show


def said(predictor: AMEDPredictor) -> str:
    """What a training came to, in words."""
    settings = predictor.settings
    worth = (
        f"That is {settings.ratio:.0%} of what {settings.student} alone is off."
        if settings.ratio < 1
        else f"{settings.student} alone is nearer, with {settings.student_error:.4g}: don't use this one. Take more "
        "trajectories, or a lower learning rate."
    )
    middles = ", ".join(f"{sigma:.3g}" for sigma in settings.midpoints)
    return (
        f"{settings.student} with {settings.nfe} model calls comes out {settings.error:.4g} (RMSE of a sample) off "
        f"its teacher, on noise that it was not trained on. {worth}\nBetween sigma "
        f"{', '.join(f'{sigma:.3g}' for sigma in settings.sigmas)} it asks at {middles} on the average."
    )


def curves(history: History, settings: AMEDSettings, figure: Figure) -> Tensor:
    """IMAGE `[1, 400, 1000, 3]`: the loss at each time point, and the error beside the student's own."""
    losses, errors = figure.subplots(1, 2)
    each = np.array(history.losses)
    for place, values in enumerate(each.T):
        sigma = settings.sigmas[place + 1] if place + 1 < settings.steps else 0
        losses.plot(np.arange(1, len(values) + 1), values, linewidth=1, label=f"at sigma {sigma:.3g}")
    losses.set(title="loss", xlabel="iteration", yscale="log")
    iterations, found = zip(*history.errors, strict=True)
    errors.plot(iterations, found, marker=".", color="#2f7fb8", label=f"{settings.student} with predictor")
    if math.isfinite(history.student_error):
        errors.axhline(history.student_error, color="#c4553b", label=f"{settings.student} alone")
    errors.set(title="off the teacher (RMSE of a sample, other noise)", xlabel="iteration", ylim=(0, None))
    for axes in (losses, errors):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return drawn(figure)


NODES = {
    "SphereGuideAMEDTrain": (AMEDTrain, "Train AMED Predictor"),
    "SphereGuideAMEDLoad": (AMEDLoad, "Load AMED Predictor"),
    "SphereGuideAMEDSave": (AMEDSave, "Save AMED Predictor"),
    "SphereGuideAMEDScheduler": (AMEDScheduler, "AMED Scheduler"),
    "SphereGuideAMEDSampler": (AMEDSampler, "AMED Sampler"),
}
