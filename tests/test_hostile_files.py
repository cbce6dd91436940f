"""Files that are damaged, or meant to do harm: the loaders say so in a sentence, and do nothing else.

Nothing that a file holds is run; nothing outside of the model's folder is read; no address is asked for; and a header
that claims a terabyte takes no memory. Hypothesis makes the files, the same ones at each run. With the environment
variable SPHEREGUIDE_FUZZ_MINUTES=60 it makes others, for an hour in all:

    SPHEREGUIDE_FUZZ_MINUTES=60 python quickstart.py test tests/test_hostile_files.py
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import math
import os
import pickle
import re
import shutil
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.samplers
import folder_paths
import gaussian_mixture
import pytest
import torch
from bootstrap import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from sphereguide import NODE_CLASS_MAPPINGS
from sphereguide.models.network import built, load_weights
from sphereguide.nodes.amed import AMEDLoad, AMEDSave
from sphereguide.nodes.classifier import LoadImageClassifier
from sphereguide.nodes.clip import LoadOpenCLIP
from sphereguide.nodes.face import LoadFaceEncoder
from sphereguide.nodes.segmentation import LoadSegmentationModel
from sphereguide.nodes.style import LoadVGG
from sphereguide.samplers.amed import predictor as amed
from sphereguide.samplers.amed.training import Plan, settings_for, train
from torch.torch_version import TorchVersion
from watch import watched

MINUTES = float(os.environ.get("SPHEREGUIDE_FUZZ_MINUTES", 0))
OWN = ROOT / "demo" / "weights"
MODELS = Path(folder_paths.models_dir)
OUTSIDE = MODELS.parent / "outside"
CANARY = OUTSIDE / "canary"
HANG = 300
"""No file takes longer, on a machine that has other things to do."""
GIGABYTES = 3

#: Node, title, folder under models, and how it loads a name.
LOADERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "vgg": ("Load VGG Features", lambda name: LoadVGG().load(name)),
    "segmentation": ("Load Segmentation Model", lambda name: LoadSegmentationModel().load(name)),
    "classifiers": ("Load Image Classifier", lambda name: LoadImageClassifier().load(name, "")),
    "face_encoders": ("Load Face Encoder", lambda name: LoadFaceEncoder().load(name, "output")),
    "open_clip": ("Load open_clip Model", lambda name: LoadOpenCLIP().load(name, "fp32")),
    "amed": ("Load AMED Predictor", lambda name: AMEDLoad().load(name)),
}
NEEDS = {"segmentation": "transformers", "face_encoders": "timm", "open_clip": "open_clip", "classifiers": "timm"}
#: Names that lead each loader to its reader.
STEMS = {"vgg": "vgg19", "segmentation": "fcn_resnet50", "classifiers": "resnet18", "face_encoders": "20180402"}


def fuzz(examples: int, **strategies: Any) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """A test of so many examples; with SPHEREGUIDE_FUZZ_MINUTES again and again, for an equal share of them."""

    def decorate(test: Callable[..., None]) -> Callable[[], None]:
        checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
        given_files = settings(
            max_examples=examples, deadline=None, database=None, derandomize=not MINUTES, suppress_health_check=checks
        )(given(**strategies)(test))

        def repeated() -> None:
            end = time.monotonic() + 60 * MINUTES / FUZZED
            given_files()
            while time.monotonic() < end:
                given_files()

        repeated.__name__, repeated.__doc__ = test.__name__, test.__doc__
        return repeated

    return decorate


FUZZED = 5
"""Tests with `fuzz` in this file."""


def peak() -> float:
    """GB that this process had in memory at most."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


@dataclass
class Result:
    """The error with which a file was refused; empty if it was loaded."""

    message: str = ""

    def is_refused(self, words: str = "") -> None:
        assert re.search(words, self.message) if words else self.message


@contextlib.contextmanager
def harmless(title: str) -> Iterator[Result]:
    """The block loads something, or raises what the page shows: one line that begins with the title of its node."""
    before, result = peak(), Result()
    faulthandler.dump_traceback_later(HANG, exit=True)  # a hang must not look like a slow test
    try:
        with watched() as seen, torch.inference_mode():
            yield result
    except (ValueError, FileNotFoundError) as error:
        result.message = str(error)
        assert result.message.startswith(f"{title}: ")
        assert "\n" not in result.message and len(result.message) < 12_000  # a name may be long
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert not CANARY.exists() and not seen.started, f"it ran: {seen.started}"
    assert not seen.asked
    assert not seen.below(OUTSIDE)
    assert peak() < before + GIGABYTES


