"""Guidance towards the style of a picture."""

from __future__ import annotations

from typing import Any

import comfy.model_management
from torch import Tensor

from ..losses.style import StyleGram, VGGLayers, ViTBlocks, weighted
from ..models.clip_model import OpenCLIP
from ..models.network import choices, managed, models_folder, path_of, shortened
from ..models.pretrained import LoadedNetwork
from ..models.vgg import VGG_URL, load_vgg
from .images import from_image
from .loss_node import LossNode

FOLDER = "vgg"
EMPTY = f"models/{FOLDER} is empty"

models_folder(FOLDER)


class LoadVGG:
    DESCRIPTION = "Loads torchvision's VGG19, whose feature maps tell styles apart, for Style Gram Loss."
    CATEGORY = "SphereGuide/loaders"
    FUNCTION = "load"
    RETURN_TYPES = ("VGG_FEATURES",)
    RETURN_NAMES = ("vgg",)
    OUTPUT_TOOLTIPS = ("For Style Gram Loss.",)
    SEARCH_ALIASES = ["vgg19", "style transfer", "perceptual"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "name": (
                    choices(FOLDER) or [EMPTY],
                    {"tooltip": f"torchvision's weights file in models/{FOLDER}: vgg19-dcbb9e9d.pth."},
                )
            }
        }

    def load(self, name: str) -> tuple[LoadedNetwork]:
        title = "Load VGG Features"
        path = path_of(FOLDER, name, title, f"Put {VGG_URL} there. Then press R in ComfyUI.")
        return (LoadedNetwork(managed(load_vgg(path, title))),)


class StyleGramLoss(LossNode):
    DESCRIPTION = (
        "Guides the sampler to the style of a picture: its colours, strokes and textures, wherever they lie. Compares "
        "Gram matrices of feature maps, of open_clip's vision transformer as DSG and FreeDoM do, or of VGG19."
    )
    SEARCH_ALIASES = ["style", "gram matrix", "style transfer", "texture", "painting", "vgg"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "style": (
                    "IMAGE",
                    {
                        "tooltip": (
                            "A picture of the style, of any size. Of a batch, the Gram matrices are averaged, and "
                            "guide each picture alike."
                        )
                    },
                ),
                "clip_layers": (
                    "STRING",
                    {
                        "default": "3",
                        "tooltip": (
                            "Blocks of open_clip's vision transformer, counted from 1, with weights if you like: "
                            "'2, 3:0.5'. Early ones see colours and strokes, late ones things. 3 is the papers' choice."
                        ),
                    },
                ),
                "vgg_layers": (
                    "STRING",
                    {
                        "default": "relu1_1, relu2_1, relu3_1, relu4_1, relu5_1",
                        "tooltip": (
                            "Layers of VGG19, with weights if you like: 'relu1_1, relu2_1:0.5'. From fine to coarse; "
                            "these five are the usual choice, after Gatys et al."
                        ),
                    },
                ),
                "vgg_size": (
                    "INT",
                    {
                        "default": 256,
                        "min": 32,
                        "max": 2048,
                        "step": 8,
                        "tooltip": (
                            "For VGG19: both pictures are scaled to this shorter side, in pixels. Smaller is faster, "
                            "and sees coarser strokes."
                        ),
                    },
                ),
            },
            "optional": {
                "open_clip_model": (
                    "OPEN_CLIP_MODEL",
                    {"tooltip": "From Load open_clip Model, such as ViT-B-16. Connect this or vgg."},
                ),
                "vgg": ("VGG_FEATURES", {"tooltip": "From Load VGG Features. Connect this or open_clip_model."}),
            },
        }

    def make(
        self,
        style: Tensor,
        clip_layers: str,
        vgg_layers: str,
        vgg_size: int,
        open_clip_model: OpenCLIP | None = None,
        vgg: LoadedNetwork | None = None,
    ) -> tuple[StyleGram]:
        if (open_clip_model is None) == (vgg is None):
            raise ValueError(
                f"Style Gram Loss: {'neither' if vgg is None else 'both'} of open_clip_model and vgg connected. "
                "Connect one: Load open_clip Model or Load VGG Features."
            )
        if vgg is not None:
            layers = _layers("vgg_layers", vgg_layers, vgg.network.names)
            patcher, features = vgg.patcher, VGGLayers(vgg.network, [name for name, _ in layers], vgg_size)
        else:
            tower, depth = open_clip_model.tower, ViTBlocks.depth(open_clip_model.tower)
            if depth == 0:
                raise ValueError(
                    f"Style Gram Loss: the image tower of {open_clip_model.name} is no vision transformer, and has no "
                    "blocks to look at. Load a ViT, such as ViT-B-16, or connect vgg instead."
                )
            layers = _layers("clip_layers", clip_layers, [str(i) for i in range(1, depth + 1)])
            patcher, features = open_clip_model.image, ViTBlocks(tower, [int(name) for name, _ in layers])
        comfy.model_management.load_models_gpu([patcher])
        loss = StyleGram(features, [weight for _, weight in layers], from_image(style))
        loss.patchers = (patcher,)
        return (loss,)


def _layers(setting: str, text: str, names: list[str]) -> list[tuple[str, float]]:
    """The layers that the setting names, all of which the network must have."""
    try:
        layers = weighted(text)
    except ValueError as error:
        raise ValueError(f"Style Gram Loss: {setting}: {shortened(error)}") from error
    unknown = [name for name, _ in layers if name not in names]
    if unknown:
        raise ValueError(
            f"Style Gram Loss: {setting}: this network has no layer '{shortened(unknown[0], 200)}'. It has "
            f"{', '.join(names)}."
        )
    return layers


NODES = {
    "SphereGuideLoadVGG": (LoadVGG, "Load VGG Features"),
    "SphereGuideStyleGramLoss": (StyleGramLoss, "Style Gram Loss"),
}
