"""Guidance by a classifier, and its loader."""

from __future__ import annotations

from typing import Any

from ..losses.classifier import Classification
from ..models import classifier
from ..models.network import choices, models_folder, path_of
from ..models.pretrained import LoadedNetwork, class_index
from .loss_node import LossNode

FOLDER = "classifiers"
EMPTY = f"models/{FOLDER} is empty"
WHERE = (
    "Put a weights file of torchvision there, such as https://download.pytorch.org/models/resnet50-11ad3fa6.pth, or a "
    "folder of timm or transformers (config.json, model.safetensors), such as "
    "https://huggingface.co/timm/resnet50.a1_in1k."
)

models_folder(FOLDER)


class LoadImageClassifier:
    DESCRIPTION = (
        "Loads a network that names what an image shows, for Classifier Loss: a weights file of torchvision, or a "
        "folder of timm or transformers, in models/classifiers. Nothing is downloaded."
    )
    SEARCH_ALIASES = ["image classifier", "imagenet", "timm", "torchvision", "vit", "resnet"]
    CATEGORY = "SphereGuide/loaders"
    FUNCTION = "load"
    RETURN_TYPES = ("IMAGE_CLASSIFIER", "STRING")
    RETURN_NAMES = ("classifier", "labels")
    OUTPUT_TOOLTIPS = ("For Classifier Loss.", "The names of its classes, one a line, for a node that shows text.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "name": (
                    choices(FOLDER) or [EMPTY],
                    {"tooltip": "A file or a folder (with / behind it) in models/classifiers."},
                ),
                "architecture": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": (
                            "For a weights file of torchvision whose name does not begin with its architecture: "
                            "resnet50, vit_b_16 …. Leave empty otherwise. Folders say it themselves."
                        ),
                    },
                ),
            }
        }

    def load(self, name: str, architecture: str = "") -> tuple[LoadedNetwork, str]:
        title = "Load Image Classifier"
        path = path_of(FOLDER, name, title, WHERE)
        loaded = classifier.load(path, architecture, title)
        return loaded, "\n".join(loaded.network.labels)


class ClassifierLoss(LossNode):
    DESCRIPTION = (
        "Steers towards images that a classifier takes for one class, such as a dog breed or a style. Classifiers that "
        "were trained on noisy latents are asked about the noisy latent itself, and need no VAE."
    )
    SEARCH_ALIASES = ["classifier guidance", "class", "imagenet", "adm", "category"]
    OUTPUT_TOOLTIPS = (
        "For the loss input of a guidance node. That node needs the VAE too, unless the classifier is noise-aware.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "classifier": ("IMAGE_CLASSIFIER", {"tooltip": "From Load Image Classifier."}),
                "class_name": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": (
                            "What to steer towards: one of the classifier's labels, or its number, counted from 0. The "
                            "loader's labels output lists them; a name that is not there is answered with close ones."
                        ),
                    },
                ),
            }
        }

    def make(self, classifier: LoadedNetwork, class_name: str) -> tuple[Classification]:
        index = class_index(classifier.network.labels, class_name, "Classifier Loss")
        return (Classification(classifier.network, index, [classifier.patcher]),)


NODES = {
    "SphereGuideLoadImageClassifier": (LoadImageClassifier, "Load Image Classifier"),
    "SphereGuideClassifierLoss": (ClassifierLoss, "Classifier Loss"),
}