@pytest.fixture(autouse=True)
def outside() -> Iterator[None]:
    """A folder beside `models`, with files that would load: nothing may look there. `models` is left as it was."""
    before = set(MODELS.rglob("*"))
    OUTSIDE.mkdir(exist_ok=True)
    shutil.copytree(OWN / "segmentation" / "toy_portraits", OUTSIDE / "segmentation", dirs_exist_ok=True)
    shutil.copy(OWN / "amed" / "toy_portraits_ipndm_4.safetensors", OUTSIDE / "secret.safetensors")
    torch.save({"a": torch.ones(2)}, OUTSIDE / "secret.pth")
    yield
    shutil.rmtree(OUTSIDE)
    for path in sorted(set(MODELS.rglob("*")) - before, reverse=True):  # what a folder holds goes before it
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()


def place(kind: str, name: str, content: bytes) -> str:
    path = MODELS / kind / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return name


def toy(kind: str, name: str = "fuzz") -> Path:
    target = MODELS / kind / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(OWN / kind / "toy_portraits", target)
    return target


def ready(kind: str) -> None:
    if kind in NEEDS:
        pytest.importorskip(NEEDS[kind])


# -- bytes -------------------------------------------------------------------------------------------------------------

TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.float16), "c": torch.tensor(7)}


def pickled(legacy: bool) -> bytes:
    file = io.BytesIO()
    torch.save(TENSORS, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


SEEDS = {".safetensors": [save(TENSORS)], ".pth": [pickled(False), pickled(True)]}
SIZES = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2, 8, 100, 10**8, 10**12, 2**31, 2**63, 2**64 - 1]))


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A file cut short, with bits or bytes of another, longer than it was, or nothing like it."""
    content = bytearray(draw(st.sampled_from(seeds)))
    how = draw(st.sampled_from(["cut", "flip", "flip", "overwrite", "insert", "number", "noise", "join"]))
    if how == "cut":
        return bytes(content[: draw(st.integers(0, len(content)))])
    if how == "noise":
        return draw(st.binary(max_size=2000))
    if how == "join":
        return bytes(content + draw(st.binary(max_size=100)) + content)
    for _ in range(draw(st.integers(1, 8))):
        # The beginning and the end say what lies between: both are hit more often.
        at = draw(st.one_of(st.integers(0, 300), st.integers(-300, -1), st.integers(0, len(content) - 1)))
        at = max(0, min(len(content) - 1, at + len(content) if at < 0 else at))
        if how == "flip":
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "overwrite":
            content[at : at + 8] = draw(st.binary(min_size=1, max_size=8))
        elif how == "number":
            content[at : at + 8] = struct.pack("<Q", draw(SIZES))
        else:
            content[at:at] = draw(st.binary(max_size=16))
    return bytes(content)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A safetensors file whose header is JSON, and says what it likes."""
    names = st.sampled_from(["a.weight", "fc.weight", "classifier.4.weight", "features.0.weight", "__metadata__", ""])
    types = st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "U16", "?", 3])
    shape = st.lists(SIZES, max_size=5)
    entry = st.fixed_dictionaries(
        {}, optional={"dtype": types, "shape": shape, "data_offsets": st.lists(SIZES, max_size=3), "x": shape}
    )
    header = draw(st.dictionaries(names, st.one_of(entry, st.dictionaries(names, names), SIZES), max_size=4))
    if draw(st.booleans()):  # one that the reader takes: no numbers, of any shape
        header = {draw(names): {"dtype": "F32", "shape": [draw(SIZES), 0], "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    length = draw(st.one_of(st.just(len(text)), SIZES))
    return struct.pack("<Q", length % 2**64) + text + draw(st.binary(max_size=64))


def check_reader(content: bytes, suffix: str) -> None:
    path = MODELS / "vgg" / place("vgg", f"fuzz{suffix}", content)
    with harmless("Title"):
        weights = load_weights(path, "Title")
        assert all(
            isinstance(name, str) and type(w) in (torch.Tensor, torch.nn.Parameter) for name, w in weights.items()
        )


@fuzz(150, content=damaged(SEEDS[".safetensors"]))
def test_damaged_safetensors(content: bytes) -> None:
    check_reader(content, ".safetensors")


@fuzz(80, content=headers())
def test_safetensors_with_any_header(content: bytes) -> None:
    check_reader(content, ".safetensors")
    place("vgg", "vgg19.safetensors", content)
    with harmless("Load VGG Features"):
        LoadVGG().load("vgg19.safetensors")


@fuzz(300, content=damaged(SEEDS[".pth"]), suffix=st.sampled_from([".pth", ".pt", ".bin", ".ckpt"]))
def test_damaged_pickles(content: bytes, suffix: str) -> None:
    check_reader(content, suffix)


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"{}",
        save({}),
        save(TENSORS),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**8) + b"{" * 99,
    ],
    ids=["empty", "a zero", "JSON", "no tensors", "another's", "header of 2^63", "header of 100 MB"],
)
def test_each_loader_on_a_file_that_is_none(kind: str, content: bytes) -> None:
    ready(kind)
    title, load = LOADERS[kind]
    name = place(kind, f"{STEMS.get(kind, 'ViT-B-32-laion2b_s34b_b79k')}.safetensors", content)
    with harmless(title) as result:
        load(name)
    result.is_refused()
    (MODELS / kind / name).unlink()


