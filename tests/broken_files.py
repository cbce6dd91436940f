"""Files as people come to have them: cut short, of another network, without what belongs to them."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bootstrap import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from sphereguide.models.classifier import NoisyLatentClassifier
from torch import Tensor

__all__ = ["write_broken_files", "write_networks", "write_pictures", "write_resnet"]

OWN = ROOT / "demo" / "weights"
TOY = "toy_portraits"
SETTINGS = {"noise_aware": True, "architecture": "NoisyLatentClassifier"}


def write_broken_files(base: Path) -> None:
    """Below the folder of a server: `models` as people come to have them, and latents of all kinds in `input`."""
    models = base / "models"

    def file(path: str, content: bytes | str | dict[str, Any]) -> None:
        """Bytes; text; tensors; or JSON."""
        target = models / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values()):
            save_file(content, target)
        else:
            content = json.dumps(content) if isinstance(content, dict) else content
            target.write_bytes(content if isinstance(content, bytes) else content.encode())

    def toy(kind: str, name: str, without: tuple[str, ...] = (), **config: Any) -> None:
        """Toy Portraits' network of that kind without some files, and with other entries in its configuration."""
        target = models / kind / name
        shutil.copytree(OWN / kind / TOY, target, ignore=shutil.ignore_patterns(*without), dirs_exist_ok=True)
        for path in (target / "config.json", target / "open_clip_config.json"):
            if path.exists():
                path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **config}))

    other = {"other.weight": torch.zeros(2)}

    file("vgg/page.pth", b"<html>Not found</html>")
    file("vgg/cut.safetensors", b"\x10")
    file("vgg/another.safetensors", other)
    torch.save([1, 2], models / "vgg" / "list.pth")

    clip = json.loads((OWN / "open_clip" / TOY / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
    words = {**clip["text_cfg"], "hf_tokenizer_name": "somebody/words"}
    file("open_clip/without_config/model.safetensors", other)
    file("open_clip/half/open_clip_config.json", {"embed_dim": 64, "vision_cfg": {}})
    file("open_clip/cut/open_clip_config.json", "{")
    toy("open_clip", "without_weights", without=("*.safetensors",))
    toy("open_clip", "strange", model_cfg={**clip, "vision_cfg": {**clip["vision_cfg"], "size_of_image": 64}})
    toy("open_clip", "without_tokenizer", model_cfg={**clip, "text_cfg": words})
    toy("open_clip", "cut_tokenizer", model_cfg={**clip, "text_cfg": words})
    file("open_clip/cut_tokenizer/tokenizer.json", "{")
    file("open_clip/cut_tokenizer/tokenizer_config.json", "{")
    toy("open_clip", "far_tokenizer", model_cfg={**clip, "text_cfg": words})
    file("open_clip/far_tokenizer/tokenizer.json", "{}")
    file("open_clip/far_tokenizer/tokenizer_config.json", {"tokenizer_file": "../../../secret.json"})
    far = {**clip["text_cfg"], "tokenizer_kwargs": {"bpe_path": "../../../secret.gz"}}
    toy("open_clip", "far_vocabulary", model_cfg={**clip, "text_cfg": far})
    toy("open_clip", "mixed", without=("*.safetensors",))
    file("open_clip/mixed/open_clip_model.safetensors", other)
    toy("open_clip", "program", without=("*.safetensors",))
    torch.jit.script(torch.nn.Linear(2, 2)).save(models / "open_clip" / "program" / "ViT-B-32.pt")
    file("open_clip/mine.safetensors", other)

    two_skins = {f"{i}": label for i, label in enumerate(["background", "skin", "hair", "skin", "a", "b", "c"])}
    file("segmentation/weights.safetensors", other)
    toy("segmentation", "two_skins", id2label=two_skins, label2id={})
    toy("segmentation", "without_palette", palette=None)
    toy("segmentation", "short_palette", palette=["#ff0000"])
    toy("segmentation", "without_preprocessor", without=("preprocessor_config.json",))
    toy("segmentation", "many_labels", num_labels=10**9)
    toy("segmentation", "in_parts", backbone="some/body")
    toy("segmentation", "large_input")
    file("segmentation/large_input/preprocessor_config.json", {"size": 10**6})
    toy("segmentation", "backbone", without=("*.safetensors",))
    weights = load_file(OWN / "segmentation" / TOY / "model.safetensors")
    backbone = {name: value for name, value in weights.items() if not name.startswith("decode_head")}
    save_file(backbone, models / "segmentation" / "backbone" / "model.safetensors", {"format": "pt"})
    toy("segmentation", "half", without=("*.safetensors",))
    file("segmentation/half/model.safetensors", b"\x10")
    file("segmentation/text/config.json", {"model_type": "gpt2"})
    file("segmentation/text/model.safetensors", other)

    file("classifiers/resnet18.safetensors", other)
    file("classifiers/resnet18_of_many.safetensors", {"fc.weight": torch.zeros(10**12, 0)})
    noisy = {
        "noisy": (4, ["a", "b"]),
        "noisy_8": (8, ["a", "b"]),
        "noisy_one": (4, ["a"]),
        "noisy_numbers": (4, [1, 2]),
    }
    for name, (channels, labels) in noisy.items():
        settings = {"in_channels": channels, "labels": labels, "width": 8, "channel_mult": [1], "blocks": 1}
        file(f"classifiers/{name}/config.json", {**SETTINGS, **settings})
        file(f"classifiers/{name}/model.safetensors", NoisyLatentClassifier(**settings).state_dict())
    file("classifiers/noisy_of_tomorrow/config.json", {**SETTINGS, "architecture": "TomorrowsClassifier"})
    file("classifiers/noisy_without_labels/config.json", {**SETTINGS, "in_channels": 4})
    file("classifiers/noisy_without_labels/model.safetensors", other)

    face = json.loads((OWN / "face_encoders" / TOY / "config.json").read_text(encoding="utf-8"))
    toy("face_encoders", "of_tomorrow", architecture="tomorrow_net")
    toy("face_encoders", "without_weights", without=("*.safetensors",))
    toy("face_encoders", "grey", pretrained_cfg={**face["pretrained_cfg"], "input_size": [1, 96, 96]})
    weights = load_file(OWN / "face_encoders" / TOY / "model.safetensors")
    weights["conv_stem.weight"] = weights["conv_stem.weight"][:, :1].contiguous()
    save_file(weights, models / "face_encoders" / "grey" / "model.safetensors")
    toy("face_encoders", "fetching", model_args={"pretrained": True})
    toy("face_encoders", "newer", model_args={"warp": 9})
    file("face_encoders/cut/config.json", "{")
    file("face_encoders/list/config.json", "[]")

    # The settings of a predictor lie in the header of its file.
    own = OWN / "amed" / "toy_portraits_ipndm_4.safetensors"
    header = _header(own)
    settings = json.loads(header["settings"])
    predictor = load_file(own)
    file("amed/page.safetensors", b"<html>Not found</html>")
    file("amed/another.safetensors", other)
    for name, changes in {"of_tomorrow": {"warp": 9}, "afs": {"afs": True}, "mine.training": {}}.items():
        save_file(
            predictor, models / "amed" / f"{name}.safetensors", {**header, "settings": json.dumps(settings | changes)}
        )
    save_file(predictor, models / "amed" / "spoilt.training.safetensors", {**header, "training": "{"})
    save_file({k: v * torch.nan for k, v in predictor.items()}, models / "amed" / "nan.safetensors", header)

    unet = load_file(OWN / "toy_portraits_unet.safetensors")
    file("loras/nan.safetensors", {"lora_unet_out_2.diff": torch.full_like(unet["out.2.weight"], torch.nan)})
    file("vae/stage_c.safetensors", {"blocks.11.num_batches_tracked": torch.tensor(0)})

    noise = torch.randn(16, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = {"real": noise[:8, :4], "16_channels": noise[:8], "flat": torch.ones(8, 4, 8, 8), "sound": noise[0]}
    latents |= {"video": noise[:8].unflatten(1, (4, 4)), "pixel": noise[:8, :4, :1, :1]}
    for name, samples in latents.items():
        version = {"latent_format_version_0": torch.tensor([])}
        save_file({"latent_tensor": samples.contiguous(), **version}, base / "input" / f"{name}.latent")


def write_pictures(folder: Path) -> None:
    """`portrait.png`, and `faces.png` with two faces on it."""
    shutil.copy(ROOT / "workflows" / "sphereguide_portrait.png", folder / "portrait.png")
    if importlib.util.find_spec("skimage") is not None:
        from skimage import data

        Image.fromarray(np.concatenate([data.astronaut()[:256, 100:356]] * 2, 1)).save(folder / "faces.png")


def write_networks(models: Path) -> None:
    """With random weights, those that Toy Portraits lacks: VGG19, torchvision's ResNet18, a noise-aware classifier."""
    from torchvision.models import resnet18
    from torchvision.models.vgg import cfgs, make_layers

    noisy = {"in_channels": 4, "labels": ["a", "b"], "width": 8, "channel_mult": [1], "blocks": 1}
    for folder in ("vgg", "classifiers/noisy"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        features = make_layers(cfgs["E"], batch_norm=False).state_dict()
        save_file({f"features.{name}": value for name, value in features.items()}, models / "vgg" / "vgg19.safetensors")
        resnet = resnet18(weights=None, num_classes=3).state_dict()
        save_file(resnet, models / "classifiers" / "resnet18_3.safetensors")
        save_file(NoisyLatentClassifier(**noisy).state_dict(), models / "classifiers" / "noisy" / "model.safetensors")
    (models / "classifiers" / "noisy" / "config.json").write_text(json.dumps({**SETTINGS, **noisy}))


def write_resnet(folder: Path) -> None:
    """An open_clip model whose image tower has no blocks."""
    import open_clip

    config = json.loads((OWN / "open_clip" / TOY / "open_clip_config.json").read_text(encoding="utf-8"))
    config["model_cfg"]["vision_cfg"] = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16}
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(open_clip.CustomTextCLIP(**config["model_cfg"]).state_dict(), folder / "open_clip_model.safetensors")


def _header(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()
