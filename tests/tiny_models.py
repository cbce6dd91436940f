"""Small networks of real architectures with random weights, made as ComfyUI makes its own: in inference mode."""

from __future__ import annotations

from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Architecture:
    """What ComfyUI would read off a checkpoint of this architecture, in small.

    config      class of `comfy.supported_models`
    network     its `unet_config`
    shape       of one latent, without the batch
    tokens      `(number, channels)` of the prompt
    extra       shapes of what else the text encoder gives
    options     what nodes put into the conditioning
    marks       keys of the checkpoint by which the host tells how it predicts
    prediction  name of a `ModelType`, where checkpoints do not tell
    """

    config: str
    network: dict[str, Any]
    shape: tuple[int, ...] = (4, 8, 8)
    tokens: tuple[int, int] = (7, 16)
    extra: dict[str, tuple[int, ...]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    marks: tuple[str, ...] = ()
    prediction: str | None = None

    @property
    def missing(self) -> str | None:
        """What this host lacks for it."""
        if not hasattr(comfy.supported_models, self.config):
            return f"this ComfyUI has no {self.config} in comfy.supported_models"
        if self.prediction and self.prediction not in comfy.model_base.ModelType.__members__:
            return f"this ComfyUI has no {self.prediction} in comfy.model_base.ModelType"
        return None

    def patcher(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> comfy.model_patcher.ModelPatcher:
        """The MODEL. Made in inference mode, like everything that a node loads."""
        base = getattr(comfy.supported_models, self.config)

        class Config(base):
            unet_extra_config = {}

            def model_type(self, state_dict: dict[str, Any], prefix: str = "") -> comfy.model_base.ModelType:
                if prediction is not None:
                    return comfy.model_base.ModelType[prediction]
                return super().model_type(state_dict, prefix)

        prediction = self.prediction
        with torch.inference_mode():
            config = Config({**base.unet_config, **self.network, "dtype": dtype})
            model = config.get_model({mark: torch.tensor(80.0) for mark in self.marks})
            initialise(model.diffusion_model, seed)
            if self.config == "SD3":  # a buffer that the checkpoint fills
                model.diffusion_model.pos_embed.zero_()
            model.diffusion_model.to(dtype)  # Wan's first layer is in single precision always
            model.eval()
            return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)

    def prompt(self, seed: int = 1) -> list[list[Any]]:
        """A CONDITIONING."""
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode():
            extra = {name: torch.randn(1, *shape, generator=generator) for name, shape in self.extra.items()}
            return [[torch.randn(1, *self.tokens, generator=generator), {**extra, **self.options}]]


SDXL: dict[str, Any] = {
    **SD15,
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1],
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 8 + 6 * 256,  # the pooled prompt, and an embedding of each size
}
SIZES = {"width": 1024, "height": 768, "crop_w": 16, "crop_h": 0, "target_width": 1024, "target_height": 1024}
MMDIT: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "depth": 2,
    "input_size": None,
    "adm_in_channels": 8,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 16, "out_features": 128}},
    "num_patches": 64,
    "pos_embed_max_size": 8,
}
FLUX: dict[str, Any] = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 8,
    "context_in_dim": 16,
    "hidden_size": 64,
    "num_heads": 2,
    "axes_dim": [8, 12, 12],
    "mlp_ratio": 2.0,
    "depth": 1,
    "depth_single_blocks": 2,
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
WAN: dict[str, Any] = {"dim": 64, "ffn_dim": 96, "freq_dim": 32, "text_dim": 16, "num_heads": 2, "num_layers": 2}
LUMINA: dict[str, Any] = {
    "in_channels": 16,
    "dim": 64,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 1,
    "multiple_of": 16,
    "ffn_dim_multiplier": 1.0,
    "qk_norm": True,
    "cap_feat_dim": 16,
    "axes_dims": [8, 12, 12],
    "axes_lens": [32, 32, 32],
}
QWEN: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 12, 12),
}
COSMOS: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "max_img_h": 32,
    "max_img_w": 32,
    "max_frames": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 64,
    "num_blocks": 2,
    "num_heads": 2,
    "crossattn_emb_channels": 16,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True,
    "use_adaln_lora": True,
    "adaln_lora_dim": 16,
}

#: By the names that people know them by.
ARCHITECTURES: dict[str, Architecture] = {
    "SD 1.5": Architecture("SD15", SD15),
    "SDXL": Architecture("SDXL", SDXL, extra={"pooled_output": (8,)}, options=SIZES),
    "Playground 2.5 (SDXL, EDM)": Architecture(
        "SDXL", SDXL, extra={"pooled_output": (8,)}, options=SIZES, marks=("edm_mean", "edm_std")
    ),
    "SD 3": Architecture("SD3", MMDIT, (16, 6, 6), extra={"pooled_output": (8,)}),
    "Flux": Architecture("Flux", FLUX, (16, 6, 6), extra={"pooled_output": (8,)}, options={"guidance": 3.5}),
    "Wan 2.1 (video)": Architecture("WAN21_T2V", WAN, (16, 3, 4, 4)),
    "Cosmos Predict 2 (video)": Architecture("CosmosT2IPredict2", COSMOS, (16, 3, 4, 4)),
    "Lumina 2": Architecture("Lumina2", LUMINA, (16, 6, 6)),
    "Qwen-Image": Architecture("QwenImage", QWEN, (16, 1, 6, 6)),
}


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