@pytest.mark.parametrize("kind", ["vgg", "segmentation", "classifiers", "face_encoders", "open_clip", "amed"])
@pytest.mark.parametrize("change", ["transposed", "flat", "empty", "int64", "bool", "float64", "nothing", "one number"])
def test_each_loader_on_its_own_network_of_other_shapes_and_types(kind: str, change: str) -> None:
    ready(kind)
    title, load = LOADERS[kind]
    seed = OWN / kind / "toy_portraits"
    weights: dict[str, torch.Tensor] = {"fc.weight": torch.ones(4, 3), "classifier.4.weight": torch.ones(4, 3)}
    metadata = None
    if kind == "amed":
        own = OWN / "amed" / "toy_portraits_ipndm_4.safetensors"
        weights, metadata = amed._open(own, title, training=False)
    elif seed.is_dir():
        weights = load_weights(next(seed.glob("*.safetensors")), title)
    how = {
        "transposed": lambda w: w.movedim(0, -1),
        "flat": torch.flatten,
        "empty": lambda w: w.new_zeros(10**12, 0),
        "int64": lambda w: w.long(),
        "bool": lambda w: w.bool(),
        "float64": lambda w: w.double(),
        "nothing": lambda w: w[..., :0],
        "one number": lambda w: w.reshape(-1)[0],
    }
    weights = {
        name: how[change](value).contiguous().clone() if value.ndim else value for name, value in weights.items()
    }
    if seed.is_dir():
        folder = toy(kind)
        file = next(folder.glob("*.safetensors"))
        name = "fuzz/"
    else:
        name = f"{STEMS.get(kind, 'other')}.safetensors"
        file = MODELS / kind / name
    save_file(weights, file, metadata or {"format": "pt"})
    with harmless(title):
        load(name)
    shutil.rmtree(file.parent) if seed.is_dir() else file.unlink()


# -- pickles that run code ---------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def payloads() -> dict[str, Any]:
    import builtins
    import functools
    import importlib
    import runpy
    import subprocess
    import webbrowser

    write = f"open({str(CANARY)!r}, 'w').close()"
    return {
        "os.system": Payload(os.system, f"echo > '{CANARY}'"),
        "exec": Payload(builtins.exec, write),
        "eval": Payload(builtins.eval, write),
        "subprocess": Payload(subprocess.check_call, [sys.executable, "-c", write]),
        "open": Payload(open, str(CANARY), "w"),
        "import": Payload(importlib.import_module, "antigravity"),
        "runpy": Payload(runpy._run_code, write, {}),
        "partial": Payload(functools.partial(os.system), f"echo > '{CANARY}'"),
        "browser": Payload(webbrowser.open, "http://127.0.0.1/"),
        "torch.load": Payload(torch.load, str(OUTSIDE / "secret.pth")),
        "deep inside": {"state_dict": {"a": torch.ones(1), "b": [Payload(os.system, f"echo > '{CANARY}'")]}},
    }


def as_zip(code: bytes) -> bytes:
    file = io.BytesIO(pickled(False))
    result = io.BytesIO()
    with zipfile.ZipFile(file) as before, zipfile.ZipFile(result, "w") as after:
        for entry in before.infolist():
            after.writestr(entry.filename, code if entry.filename.endswith("data.pkl") else before.read(entry))
    return result.getvalue()


@pytest.mark.parametrize("name", payloads())
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_no_pickle_is_run(name: str, protocol: int) -> None:
    code = pickle.dumps(payloads()[name], protocol)
    legacy = io.BytesIO()
    torch.save(payloads()[name], legacy, _use_new_zipfile_serialization=False)
    for content in (code, as_zip(code), legacy.getvalue()):
        for suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
            with harmless("Title") as result:
                load_weights(MODELS / "vgg" / place("vgg", f"code{suffix}", content), "Title")
            result.is_refused(r"is not read, since that could run code|can't be")


