"""open_clip models: an image tower and a text tower whose embeddings lie close where picture and text agree."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import logging
import re
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.model_management
import folder_paths
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .network import TooLarge, built, choices, load_weights, managed, models_folder, needs, path_of, shortened
from .pretrained import Refused, check_config, check_numbers, plausible, read_json

__all__ = ["ImageTower", "OpenCLIP", "TextTower", "entries", "load"]

log = logging.getLogger("sphereguide")

TITLE = "Load open_clip Model"
FOLDER = "open_clip"
CONFIG = "open_clip_config.json"
DOWNLOAD = " (download)"
NOTHING = "(put a model into models/open_clip)"
#: What a Hugging Face repository's tokenizer and configuration consist of; the vocabularies go by many names.
SMALL_FILES = ["*.json", "*.txt", "*.model"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")


class ImageTower(nn.Module):
    """Images `[N, 3, H, W]`, nominally in 0..1, to unit embeddings `[N, D]`, float32.

    visual           open_clip's image network, in any floating-point dtype
    image_size       (height, width) of its input in pixels
    mean, std        of its input, per channel
    interpolation    of its resizing: "bicubic" or "bilinear"
    """

    def __init__(
        self,
        visual: nn.Module,
        image_size: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        interpolation: str = "bicubic",
    ) -> None:
        super().__init__()
        self.visual = visual
        self.image_size = image_size
        self.mean = mean
        self.std = std
        self.interpolation = interpolation

    def prepare(self, images: Tensor) -> Tensor:
        """Images as the network wants them: resized with antialiasing, normalised, on its device and in its dtype.

        Other aspects are squeezed. A crop would leave the sides of the picture without a gradient, and a border would
        be judged as part of it; CLIP models have seen squeezed pictures in training, by up to 4:3.
        """
        weight = next(self.visual.parameters())
        images = images.to(device=weight.device, dtype=torch.float32)
        if images.shape[-2:] != self.image_size:
            images = F.interpolate(
                images, size=self.image_size, mode=self.interpolation, antialias=True, align_corners=False
            )
        mean, std = (images.new_tensor(value).reshape(-1, 1, 1) for value in (self.mean, self.std))
        return ((images - mean) / std).to(weight.dtype)

    def forward(self, images: Tensor) -> Tensor:
        return _unit(self.visual(self.prepare(images)))


class TextTower(nn.Module):
    """Texts to unit embeddings `[n, D]`, float32. Longer texts than `context_length` tokens are cut, with a warning."""

    def __init__(self, text: nn.Module, tokenizer: Any, context_length: int) -> None:
        super().__init__()
        self.text = text
        self.tokenizer = tokenizer
        self.context_length = context_length

    def forward(self, texts: list[str]) -> Tensor:
        if cut := [text for text in texts if self.tokens(text) > self.context_length]:
            log.warning(
                "This open_clip model reads %d tokens of a text, and what is beyond them is left out of: %s",
                self.context_length,
                " | ".join(f"{text[:60]}…" for text in cut),
            )
        return _unit(self.text(self.tokenizer(texts).to(next(self.text.parameters()).device)))

    def tokens(self, text: str) -> int:
        """How many tokens the whole text has, with those that mark its start and end."""
        if hasattr(self.tokenizer, "encode"):
            return len(self.tokenizer.encode(text)) + 2
        return len(self.tokenizer.tokenizer(self.tokenizer.clean_fn(text)).input_ids)


def _unit(output: Any) -> Tensor:
    embedding = output[0] if isinstance(output, tuple) else output  # CoCa's towers return their tokens too
    return F.normalize(embedding.float(), dim=-1)


@dataclass(frozen=True)
class OpenCLIP:
    """What an OPEN_CLIP_MODEL socket carries. The towers are managed apart: guidance needs no text tower in memory.

    name    the entry that was loaded
    image   ModelPatcher of an ImageTower
    text    ModelPatcher of a TextTower
    """

    name: str
    image: Any
    text: Any

    @property
    def tower(self) -> ImageTower:
        return self.image.model

    def embed_images(self, images: Tensor) -> Tensor:
        """Whole images `[N, 3, H, W]` in 0..1 to `[N, D]`, on the CPU."""
        comfy.model_management.load_models_gpu([self.image])
        return self.image.model(images).cpu()

    def embed_texts(self, texts: list[str]) -> Tensor:
        """`[n, D]`, on the CPU."""
        comfy.model_management.load_models_gpu([self.text])
        return self.text.model(texts).cpu()


# -- what there is -----------------------------------------------------------------------------------------------------


def entries() -> list[str]:
    """What can be loaded: folders and files under models/open_clip, then open_clip's pretrained models, "model:tag".

    Those of the pretrained models whose weights are neither there nor in the Hugging Face cache end in " (download)".
    open_clip is not imported for this.
    """
    models_folder(FOLDER)
    local = choices(FOLDER, CONFIG)
    placed = _placed(local)
    named = {choice for choice in placed.values() if not choice.endswith("/")}
    present = [entry for entry, cfg in _pretrained().items() if entry in placed or _cached_weights(cfg)]
    absent = [entry + DOWNLOAD for entry in _pretrained() if entry not in present]
    return [*(choice for choice in local if choice not in named), *present, *absent] or [NOTHING]


@functools.cache
def _pretrained() -> dict[str, dict[str, Any]]:
    """open_clip's table of pretrained models by "model:tag"; empty where open_clip is not installed."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        return {}
    # The package's `__init__` takes seconds, since it imports timm and transformers. The table needs neither.
    package = ModuleType("_sphereguide_open_clip")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[package.__name__] = package
    try:
        table = importlib.import_module(f"{package.__name__}.pretrained")
    except Exception as error:  # a broken installation must not take the list of nodes with it
        log.warning("%s: open_clip can't list its pretrained models (%s: %s)", TITLE, type(error).__name__, error)
        return {}
    return {f"{model}:{tag}": table.get_pretrained_cfg(model, tag) for model, tag in table.list_pretrained()}


