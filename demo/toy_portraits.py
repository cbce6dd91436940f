"""Toy Portraits as ComfyUI objects: MODEL, CLIP and VAE from the safetensors in `demo/weights`.

`load()` is what the node "Load Toy Portraits" returns, and works in any process that can import comfy.
The VAE's file is in TAESD layout, so that the stock VAELoader reads it from `models/vae` as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import comfy.model_patcher
    import comfy.sd
    from torch import Tensor

__all__ = ["WEIGHTS", "load", "load_clip", "load_model", "load_vae", "read"]

WEIGHTS = Path(__file__).parent / "weights"
VAE_FILE = "toy_portraits_vae.safetensors"
UNET_FILE = "toy_portraits_unet.safetensors"
CLIP_FILE = "toy_portraits_clip.safetensors"


def read(name: str, folder: Path = WEIGHTS) -> dict[str, Tensor]:
    """Tensors of one weight file.

    Raises FileNotFoundError or ValueError that name the file and what to do, where it is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / name
    remedy = "Reinstall SphereGuide, or run `git checkout -- demo/weights` in its folder."
    if not path.is_file():
        raise FileNotFoundError(f"The Toy Portraits weights {path} are missing. {remedy}")
    try:
        return load_file(path)
    except SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(f"The Toy Portraits weights {path} are damaged ({size} bytes: {error}). {remedy}") from error


def load_vae(folder: Path = WEIGHTS) -> comfy.sd.VAE:
    """IMAGE [B, 128, 128, 3] <-> LATENT [B, 4, 16, 16]."""
    import comfy.sd

    return comfy.sd.VAE(sd=read(VAE_FILE, folder))


def load_clip(folder: Path = WEIGHTS) -> comfy.sd.CLIP:
    """The text encoder, for the stock CLIPTextEncode."""
    import comfy.sd
    import torch

    from .architecture import ToyClip, ToyTokenizer

    class Target:
        params: dict = {}
        clip = ToyClip
        tokenizer = ToyTokenizer

    with torch.no_grad():  # comfy's text model initialises in place
        clip = comfy.sd.CLIP(Target)
    clip.cond_stage_model.load_state_dict(read(CLIP_FILE, folder))
    return clip


def load_model(folder: Path = WEIGHTS) -> comfy.model_patcher.ModelPatcher:
    """The U-Net, for any sampler node."""
    import comfy.model_management as management
    import comfy.model_patcher

    from .architecture import ToyPortraits, latent_format

    weights = read(UNET_FILE, folder)
    config = ToyPortraits()
    config.latent_format = latent_format(weights.pop("latent_rgb_factors"), weights.pop("latent_rgb_bias"))()
    model = config.model(device=management.unet_offload_device())
    model.diffusion_model.load_state_dict(weights)
    return comfy.model_patcher.ModelPatcher(
        model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


def load(folder: Path = WEIGHTS) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP, VAE."""
    return load_model(folder), load_clip(folder), load_vae(folder)