def test_the_payloads_would_run() -> None:
    pickle.loads(pickle.dumps(payloads()["exec"]))
    assert CANARY.exists()
    with watched() as seen:
        pickle.loads(pickle.dumps(payloads()["os.system"]))
    assert seen.started


@pytest.mark.parametrize("kind", ["vgg", "segmentation", "classifiers", "face_encoders", "open_clip"])
def test_no_loader_runs_a_pickle(kind: str) -> None:
    """In the file that it takes, and in the folder in place of the safer one."""
    ready(kind)
    title, load = LOADERS[kind]
    content = as_zip(pickle.dumps(payloads()["exec"]))
    for suffix in (".pth", ".pt", ".bin"):
        name = place(kind, f"{STEMS.get(kind, 'ViT-B-32-laion2b_s34b_b79k')}{suffix}", content)
        with harmless(title) as result:
            load(name)
        result.is_refused()
        (MODELS / kind / name).unlink()
    if (OWN / kind / "toy_portraits").is_dir():
        folder = toy(kind)
        next(folder.glob("*.safetensors")).unlink()
        for file in ("pytorch_model.bin", "open_clip_pytorch_model.bin"):
            (folder / file).write_bytes(content)
        with harmless(title) as result:
            load("fuzz/")
        result.is_refused()
        shutil.rmtree(folder)


def test_an_archive_that_grows_a_thousandfold_is_not_unpacked() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/version", "3")
        archive.writestr("archive/data/0", bytes(2**28))
    path = MODELS / "vgg" / place("vgg", "bomb.pth", file.getvalue())
    assert path.stat().st_size < 2**20
    with harmless("Title") as result:
        load_weights(path, "Title")
    result.is_refused("GB unpacked")


def test_tensors_that_hold_less_than_they_claim_are_none() -> None:
    torch.save({"fc.weight": torch.ones(1).expand(10**12)}, MODELS / "vgg" / "claim.pth")
    torch.save({"fc.weight": torch.ones(2, device="meta")}, MODELS / "vgg" / "meta.pth")
    torch.save({"fc.weight": torch.eye(2).to_sparse()}, MODELS / "vgg" / "sparse.pth")
    torch.save({0: torch.ones(2)}, MODELS / "vgg" / "number.pth")
    for name in ("claim.pth", "meta.pth", "sparse.pth", "number.pth"):
        with harmless("Title") as result:
            load_weights(MODELS / "vgg" / name, "Title")
        result.is_refused("not weights by name")


