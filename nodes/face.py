"""Guidance towards a face."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management
from torch import Tensor

from ..losses.face import DISTANCES, Box, FaceID, square
from ..models.face import FACENET_INSTALL, FACENET_URL, FaceDetector, load_face_encoder
from ..models.network import choices, managed, models_folder, path_of
from ..models.pretrained import LoadedNetwork
from .images import from_image
from .loss_node import LossNode

log = logging.getLogger("sphereguide")

FOLDER = "face_encoders"
EMPTY = f"models/{FOLDER} is empty"
WHERE = (
    f"Put a weights file of facenet-pytorch there, such as 20180402-114759-vggface2.pt from {FACENET_URL}, or a folder "
    "with config.json and model.safetensors of a timm network, such as "
    "https://huggingface.co/gaunernst/vit_tiny_patch8_112.arcface_ms1mv3. Then press R in ComfyUI."
)
CROPS = ("detect", "fixed box", "whole image")
REFERENCES = ("average", "one per sample")
OUTPUTS = ("output", "features")

models_folder(FOLDER)


class LoadFaceEncoder:
    DESCRIPTION = (
        "Loads a face recognition network for FaceID Loss: facenet-pytorch's InceptionResnetV1, from its weights file "
        f"in models/{FOLDER}, or a timm network (ArcFace and its like), from a folder there."
    )
    CATEGORY = "SphereGuide/loaders"
    FUNCTION = "load"
    RETURN_TYPES = ("FACE_ENCODER",)
    RETURN_NAMES = ("face_encoder",)
    OUTPUT_TOOLTIPS = ("For FaceID Loss.",)
    SEARCH_ALIASES = ["facenet", "arcface", "face recognition", "identity", "faceid"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "name": (
                    choices(FOLDER) or [EMPTY],
                    {
                        "tooltip": (
                            f"From models/{FOLDER}: a weights file of facenet-pytorch, such as "
                            "20180402-114759-vggface2.pt, or a folder (with a / behind it) with timm's config.json "
                            "and model.safetensors."
                        )
                    },
                ),
                "embedding": (
                    list(OUTPUTS),
                    {
                        "tooltip": (
                            "Of timm networks. output: what the network returns, the embedding of those that are "
                            "published for faces. features: what enters its last layer, for one that was trained to "
                            "tell a list of people apart."
                        )
                    },
                ),
            }
        }

    def load(self, name: str, embedding: str) -> tuple[LoadedNetwork]:
        title = "Load Face Encoder"
        path = path_of(FOLDER, name, title, WHERE)
        return (LoadedNetwork(managed(load_face_encoder(path, title, features=embedding == "features"))),)


class FaceIDLoss(LossNode):
    DESCRIPTION = (
        "Guides the sampler to the face of a reference picture: the distance between the two, in the eyes of a face "
        "recognition network. Finds faces by itself, or looks where a face has to be."
    )
    SEARCH_ALIASES = ["faceid", "face", "identity", "likeness", "person", "arcface", "portrait"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        share = {"min": 0.0, "max": 1.0, "step": 0.001}
        return {
            "required": {
                "face_encoder": ("FACE_ENCODER", {"tooltip": "From Load Face Encoder."}),
                "image": (
                    "IMAGE",
                    {
                        "tooltip": (
                            "The reference: a picture of the face, or a batch of them. With 'fixed box' and 'whole "
                            "image' framed like the picture that is to be made."
                        )
                    },
                ),
                "references": (
                    list(REFERENCES),
                    {
                        "tooltip": (
                            "average: all show one person, whose mean is sought. one per sample: sample 1 is drawn to "
                            "reference 1, sample 2 to reference 2, and over again where there are fewer."
                        )
                    },
                ),
                "crop": (
                    list(CROPS),
                    {
                        "tooltip": (
                            "Where the face is. detect: found on the reference and, while sampling, on the estimate, "
                            f"with facenet-pytorch ({FACENET_INSTALL}). fixed box: in the box below, on both. whole "
                            "image: everywhere, on both."
                        )
                    },
                ),
                "detect_every": (
                    "INT",
                    {
                        "default": 5,
                        "min": 0,
                        "max": 1000,
                        "tooltip": (
                            "For 'detect': look for the face again after so many guided steps; it takes half a second "
                            "of CPU for each picture. 0: look on the reference only, and take the box below on the "
                            "estimate."
                        ),
                    },
                ),
                "margin": (
                    "FLOAT",
                    {
                        "default": 0.1,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": (
                            "For 'detect': how much more than the detected face to take on each side, as part of its "
                            "size."
                        ),
                    },
                ),
                "box_left": (
                    "FLOAT",
                    {
                        "default": 0.125,
                        **share,
                        "tooltip": (
                            "Left edge of the box, as part of the width. The box is that of 'fixed box', and of "
                            "'detect' until a face is found. As set: the face of an aligned portrait (CelebA-HQ, FFHQ)."
                        ),
                    },
                ),
                "box_top": ("FLOAT", {"default": 0.137, **share, "tooltip": "Its top edge, as part of the height."}),
                "box_right": ("FLOAT", {"default": 0.859, **share, "tooltip": "Its right edge, as part of the width."}),
                "box_bottom": (
                    "FLOAT",
                    {"default": 0.871, **share, "tooltip": "Its bottom edge, as part of the height."},
                ),
                "distance": (
                    list(DISTANCES),
                    {
                        "tooltip": (
                            "euclidean: the papers' choice. cosine: weaker as the faces get closer. They differ only "
                            "where the size of the gradient counts, which DSG Guidance is free of."
                        )
                    },
                ),
            }
        }

    def make(
        self,
        face_encoder: LoadedNetwork,
        image: Tensor,
        references: str,
        crop: str,
        detect_every: int,
        margin: float,
        box_left: float,
        box_top: float,
        box_right: float,
        box_bottom: float,
        distance: str,
    ) -> tuple[FaceID]:
        box: Box = (box_left, box_top, box_right, box_bottom)
        if crop == "whole image":
            box = (0.0, 0.0, 1.0, 1.0)
        elif box_left >= box_right or box_top >= box_bottom:
            raise ValueError(
                f"FaceID Loss: the box from ({box_left}, {box_top}) to ({box_right}, {box_bottom}) is empty. Left must "
                "be below right, and top below bottom."
            )
        reference = from_image(image)
        detector, boxes = None, [box] * len(reference)
        if crop == "detect":
            detector = FaceDetector("FaceID Loss")
            boxes = _faces(detector, reference, margin)
        comfy.model_management.load_models_gpu([face_encoder.patcher])
        loss = FaceID(
            face_encoder.network,
            reference,
            boxes,
            box=box,
            detector=detector if detect_every else None,
            every=detect_every,
            margin=margin,
            distance=distance,
            average=references == "average",
        )
        loss.patchers = (face_encoder.patcher,)
        return (loss,)


def _faces(detector: FaceDetector, images: Tensor, margin: float) -> list[Box]:
    """The box of the largest face of each image. Raises ValueError for one that shows none."""
    boxes = []
    for i, image in enumerate(images, 1):
        faces = detector(image)
        name = f"reference {i} of {len(images)}" if len(images) > 1 else "the reference"
        if not faces:
            raise ValueError(
                f"FaceID Loss: no face found on {name}. Take a picture that shows one larger and from the front, or "
                "set crop to 'fixed box' or 'whole image'."
            )
        if len(faces) > 1:
            log.warning(
                "FaceID Loss: %s shows %d faces, of which the largest counts. Crop the picture to choose another.",
                *(name, len(faces)),
            )
        boxes.append(square(faces[0], margin, *image.shape[-2:]))
    return boxes


NODES = {
    "SphereGuideLoadFaceEncoder": (LoadFaceEncoder, "Load Face Encoder"),
    "SphereGuideFaceIDLoss": (FaceIDLoss, "FaceID Loss"),
}
