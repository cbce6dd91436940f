"""Small networks of real architectures with random weights, made as ComfyUI makes its own: in inference mode."""

from __future__ import annotations

from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import torch
from comfy.taesd.taesd import TAESD
from torch import nn

CPU = torch.device("cpu")


def initialise(module: nn.Module, seed: int = 0) -> None:
    """ComfyUI's layers leave their weights uninitialised, and SD's zero-initialised ones would hide a gradient."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
        else:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + 0.5)


SD15: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 16,
    "num_heads": 4,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "dtype": torch.float32,
}


def sd15(**overrides: Any) -> comfy.model_patcher.ModelPatcher:
    """A MODEL of SD1.5's layout: cross-attention at each of its first resolutions, ε-prediction, SD15 latents."""
    unet_config = {**SD15, **overrides}

    class Config(comfy.supported_models.SD15):
        pass

    Config.unet_config = unet_config
    Config.unet_extra_config = {}
    with torch.inference_mode():
        model = comfy.model_base.BaseModel(Config(unet_config))
        initialise(model.diffusion_model)
        model.eval()
        return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def controlnet() -> comfy.controlnet.ControlNet:
    """A ControlNet for `sd15()`."""
    with torch.inference_mode():
        config = {key: value for key, value in SD15.items() if key not in ("out_channels", "transformer_depth_output")}
        network = comfy.cldm.cldm.ControlNet(hint_channels=3, operations=comfy.ops.disable_weight_init, **config)
        initialise(network)
        network.eval()
        return comfy.controlnet.ControlNet(network, load_device=CPU)


def conditioning(tokens: int = 7, dim: int = 16, seed: int = 1) -> list[list[Any]]:
    with torch.inference_mode():
        return [[torch.randn(1, tokens, dim, generator=torch.Generator().manual_seed(seed)), {}]]


class TinyVAE:
    """As much of `comfy.sd.VAE` as decoding with a gradient takes, around a TAESD of random weights."""

    vae_dtype = torch.float32
    device = CPU

    def __init__(self) -> None:
        with torch.inference_mode():
            self.first_stage_model = TAESD().eval()
            initialise(self.first_stage_model)
            self.patcher = comfy.model_patcher.ModelPatcher(self.first_stage_model, CPU, CPU)

    @staticmethod
    def memory_used_decode(shape: Any, dtype: torch.dtype) -> float:
        return 0.0

    @staticmethod
    def process_output(image: torch.Tensor) -> torch.Tensor:
        return torch.clamp((image + 1.0) / 2.0, min=0.0, max=1.0)