@pytest.mark.parametrize(("version", "warned"), [("2.9.1", True), ("2.10.0", False), ("2.14.1+cu130", False)])
def test_pickles_come_with_a_warning_where_pytorch_has_a_hole(
    version: str, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    for name, content in (("own.pth", pickled(False)), ("own.safetensors", save(TENSORS))):
        caplog.clear()
        load_weights(MODELS / "vgg" / place("vgg", name, content), "Title")
        assert [record.message.startswith("Title: PyTorch 2.9.1 has a known hole") for record in caplog.records] == [
            True
        ] * (warned and name.endswith(".pth"))


# -- configurations ----------------------------------------------------------------------------------------------------

NUMBERS = [0, -1, 1, 2, 7, 1000, 10**5, 10**7, 10**9, 2**31, 2**63, 10**30, 0.5, -1e308, math.inf, math.nan]
WORDS = ["", "a", "resnet18", "gpt2", "hf-hub:some/body", "some/body", "\0", "x" * 5000, "https://127.0.0.1/w.bin"]
PATHS = ["../../outside/secret.pth", str(OUTSIDE / "secret.pth"), str(OUTSIDE / "segmentation")]
LISTS = [[], {}, [1], [0, 0], [10**9] * 4, ["a", None], {"a": 1}, {"0": None}, [[[[1]]]], {"a": {"a": {"a": []}}}]
VALUES = st.sampled_from([None, True, False, *NUMBERS, *WORDS, *PATHS, *LISTS])
KEYS = st.sampled_from(
    """
    pretrained checkpoint_path pretrained_cfg pretrained_cfg_overlay cache_dir model_args features_only
    num_classes url use_pretrained_backbone use_timm_backbone backbone backbone_config quantization_config
    auto_map model_type weights attn_implementation _attn_implementation_internal configuration_files
    _name_or_path torch_dtype num_labels id2label label_names image_size palette architectures file bpe_path
    tokenizer_kwargs hf_model_name hf_tokenizer_name timm_model_name timm_model_pretrained context_length
    custom_load
    """.split()  # noqa: SIM905
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield (*path, key)
        yield from places(part, (*path, key))


@st.composite
def changed(draw: st.DrawFn, seed: dict[str, Any]) -> dict[str, Any]:
    """A configuration in which some entries are others, gone, or new."""
    config = deepcopy(seed)
    for _ in range(draw(st.integers(1, 3))):
        known = list(places(config))
        path = draw(st.sampled_from(known)) if known else ()
        owner: Any = config
        for key in path[:-1]:
            owner = owner[key]
        how = draw(st.sampled_from(["other", "other", "gone", "new"]))
        if how == "gone" and path:
            del owner[path[-1]]
        elif how == "other" and path:
            owner[path[-1]] = deepcopy(draw(VALUES))
        else:
            target = owner if isinstance(owner, dict) else config
            target[draw(KEYS)] = deepcopy(draw(VALUES))
    return config


def own_config(kind: str, file: str) -> dict[str, Any]:
    return json.loads((OWN / kind / "toy_portraits" / file).read_text(encoding="utf-8"))


NOISY = {"in_channels": 4, "labels": ["a", "b"], "width": 8, "channel_mult": [1], "blocks": 1}
CONFIGS = {
    ("segmentation", "config.json"): own_config("segmentation", "config.json"),
    ("segmentation", "preprocessor_config.json"): own_config("segmentation", "preprocessor_config.json"),
    ("face_encoders", "config.json"): own_config("face_encoders", "config.json"),
    ("open_clip", "open_clip_config.json"): own_config("open_clip", "open_clip_config.json"),
    ("classifiers", "config.json"): {"noise_aware": True, "architecture": "NoisyLatentClassifier", **NOISY},
}


@fuzz(
    120,
    which=st.sampled_from(sorted(CONFIGS)).flatmap(lambda which: st.tuples(st.just(which), changed(CONFIGS[which]))),
)
def test_configurations_with_any_entry(which: tuple[tuple[str, str], dict[str, Any]]) -> None:
    (kind, file), config = which
    if kind in NEEDS:
        ready(kind)
    title, load = LOADERS[kind]
    folder = MODELS / kind / "config"
    if not folder.exists():
        if (OWN / kind / "toy_portraits").is_dir():
            toy(kind, "config")
        else:
            from sphereguide.models.classifier import NoisyLatentClassifier

            folder.mkdir(parents=True)
            save_file(NoisyLatentClassifier(**NOISY).state_dict(), folder / "model.safetensors")
    before = (folder / file).read_bytes() if (folder / file).exists() else None
    (folder / file).write_text(json.dumps(config), encoding="utf-8")
    try:
        with harmless(title):
            load("config/")
    finally:
        (folder / file).unlink() if before is None else (folder / file).write_bytes(before)


# What a configuration can name that is not in its folder, each with the words of its error.
FOREIGN: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "timm's checkpoint": (
        "face_encoders",
        "config.json",
        {"model_args": {"checkpoint_path": str(OUTSIDE / "secret.pth")}},
        "'checkpoint_path', by which timm",
    ),
    "timm's download": ("face_encoders", "config.json", {"model_args": {"pretrained": True}}, "'pretrained', by which"),
    "transformers' backbone": (
        "segmentation",
        "config.json",
        {"model_type": "upernet", "backbone": str(OUTSIDE / "segmentation"), "backbone_config": None},
        "is not whole: its 'backbone'",
    ),
    "transformers' backbone from the hub": (
        "segmentation",
        "config.json",
        {"model_type": "upernet", "backbone": "microsoft/resnet-18", "use_pretrained_backbone": True},
        "is not whole: its 'backbone'",
    ),
    "kernels from the hub": (
        "segmentation",
        "config.json",
        {"attn_implementation": "some/body"},
        "is not whole: its 'attn_implementation'",
    ),
    "kernels by a part of the network": (
        "segmentation",
        "config.json",
        {"decoder_config": {"attn_implementation": {"": "some/body"}}},
        "is not whole: its 'attn_implementation'",
    ),
    "kernels, past what transformers checks": (  # CVE-2026-4372
        "segmentation",
        "config.json",
        {"_attn_implementation_internal": "some/body"},
        "is not whole: its '_attn_implementation_internal'",
    ),
    "experts from the hub": (
        "segmentation",
        "config.json",
        {"_experts_implementation": "some/body"},
        "is not whole: its '_experts_implementation'",
    ),
    "another configuration": (
        "segmentation",
        "config.json",
        {"configuration_files": ["config.4.0.0.json"]},
        "is not whole: its 'configuration_files'",
    ),
    "an adapter": (
        "segmentation",
        "adapter_config.json",
        {"base_model_name_or_path": str(OUTSIDE / "segmentation")},
        "is not whole: its 'adapter_config.json'",
    ),
    "a shard": (
        "segmentation",
        "model.safetensors.index.json",
        {"weight_map": {"a": "../../../outside/secret.safetensors"}},
        "is not whole: its 'model.safetensors.index.json'",
    ),
    "labels without end": ("segmentation", "config.json", {"num_labels": 10**9}, "num_labels as 1000000000"),
    "open_clip's vocabulary": (
        "open_clip",
        "open_clip_config.json",
        {"tokenizer_kwargs": {"bpe_path": str(OUTSIDE / "secret.pth")}},
        "'bpe_path', which leads outside",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_configuration_leads_nowhere_else(name: str) -> None:
    kind, file, entries, words = FOREIGN[name]
    ready(kind)
    title, load = LOADERS[kind]
    folder = toy(kind)
    path = folder / file
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if kind == "open_clip":
        config["model_cfg"]["text_cfg"] |= entries
    else:
        config |= entries
    path.write_text(json.dumps(config), encoding="utf-8")
    with harmless(title) as result:
        load("fuzz/")
    result.is_refused(words)
    shutil.rmtree(folder)


def test_settings_that_have_no_names_are_refused() -> None:
    ready("face_encoders")
    title, load = LOADERS["face_encoders"]
    folder = toy("face_encoders")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "model_args": ["pretrained"]}), encoding="utf-8")
    with harmless(title) as result:
        load("fuzz/")
    result.is_refused("pretrained_cfg and model_args must be settings by name")
    shutil.rmtree(folder)


