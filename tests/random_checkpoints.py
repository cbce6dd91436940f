"""Checkpoints of the published layouts with random weights: files that the host's own loaders recognise.

They are as small as the hosts' detection permits. It reads the width of a U-Net and how many transformer blocks it has
at each place, but not how often the width doubles, so that it stays at 320; an SD3 of depth 1 is 64 wide. The text
encoders and the VAE have no size but their own: much of them is zero, and a hole in the file.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.ops
import comfy.supported_models
import torch
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy.ldm.modules.diffusionmodules.model import Decoder, Encoder
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from tiny_models import MMDIT, SD15, SDXL, Architecture
from torch import Tensor

LARGE = {"model_channels": 320, "use_temporal_attention": False, "num_res_blocks": [1], "channel_mult": [1]}
ONE = {"transformer_depth": [1], "transformer_depth_output": [1, 0], "transformer_depth_middle": 1}
XL = {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 1, 1],
    "transformer_depth": [0, 0, 2, 2, 10, 10],  # by which it is known
    "transformer_depth_output": [0] * 9,
    "transformer_depth_middle": 1,
    "context_dim": 2048,
    "adm_in_channels": 2816,
    "num_heads": -1,
    "num_head_channels": 64,
}
CONTEXT = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64}}
THREE = {"depth": 1, "adm_in_channels": 2048, "context_embedder_config": CONTEXT, "pos_embed_scaling_factor": None}
TEXT = {"clip_l": "sd1_clip_config.json", "clip_g": "clip_config_bigg.json"}  # of the host


@dataclass(frozen=True)
class Layout:
    """A published checkpoint: its diffusion model, its text encoders, and the channels of its latents."""

    model: Architecture
    text: tuple[str, ...]
    channels: int = 4


LAYOUTS = {
    "sd15": Layout(Architecture("SD15", {**SD15, **LARGE, **ONE, "num_heads": 8, "context_dim": 768}), ("clip_l",)),
    "sdxl": Layout(Architecture("SDXL", {**SDXL, **LARGE, **XL}), ("clip_l", "clip_g")),
    "sd3": Layout(Architecture("SD3", {**MMDIT, **THREE}), ("clip_l",), 16),
}


def write(layout: Layout, path: Path) -> None:
    """What no test looks at stays zero: the layers of the text encoders, and the encoder of the VAE."""
    config = getattr(comfy.supported_models, layout.model.config)(layout.model.network)
    text = {f"{name}.transformer.{key}": value for name in layout.text for key, value in encoder(name).items()}
    tensors = {
        **config.process_unet_state_dict_for_saving(diffusion_model(layout.model)),
        **config.process_vae_state_dict_for_saving(autoencoder(layout.channels)),
        **config.process_clip_state_dict_for_saving(text),
    }
    save(tensors, path, holes=(".layers.", ".resblocks.", ".encoder."))


def diffusion_model(architecture: Architecture) -> dict[str, Tensor]:
    network = {"SD3": OpenAISignatureMMDITWrapper}.get(architecture.config, UNetModel)
    operations = comfy.ops.disable_weight_init
    with torch.inference_mode():
        return network(**architecture.network, device="meta", operations=operations).state_dict()


def encoder(name: str) -> dict[str, Tensor]:
    config = json.loads(Path(comfy.clip_model.__file__).with_name(TEXT[name]).read_text(encoding="utf-8"))
    operations = comfy.ops.disable_weight_init
    with torch.inference_mode():
        return comfy.clip_model.CLIPTextModel(config, torch.float32, "meta", operations).state_dict()


def autoencoder(channels: int) -> dict[str, Tensor]:
    """The one with 4 channels has a layer on each side of the latent, the later ones have none."""
    sizes: dict[str, Any] = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": []}
    sizes |= {"z_channels": channels, "double_z": True, "resolution": 256, "in_channels": 3, "out_ch": 3}
    with torch.inference_mode(), torch.device("meta"):
        network = torch.nn.ModuleDict({"encoder": Encoder(**sizes), "decoder": Decoder(**sizes)})
        if channels == 4:
            network["quant_conv"] = torch.nn.Conv2d(8, 8, 1)
            network["post_quant_conv"] = torch.nn.Conv2d(4, 4, 1)
        return network.state_dict()


def save(tensors: dict[str, Tensor], path: Path, holes: tuple[str, ...]) -> None:
    """A safetensors file of these shapes in half precision.

    Keys with one of `holes` in them are zero, and take no room. The others, which are hundreds of millions of numbers,
    repeat a million random ones.
    """
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).half()
    header, end = {}, 0
    for key, value in tensors.items():
        start, end = end, end + 2 * value.numel()
        header[key] = {"dtype": "F16", "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        begin = file.tell()
        for key, value in tensors.items():
            if any(hole in key for hole in holes):
                continue
            # As `tiny_models.initialise` does it
            scaled = noise * value[0].numel() ** -0.5 if value.ndim > 1 else noise * 0.1 + 0.5
            file.seek(begin + header[key]["data_offsets"][0])
            for first in range(0, value.numel(), len(noise)):
                scaled[: value.numel() - first].numpy().tofile(file)
        file.truncate(begin + end)