def _placed(local: list[str]) -> dict[str, str]:
    """For each pretrained model of which a file or folder bears the name, that of `local`.

    The name is that of model and tag, or of the Hugging Face repository; what stands between its parts is free, as is
    a checksum behind it.
    """
    by_name: dict[str, str] = {}
    for choice in sorted(local, key=lambda choice: choice.endswith((".safetensors", "/"))):  # the last one wins
        path = Path(choice)
        if choice.endswith("/"):
            by_name[_plain(path.name)] = choice
        else:
            by_name[_plain(path.parent.name)] = choice
            by_name[re.sub(r"-[0-9a-f]{8}$", "", _plain(path.stem))] = choice
    found = {}
    for entry, cfg in _pretrained().items():
        names = [_plain(entry), _plain(_repository(cfg)[0].rpartition("/")[2])]
        if choice := next((by_name[name] for name in names if name and name in by_name), None):
            found[entry] = choice
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _repository(cfg: dict[str, Any]) -> tuple[str, list[str]]:
    """Hugging Face repository of a pretrained model, and the names that its weights may have, the best first."""
    repository, _, name = cfg.get("hf_hub", "").rpartition("/")
    if not name:
        return repository, ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    return repository, [str(Path(name).with_suffix(".safetensors")), name]


def _cached_weights(cfg: dict[str, Any]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    repository, names = _repository(cfg)
    found = (try_to_load_from_cache(repository, name) for name in names if repository)
    return next((Path(path) for path in found if isinstance(path, str)), None)


# -- loading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """config and preprocessing as open_clip writes them; `folder`, where tokenizer files may lie too."""

    model: dict[str, Any]
    preprocess: dict[str, Any]
    weights: Path
    folder: Path | None = None


def load(entry: str, dtype: torch.dtype = torch.float32) -> OpenCLIP:
    """The model of an entry of `entries()`.

    The network is asked for files only where the entry says "(download)", and then only for what is missing.

    Raises ImportError without open_clip, FileNotFoundError for what is missing, and ValueError for what is broken or
    can't be used, each with what to do.
    """
    models_folder(FOLDER)
    open_clip = needs("open_clip", "pip install open-clip-torch", TITLE)
    name, download = entry.removesuffix(DOWNLOAD), entry.endswith(DOWNLOAD)
    source = _source(open_clip, name, download)
    described = (source.folder or source.weights.parent) / CONFIG
    check_numbers(source.model, described, TITLE)
    weights = _checked(source.weights)
    try:
        tokenizer, context_length = _tokenizer(open_clip, source, download)
        build = _network(open_clip, deepcopy(source.model), download)
        model = built(build, weights, described, TITLE)
    except (TooLarge, Refused, FileNotFoundError):
        raise
    except Exception as error:  # of several packages, each with its own way of saying that settings are wrong
        raise ValueError(
            f"{TITLE}: the configuration of '{name}' is none that open_clip {open_clip.__version__} can build. Check "
            f"{CONFIG}, or update it:  pip install --upgrade open-clip-torch  ({type(error).__name__}: "
            f"{shortened(error)})"
        ) from error
    _fill(open_clip, model, source.weights)

    size = model.visual.image_size
    preprocess = {key: value for key, value in source.preprocess.items() if value is not None}
    seen = plausible(
        (size, size) if isinstance(size, int) else size,
        preprocess.get("mean", open_clip.OPENAI_DATASET_MEAN),
        preprocess.get("std", open_clip.OPENAI_DATASET_STD),
        described,
        TITLE,
    )
    interpolation = "bilinear" if preprocess.get("interpolation") == "bilinear" else "bicubic"
    tower = ImageTower(model.visual, seen.size, seen.mean, seen.std, interpolation)
    text = TextTower(model.text, tokenizer, context_length)
    return OpenCLIP(name, managed(tower.to(dtype)), managed(text.to(dtype)))


def _source(open_clip: ModuleType, name: str, download: bool) -> _Source:
    cfg = _pretrained().get(name)
    if cfg is None:
        return _local_source(name)
    choice = _placed(choices(FOLDER, CONFIG)).get(name)
    if choice is not None and choice.endswith("/"):
        return _local_source(choice)
    weights = path_of(FOLDER, choice, TITLE) if choice else _cached_weights(cfg)
    if weights is None:
        repository, _ = _repository(cfg)
        places = f"https://huggingface.co/{repository}" if repository else cfg.get("url")
        if not download:
            raise FileNotFoundError(
                f"{TITLE}: the weights of '{name}' are not on this computer. Pick '{name}{DOWNLOAD}', or put the files "
                f"of {places} into {_root() / name.replace(':', '-')}."
            )
        try:
            weights = Path(open_clip.download_pretrained(cfg))
        except Exception as error:
            raise FileNotFoundError(
                f"{TITLE}: '{name}' could not be downloaded. Put the files of {places} into "
                f"{_root() / name.replace(':', '-')} instead. ({shortened(error)})"
            ) from error
    model_cfg = open_clip.get_model_config(name.partition(":")[0])
    # The weights decide the activation: ViT-B-32 is there with either, and the wrong one only makes it worse.
    quick_gelu = cfg.get("quick_gelu", False) or model_cfg.get("quick_gelu", False)
    return _Source({**model_cfg, "quick_gelu": quick_gelu}, cfg, weights)


def _local_source(choice: str) -> _Source:
    if choice == NOTHING:
        raise FileNotFoundError(
            f"{TITLE}: there is no model in {_root()}. Put a folder there with {CONFIG} and the weights, such as "
            "https://huggingface.co/laion/CLIP-ViT-B-32-laion2B-s34B-b79K, and reload the page."
        )
    folder = path_of(FOLDER, choice, TITLE)
    if folder.is_file():
        raise ValueError(
            f"{TITLE}: nothing tells which architecture the weights in '{choice}' have. Name the file after its entry "
            f"in open_clip.list_pretrained(), such as ViT-B-32-laion2b_s34b_b79k{folder.suffix}, or put its {CONFIG} "
            "beside it, in a folder of its own."
        )
    config = folder / CONFIG
    if not config.is_file():
        raise FileNotFoundError(
            f"{TITLE}: there is no {CONFIG} in {folder}. Get it from where the weights come, and put it there."
        )
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        model_cfg = content.get("model_cfg", content)
        missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in model_cfg]
        preprocess = content.get("preprocess_cfg") or {}
        parts = [model_cfg.get("vision_cfg", {}), model_cfg.get("text_cfg", {}), preprocess]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError("vision_cfg, text_cfg and preprocess_cfg must be settings by name")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{TITLE}: {config} can't be read, it may be a broken download. Get it again. ({shortened(error)})"
        ) from error
    if missing:
        raise ValueError(
            f"{TITLE}: {config} does not describe an open_clip model: it lacks {', '.join(missing)}. Get it again from "
            "where the weights come."
        )
    weights = [path for path in folder.iterdir() if path.suffix in folder_paths.supported_pt_extensions]
    weights.sort(key=lambda path: (path.suffix != ".safetensors", "open_clip" not in path.name, path.name))
    if not weights:
        raise FileNotFoundError(
            f"{TITLE}: there are no weights in {folder}. Put the model's open_clip_model.safetensors (or "
            "open_clip_pytorch_model.bin) there, from where its configuration comes."
        )
    return _Source(model_cfg, preprocess, weights[0], folder)