def test_a_tokenizer_leads_nowhere_else() -> None:
    ready("open_clip")
    folder = toy("open_clip")
    config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "some/body"
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_file": str(OUTSIDE / "secret.pth")}))
    with harmless("Load open_clip Model") as result:
        LoadOpenCLIP().load("fuzz/", "fp32")
    result.is_refused(r"'tokenizer_file' in .* leads outside")
    shutil.rmtree(folder)


def test_a_head_of_a_trillion_classes_takes_no_memory() -> None:
    """A tensor of shape [10¹², 0] takes no byte in the file."""
    for kind, name, head in (
        ("classifiers", "resnet18.safetensors", "fc.weight"),
        ("segmentation", "fcn_resnet50.safetensors", "classifier.4.weight"),
    ):
        save_file({head: torch.zeros(10**12, 0)}, MODELS / kind / name)
        title, load = LOADERS[kind]
        with harmless(title) as result:
            load(name)
        result.is_refused("is far larger than the 0 numbers")
        (MODELS / kind / name).unlink()


def test_a_network_is_measured_before_it_takes_memory() -> None:
    held = [torch.zeros(10, 10)]
    network = built(lambda: torch.nn.Linear(10, 9), held, Path("config.json"), "Title")
    assert network.weight.device.type == "cpu"
    with harmless("Title") as result:
        built(lambda: torch.nn.Linear(10**6, 10**6), held, Path("config.json"), "Title")
    result.is_refused("far larger than the 100 numbers")
    with harmless("Title") as result:
        built(
            lambda: torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(10**9)), held, Path("config.json"), "Title"
        )
    result.is_refused("far larger than the 100 numbers")


# -- predictors --------------------------------------------------------------------------------------------------------


def predictor_file(settings_: Any, training: Any = None, **metadata: str) -> bytes:
    weights, header = amed._open(OWN / "amed" / "toy_portraits_ipndm_4.safetensors", "", training=False)
    header |= {"settings": settings_ if isinstance(settings_, str) else json.dumps(settings_)}
    if training is not None:
        header["training"] = training if isinstance(training, str) else json.dumps(training)
    return save(weights, {**header, **metadata})


SETTINGS = json.loads(amed._open(OWN / "amed" / "toy_portraits_ipndm_4.safetensors", "", training=False)[1]["settings"])


