"""Trains a predictor from a shell, in the folder of the pack:

    python -m samplers.amed --checkpoint FILE --prompt TEXT --out FILE [options]
    python -m samplers.amed --diffusion-model FILE --clip FILE … --clip-type flux …
    torchrun --nproc_per_node 2 -m samplers.amed …        each process takes its share of each batch

Processes tell each other by gloo, on GPUs too: what they share is the predictor, which lies on the CPU.

ComfyUI is the checkout that COMFYUI_PATH names, or the one that the pack lies in, or else the package `comfyui`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m samplers.amed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=Path, help="a file that Load Checkpoint reads: model and text encoder")
    model.add_argument("--diffusion-model", type=Path, help="a file that Load Diffusion Model reads; needs --clip")
    model.add_argument("--toy", action="store_true", help="Toy Portraits, which comes with the pack")
    parser.add_argument("--clip", type=Path, nargs="+", help="its text encoders, as Load CLIP takes them")
    parser.add_argument("--clip-type", default="stable_diffusion", help="as Load CLIP's type: sd3, flux …")
    parser.add_argument("--prompt", action="append", help="several take turns")
    parser.add_argument("--prompts", type=Path, help="a file with a prompt a line")
    parser.add_argument("--negative", default="")
    parser.add_argument("--cfg", type=float, default=7.0)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("WIDTH", "HEIGHT"))
    students = ("amed", "euler", "dpm2", "ipndm", "dpmpp", "epd", "epd_ipndm")
    parser.add_argument("--student", default="ipndm", choices=students)
    parser.add_argument("--parallel", type=int, default=2, help="directions in each step of epd and epd_ipndm, 1 to 4")
    parser.add_argument("--steps", type=int, default=3, help="of two model calls each, and of 1 + --parallel with epd")
    schedules = ("polynomial", "logsnr", "time_uniform", "discrete")
    parser.add_argument("--schedule", default="polynomial", choices=schedules)
    parser.add_argument("--rho", type=float, default=0.0, help="0: the schedule's own")
    parser.add_argument("--afs", action="store_true")
    parser.add_argument("--max-order", type=int, default=4)
    parser.add_argument("--scale-dir", type=float, default=0.1)
    parser.add_argument("--scale-time", type=float, default=0.3)
    parser.add_argument("--teacher", default="ipndm", choices=("as published", "heun", "ipndm", "dpmpp"))
    parser.add_argument("--teacher-points", type=int, default=4)
    parser.add_argument("--trajectories", type=int, default=192)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--objective", default="endpoint", choices=("endpoint", "each point"))
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file")
    options = parser.parse_args()
    if options.diffusion_model and not options.clip:
        parser.error("--diffusion-model needs --clip: the files of its text encoders")
    return options


def load(options: argparse.Namespace) -> tuple[Any, Any, Any, tuple[int, ...]]:
    """MODEL, the prompts, the negative one, and the shape of a latent."""
    import comfy.sd
    import torch
    from sphereguide import host
    from sphereguide.demo import toy_portraits

    if options.toy:
        model, clip = toy_portraits.load_model(), toy_portraits.load_clip()
    elif options.diffusion_model:
        model = comfy.sd.load_unet(str(options.diffusion_model))
        kind = comfy.sd.CLIPType[options.clip_type.upper()]
        clip = comfy.sd.load_clip([str(path) for path in options.clip], clip_type=kind)
    else:
        model, clip = comfy.sd.load_checkpoint_guess_config(str(options.checkpoint), output_vae=False)[:2]
    lines = options.prompts.read_text(encoding="utf-8").splitlines() if options.prompts else ()
    prompts = [*(options.prompt or ()), *(line for line in lines if line.strip())]
    width, height = (128, 128) if options.toy else options.size
    latent = host.fitted(model, {"samples": torch.zeros(1, 4, height // 8, width // 8)})
    positive = [entry for text in prompts or [""] for entry in host.encoded(clip, text)]
    return model, positive, host.encoded(clip, options.negative), tuple(latent.shape[1:])


def main() -> None:
    options = arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if "COMFYUI_PATH" not in os.environ and (ROOT.parent.parent / "comfy").is_dir():
        os.environ["COMFYUI_PATH"] = str(ROOT.parent.parent)  # the pack lies in custom_nodes
    sys.path.insert(0, str(ROOT / "demo"))
    from bootstrap import import_host, import_pack

    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    import torch

    cuda = torch.cuda.is_available() and not options.cpu
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # before ComfyUI looks for its own
    import_host(cpu=options.cpu)
    import_pack()
    if world > 1:
        torch.distributed.init_process_group("gloo")

    import comfy.samplers
    from sphereguide.samplers.amed import predictor, training

    with torch.inference_mode():
        model, positive, negative, shape = load(options)
        names = "student", "parallel", "steps", "schedule", "rho", "afs", "max_order", "scale_dir", "scale_time", "cfg"
        settings = training.settings_for(
            model, options.teacher, options.teacher_points, **{name: getattr(options, name) for name in names}
        )
        guider = comfy.samplers.CFGGuider(model)
        guider.set_cfg(options.cfg)
        names = ("trajectories", "epochs", "batch_size", "objective", "learning_rate", "seed", "checkpointing")
        plan = training.Plan(**{name: getattr(options, name) for name in names})
        out = options.out.with_suffix(".safetensors")
        kept = out.with_suffix(".training.safetensors")
        told = training.Progress.log if rank == 0 else lambda _: None
        best, history = training.train(guider, (positive, negative), shape, settings, plan, kept, told)
    if rank == 0:
        predictor.save(best, out)
        print("losses", *(f"{losses[-1]:.9g}" for losses in history.losses))
        print(best.about())
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