def _root() -> Path:
    return Path(folder_paths.get_folder_paths(FOLDER)[0])


def _network(open_clip: ModuleType, model_cfg: dict[str, Any], download: bool) -> Callable[[], nn.Module]:
    """What makes the network with random weights, in two towers `visual` and `text` whatever its class."""
    model_cfg.pop("custom_text", None)
    vision_cfg, text_cfg = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    if ":" in (vision_cfg.get("timm_model_name") or ""):
        raise RuntimeError(f"timm would fetch '{vision_cfg['timm_model_name']}', and nothing is fetched unasked")
    vision_cfg["timm_model_pretrained"] = text_cfg["hf_model_pretrained"] = False
    if text_cfg.get("hf_model_name"):
        folder = _small_files(text_cfg["hf_model_name"], ("config.json",), download)
        check_config(read_json(folder / "config.json", TITLE), folder, TITLE)
        text_cfg["hf_model_name"] = str(folder)
    network = open_clip.CoCa if "multimodal_cfg" in model_cfg else open_clip.CustomTextCLIP
    return lambda: network(**deepcopy(model_cfg))


def _tokenizer(open_clip: ModuleType, source: _Source, download: bool) -> tuple[Any, int]:
    """The tokenizer, and how many tokens it cuts a text to."""
    text_cfg = source.model["text_cfg"]
    context_length = text_cfg.get("context_length", 77)
    options = text_cfg.get("tokenizer_kwargs") or {}
    if foreign := sorted(options.keys() & {"bpe_path", "cache_dir", "tokenizer_name"}):
        raise Refused(
            f"{TITLE}: tokenizer_kwargs in {CONFIG} has '{foreign[0]}', which leads outside of the model's folder. "
            "Take it out, and put the tokenizer's files beside it."
        )
    name = text_cfg.get("hf_tokenizer_name")
    if not name:
        return open_clip.SimpleTokenizer(context_length=context_length, **options), context_length
    if source.folder is not None and any((source.folder / file).is_file() for file in TOKENIZER_FILES):
        folder = source.folder
    else:
        folder = _small_files(name, TOKENIZER_FILES, download, source.folder)
    if text_cfg.get("tokenizer_mode"):
        options = {**options, "tokenizer_mode": text_cfg["tokenizer_mode"]}
    _check_inside(folder)
    options = {**options, "trust_remote_code": False}  # a configuration must not get its own code run
    try:
        tokenizer = open_clip.tokenizer.HFTokenizer(str(folder), context_length=context_length, **options)
    except Exception as error:
        raise Refused(
            f"{TITLE}: the tokenizer in {folder} can't be read. Get its files again from "
            f"https://huggingface.co/{name}. ({type(error).__name__}: {shortened(error)})"
        ) from error
    return tokenizer, context_length