@fuzz(200, content=changed(SETTINGS).map(predictor_file))
def test_predictors_with_any_settings(content: bytes) -> None:
    name = place("amed", "fuzz.safetensors", content)
    with harmless("Load AMED Predictor"):
        loaded, about = AMEDLoad().load(name)
        assert 1 <= loaded.settings.steps <= 1000 and isinstance(about, str)
        sigmas = torch.tensor(loaded.settings.sigmas)
        assert sigmas.isfinite().all() and (sigmas.diff() <= 0).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"sigmas": [float(i) for i in range(10**5, 0, -1)], "midpoints": []},
        {"sigmas": [1e400, 1.0], "midpoints": []},
        {"sigmas": [math.nan, 1.0], "midpoints": []},
        {"sigmas": [1.0, 2.0], "midpoints": []},
        {"sigmas": "14", "midpoints": []},
        {"midpoints": [math.nan] * 4},
        {"midpoints": [1e9] * 4},
        {"cfg": math.nan},
        {"max_order": 10**30},
        {"parallel": 10**9},
        {"student": "epd", "max_order": 1, "parallel": 10**9},
        {"student": "epd", "max_order": 1, "parallel": 4},  # a network for a table
        {"trajectories": math.inf},
        {"scale_time": 1e9},
        {"student": "x" * 1000},
    ],
    ids=str,
)
def test_absurd_settings_are_refused(changes: dict[str, Any]) -> None:
    place("amed", "fuzz.safetensors", predictor_file({**SETTINGS, **changes}))
    with harmless("Load AMED Predictor") as result:
        AMEDLoad().load("fuzz.safetensors")
    result.is_refused("does not fit this version")


@pytest.mark.parametrize("text", ["[]", "null", "{", "3", "[" * 100_000, '"' + "a" * 10**6 + '"'], ids=lambda t: t[:9])
def test_settings_that_are_none_are_refused(text: str) -> None:
    place("amed", "fuzz.safetensors", predictor_file(text))
    with harmless("Load AMED Predictor") as result:
        AMEDLoad().load("fuzz.safetensors")
    result.is_refused("does not fit this version")


