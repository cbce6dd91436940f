"""Architectures of the demo models, out of ComfyUI's own classes. Imports comfy: import this where it is used.

    text (77 tokens) -> two-layer CLIP text model, width 128 -> context [B, 77, 128]
    latent [B, 4, 16, 16] -> UNetModel, 96 channels at 16x16 and at 8x8 -> predicted noise (EPS, SD's betas)

What differs between ComfyUI's versions: keyword arguments of the text classes (passed through here as `**host`) and
`latent_rgb_factors_bias`, which hosts before 2025 ignore.
"""

from __future__ import annotations

import re

import torch
from comfy import latent_formats, model_base, sd1_clip, supported_models_base

from .portraits import vocabulary

__all__ = ["CONTEXT", "WIDTH", "ToyClip", "ToyPortraits", "ToyTokenizer", "WordTokenizer", "latent_format"]

CONTEXT = 77
"""Tokens of a prompt, start and end included: ComfyUI's CLIP classes are built for this many."""
WIDTH = 128
"""Width of the text encoder, and of the U-Net's cross-attention."""

UNKNOWN, START, END = "<unknown>", "<start>", "<end>"
WORDS = (UNKNOWN, *vocabulary(), START, END)
"""All tokens. The end token has the highest number: CLIP finds the pooled output by that."""
SPECIAL = {"start": len(WORDS) - 2, "end": len(WORDS) - 1, "pad": len(WORDS) - 1}
SYNONYMS = {
    "man": "person",
    "woman": "person",
    "boy": "person",
    "girl": "person",
    "happy": "smiling",
    "blond": "blonde",
    "shirt": "top",
    "watercolour": "watercolor",
    "popart": "pop-art",
    "eyeglasses": "glasses",
}


class WordTokenizer:
    """One token a word or comma, of the closed vocabulary of captions; with the interface that SDTokenizer expects."""

    eos_token, eos_token_id = END, SPECIAL["end"]

    def __init__(self) -> None:
        self.ids = {word: i for i, word in enumerate(WORDS)}

    @classmethod
    def from_pretrained(cls, path: str, **kwargs: object) -> WordTokenizer:
        return cls()

    def get_vocab(self) -> dict[str, int]:
        return self.ids

    def __call__(self, text: str) -> dict[str, list[int]]:
        words = re.findall(r"[a-z]+(?:-[a-z]+)*|,", text.lower())
        ids = [self.ids.get(SYNONYMS.get(word, word), 0) for word in words]
        return {"input_ids": [SPECIAL["start"], *ids, SPECIAL["end"]]}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(WORDS[i] for i in ids if not (skip_special_tokens and i >= SPECIAL["start"]))


class ToySDTokenizer(sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory=None, **host):
        super().__init__(
            max_length=CONTEXT,
            embedding_directory=embedding_directory,
            embedding_size=WIDTH,
            tokenizer_class=WordTokenizer,
            **host,
        )


class ToyTokenizer(sd1_clip.SD1Tokenizer):
    """What CLIP.tokenize calls: prompt -> {"l": [[(token, weight), ...]]}, in chunks of 77."""

    def __init__(self, embedding_directory=None, **host):
        super().__init__(embedding_directory=embedding_directory, tokenizer=ToySDTokenizer, **host)


class ToyTextEncoder(sd1_clip.SDClipModel):
    CONFIG = {
        "num_hidden_layers": 2,
        "hidden_size": WIDTH,
        "num_attention_heads": 4,
        "intermediate_size": 4 * WIDTH,
        "hidden_act": "quick_gelu",
        "vocab_size": len(WORDS),
        "eos_token_id": SPECIAL["end"],
        "max_position_embeddings": CONTEXT,
    }

    def __init__(self, device="cpu", dtype=None, textmodel_json_config=None, **host):
        super().__init__(
            device=device,
            dtype=dtype,
            max_length=CONTEXT,
            textmodel_json_config=dict(self.CONFIG),
            special_tokens=SPECIAL,
            **host,
        )
        embeddings = self.transformer.get_input_embeddings()
        if embeddings.weight.shape[0] != len(WORDS):  # newer hosts build CLIP's 49408 tokens whatever the config says
            factory = {"dtype": embeddings.weight.dtype, "device": embeddings.weight.device}
            self.transformer.set_input_embeddings(type(embeddings)(len(WORDS), WIDTH, **factory))


class ToyClip(sd1_clip.SD1ClipModel):
    """The text encoder as comfy.sd.CLIP holds it. Its weights are `clip_l.transformer.*`."""

    def __init__(self, device="cpu", dtype=None, **host):
        super().__init__(device=device, dtype=dtype, clip_model=ToyTextEncoder, **host)


def latent_format(rgb_factors: torch.Tensor, rgb_bias: torch.Tensor) -> type[latent_formats.LatentFormat]:
    """Latents as they come from the VAE, near unit variance; previews are latent · factors [4, 3] + bias [3]."""

    class ToyLatent(latent_formats.LatentFormat):
        scale_factor = 1.0
        latent_channels = 4
        latent_rgb_factors = rgb_factors.tolist()
        latent_rgb_factors_bias = rgb_bias.tolist()

    return ToyLatent


class ToyPortraits(supported_models_base.BASE):
    """The U-Net's configuration: noise prediction with Stable Diffusion's schedule."""

    unet_config = {
        "image_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 96,
        "channel_mult": [1, 1],
        "num_res_blocks": [2, 2],
        "transformer_depth": [0, 0, 1, 1],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [0, 0, 1, 1, 1, 1],  # read from its end: three at 8x8, one at 16x16
        "use_spatial_transformer": True,
        "context_dim": WIDTH,
        "use_linear_in_transformer": False,
        "legacy": False,
    }
    unet_extra_config = {"num_heads": -1, "num_head_channels": 32}

    def __init__(self) -> None:
        super().__init__(self.unet_config)

    def model(self, device: torch.device | str = "cpu") -> model_base.BaseModel:
        """An uninitialised model in float32: 5 million weights need no half precision."""
        self.set_inference_dtype(torch.float32, None)
        return self.get_model({}, device=device)