def _check_inside(folder: Path) -> None:
    """Raises ValueError for a tokenizer whose settings name files elsewhere: transformers would read those."""
    path = folder / "tokenizer_config.json"
    config: dict[str, Any] = {}
    with contextlib.suppress(ValueError):  # one that can't be read, the tokenizer can't read either, and says so
        config = read_json(path, TITLE) if path.is_file() else {}
    for key in ("tokenizer_file", "vocab_file", "merges_file", "spm_file"):
        named = config.get(key)
        if named is not None and not (isinstance(named, str) and (folder / named).resolve().parent == folder.resolve()):
            raise Refused(
                f"{TITLE}: '{key}' in {path} leads outside of the model's folder. Take it out, and put the file there."
            )


def _small_files(repository: str, files: tuple[str, ...], download: bool, folder: Path | None = None) -> Path:
    """Where the local cache keeps `repository`, with at least one of `files`."""
    from huggingface_hub import snapshot_download

    problem = ""
    for local in (True, False) if download else (True,):
        try:
            cached = Path(snapshot_download(repository, allow_patterns=SMALL_FILES, local_files_only=local))
        except Exception as error:
            problem = f" ({shortened(error)})" if not local else ""
            continue
        if any((cached / file).is_file() for file in files):
            return cached
    place = f"put its files (https://huggingface.co/{repository}) into {folder}, or " if folder else ""
    patterns = " ".join(f'--include "{pattern}"' for pattern in SMALL_FILES)
    raise FileNotFoundError(
        f"{TITLE}: this model needs {files[0]} of the Hugging Face repository {repository}, which is not on this "
        f"computer. To get it, {place}run:  hf download {repository} {patterns}{problem}"
    )


def _checked(weights: Path) -> list[Tensor]:
    """What a file holds, to measure the network by.

    It is read here and by open_clip: where a file provokes a TypeError, open_clip's own reader unpickles it without
    weights_only.
    """
    try:
        return list(load_weights(weights, TITLE).values())
    except ValueError as error:
        if "TorchScript" in str(error):
            raise ValueError(
                f"{TITLE}: {weights} is one of OpenAI's own files, a program and not only weights, and is not read. "
                "Get the same weights as open_clip_model.safetensors from https://huggingface.co/timm "
                "(vit_base_patch32_clip_224.openai and others)."
            ) from error
        raise


def _fill(open_clip: ModuleType, model: nn.Module, weights: Path) -> None:
    try:
        open_clip.load_checkpoint(model, str(weights))
    except Exception as error:  # it converts what other packages wrote, by the names that it finds
        raise ValueError(
            f"{TITLE}: the weights in {weights} are not those of the architecture that its name or {CONFIG} tells. "
            f"Correct the name, or get both files from one place. ({shortened(error)})"
        ) from error