def test_of_another_file_no_tensor_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of many GB that lies in the wrong folder."""
    read: list[str] = []
    opened = amed.safe_open

    class Opened:
        def __init__(self, *arguments: Any) -> None:
            self.file = opened(*arguments)

        def __enter__(self) -> Any:
            file = self.file.__enter__()
            self.get_tensor = lambda name: read.append(name) or file.get_tensor(name)
            self.keys, self.metadata = file.keys, file.metadata
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

    monkeypatch.setattr(amed, "safe_open", Opened)
    place("amed", "fuzz.safetensors", save(TENSORS))
    with pytest.raises(ValueError, match="is no predictor of Train AMED Predictor"):
        AMEDLoad().load("fuzz.safetensors")
    assert not read
    AMEDLoad().load("toy_portraits_ipndm_4.safetensors")
    assert read


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[Path], None]]:
    """The file of a training that came to its end, and what goes on with one."""
    patcher, kept = gaussian_mixture.patcher(), tmp_path_factory.mktemp("training") / "kept.safetensors"
    given = {"student": "euler", "steps": 1, "schedule": "polynomial", "rho": 0.0, "max_order": 1, "cfg": 1.0}
    chosen = settings_for(patcher, "heun", 1, **given)
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_cfg(1.0)
    prompts = gaussian_mixture.conditioning(0.3), gaussian_mixture.conditioning(-0.2)

    def run(kept: Path) -> None:
        with torch.inference_mode():
            train(guider, prompts, gaussian_mixture.SHAPE, chosen, Plan(trajectories=2, epochs=1, batch_size=2), kept)

    run(kept)
    run(kept)  # which goes on where it ended
    return kept, run


@pytest.mark.parametrize(
    "change",
    [
        lambda header: "[]",
        lambda header: "{",
        lambda header: {},
        lambda header: {**header, "iteration": 10**9},
        lambda header: {**header, "iteration": -1},
        lambda header: {**header, "history": 3},
        lambda header: {**header, "history": {**header["history"], "errors": []}},
        lambda header: {**header, "history": {**header["history"], "losses": [["a"]]}},
    ],
)
def test_a_training_that_can_not_go_on_says_so(training: Any, change: Callable[[Any], Any], tmp_path: Path) -> None:
    own, run = training
    kept = tmp_path / "kept.safetensors"
    state, header = amed.read(own, "")
    weights, metadata = amed._open(own, "", training=False)
    text = change(deepcopy(header))
    if isinstance(text, dict):
        text = json.dumps({**text, "what": header["what"]})
    state = {amed.TRAINING + name: value for name, value in state.items()}
    save_file({**weights, **state}, kept, {**metadata, "training": text})
    with harmless("Train AMED Predictor") as result:
        run(kept)
    result.is_refused(r"can't be gone on with\. Delete the file")


# -- names -------------------------------------------------------------------------------------------------------------

TRICKS = {
    "up": "../../outside/secret.safetensors",
    "up and down": "inner/../../../outside/secret.safetensors",
    "folder up": "../../outside/segmentation/",
    "absolute": str(OUTSIDE / "secret.safetensors"),
    "absolute folder": f"{OUTSIDE / 'segmentation'}/",
    "link": "link.safetensors",
    "linked folder": "linked/",
    "folder with a link in it": "inner/",
    "circle": "circle.safetensors",
    "zero": "a\0b.safetensors",
    "zero at the end": "real.safetensors\0",
    "half a character": "\ud83d.safetensors",
    "long": "x" * 5000 + ".safetensors",
    "deep": "x/" * 5000,
    "nothing": "",
    "here": ".",
    "above": "..",
    "root": "/",
    "home": "~",
    "system file": "/etc/passwd",
    "Windows": "..\\..\\outside\\secret.safetensors",
    "drive": "C:\\Windows\\win.ini",
    "share": "\\\\server\\share\\secret.safetensors",
    "address": "https://127.0.0.1/secret.safetensors",
    "file address": f"file://{OUTSIDE}/secret.safetensors",
    "variable": "$HOME/secret.safetensors",
    "device": "/dev/zero",
    "lines": "a\nb.safetensors",
}


@pytest.fixture
def links() -> Iterator[None]:
    """Of each kind, in each folder of models."""
    made = []
    for kind in LOADERS:
        folder = MODELS / kind
        toy_or_none = OWN / kind / "toy_portraits"
        if toy_or_none.is_dir():
            shutil.copytree(toy_or_none, folder / "inner")
            for file in (folder / "inner").glob("*.safetensors"):
                file.unlink()
        else:
            (folder / "inner").mkdir(parents=True)
        try:
            (folder / "inner" / "model.safetensors").symlink_to(OUTSIDE / "secret.safetensors")
            (folder / "link.safetensors").symlink_to(OUTSIDE / "secret.safetensors")
            (folder / "linked").symlink_to(OUTSIDE / "segmentation", target_is_directory=True)
            (folder / "circle.safetensors").symlink_to(folder / "circle.safetensors")
        except OSError:
            pytest.skip("this file system has no links")
        made.append(folder)
    yield
    for folder in made:
        shutil.rmtree(folder / "inner")
        for name in ("link.safetensors", "linked", "circle.safetensors"):
            (folder / name).unlink()


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("kind", LOADERS)
def test_no_name_leads_out_of_the_folder(links: None, kind: str, trick: str) -> None:
    ready(kind)
    title, load = LOADERS[kind]
    with harmless(title) as result:
        load(TRICKS[trick])
    result.is_refused(r"lies outside of models/|is not in models/")


@pytest.mark.parametrize("trick", TRICKS)
def test_no_predictor_is_saved_elsewhere(links: None, trick: str) -> None:
    loaded, _ = AMEDLoad().load("toy_portraits_ipndm_4.safetensors")
    base = MODELS.parent

    def files() -> dict[Path, int]:
        return {path: path.lstat().st_mtime_ns for path in base.rglob("*") if not path.is_dir() or path.is_symlink()}

    before = files()
    with harmless("Save AMED Predictor"):
        AMEDSave().save(loaded, TRICKS[trick])
    new = {path for path, when in files().items() if before.get(path) != when}
    assert all(path.parent.is_relative_to(MODELS / "amed") and not path.is_symlink() for path in new), new
    for path in new:
        path.unlink()


def test_every_node_that_names_a_file_is_here() -> None:
    """A loader lists what is in its folder; this finds those that list a file which is put there."""
    for kind in LOADERS:
        place(kind, "probe.safetensors", save(TENSORS))
    found = {
        node_id
        for node_id, node in NODE_CLASS_MAPPINGS.items()
        for spec in {**node.INPUT_TYPES().get("required", {}), **node.INPUT_TYPES().get("optional", {})}.values()
        if isinstance(spec[0], list) and "probe.safetensors" in spec[0]
    }
    for kind in LOADERS:
        (MODELS / kind / "probe.safetensors").unlink()
    own = {"LoadVGG", "LoadSegmentationModel", "LoadImageClassifier", "LoadFaceEncoder", "LoadOpenCLIP", "AMEDLoad"}
    assert found == {f"SphereGuide{name}" for name in own}
    in_folders = set(folder_paths.folder_names_and_paths)
    assert set(LOADERS) <= in_folders
