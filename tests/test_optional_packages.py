"""Installing what the README says leaves a user's torch, torchvision, numpy and Pillow alone, and works with them."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
import torch.nn.functional as F
from bootstrap import ROOT
from packaging.requirements import Requirement
from sphereguide.losses.base import Step
from sphereguide.nodes.face import FaceIDLoss, LoadFaceEncoder
from sphereguide.samplers.autograd import differentiable

KEPT = {"torch", "torchvision", "numpy", "pillow"}
OPTIONAL = {"open-clip-torch", "timm", "facenet-pytorch"}
REQUIREMENTS = ["-r", str(ROOT / "requirements.txt"), "open-clip-torch>=3.0", "timm"]
#: A ComfyUI of today, and one of May 2024.
HOSTS = {
    "current": {},
    "2024": {"torch": "2.3.0", "torchvision": "0.18.0", "numpy": "1.26.4", "pillow": "10.3.0", "safetensors": "0.4.3"},
}


def plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def index() -> None:
    answer = pip("index", "versions", "open-clip-torch", "--retries", "0")
    if answer.returncode != 0:
        pytest.skip(f"no package index can be reached: {answer.stderr.strip()[-300:]}")


@pytest.fixture(params=HOSTS)
def versions(request: pytest.FixtureRequest) -> dict[str, str]:
    """What a user has of what is to be kept."""
    return {name: importlib.metadata.version(name) for name in KEPT} | HOSTS[request.param]


@pytest.fixture
def user(versions: dict[str, str], tmp_path: Path) -> Path:
    """A Python environment that says it holds what this one holds, without the optional packages: all pip looks at."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    python = next(path for path in (tmp_path / "bin" / "python", tmp_path / "Scripts" / "python.exe") if path.exists())
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    for distribution in importlib.metadata.distributions():
        name, version = plain(distribution.metadata["Name"]), distribution.version
        metadata = distribution.read_text("METADATA")
        if name in OPTIONAL or metadata is None:
            continue
        if version != versions.get(name, version):
            version = versions[name]
            metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(exist_ok=True)
        for file, content in {"METADATA": metadata, "INSTALLER": "pip", "RECORD": ""}.items():
            (folder / file).write_text(content, encoding="utf-8")
    return python


def plan(python: Path, *what: str) -> dict[str, dict[str, Any]]:
    """The metadata of what `pip install` there would install, by name."""
    answer = pip("--python", str(python), "install", "--dry-run", "--quiet", "--report", "-", *what)
    assert answer.returncode == 0, answer.stderr
    found = [package["metadata"] for package in json.loads(answer.stdout)["install"]]
    return {plain(metadata["name"]): metadata for metadata in found}


def test_the_packages_that_the_readme_names_change_nothing_that_comfyui_brings(index, user):
    installed = plan(user, *REQUIREMENTS)
    assert {"open-clip-torch", "timm"} <= installed.keys()
    assert not KEPT & installed.keys(), installed.keys()


def test_the_plan_would_show_such_a_change(index, user):
    assert plan(user, "pillow==11.0.0").keys() == {"pillow"}


def test_facenet_pytorch_comes_alone_without_its_pins_and_only_so(index, user, versions):
    installed = plan(user, "--no-deps", "facenet-pytorch")
    assert installed.keys() == {"facenet-pytorch"}
    pins = [Requirement(pin) for pin in installed["facenet-pytorch"]["requires_dist"]]
    refused = [pin.name for pin in pins if plain(pin.name) in KEPT and versions[plain(pin.name)] not in pin.specifier]
    assert refused


def test_importing_the_pack_imports_no_optional_package():
    script = """
import sys
from bootstrap import import_host, import_pack
import_host(cpu=True)
import comfy.sd, comfy.samplers  # as a running ComfyUI has
before = set(sys.modules)
import_pack()
import importlib, pkgutil, sphereguide
for room in ("losses", "models", "nodes", "samplers"):
    package = importlib.import_module(f"sphereguide.{room}")
    for module in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{module.name}")
        for node, _ in getattr(module, "NODES", {}).values() if room == "nodes" else ():
            node.INPUT_TYPES()
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    answer = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "demo", capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    imported = answer.stdout.strip().splitlines()[-1]
    assert "sphereguide" in imported
    for name in ("open_clip", "timm", "facenet_pytorch", "transformers", "matplotlib"):
        assert f"'{name}'" not in imported


# -- facenet-pytorch with the torch, numpy and Pillow of now -----------------------------------------------------------

#: By eye: hairline to chin, ear to ear, in pixels of 512.
FACE = (175, 60, 275, 180)


@pytest.fixture(scope="module")
def astronaut() -> torch.Tensor:
    """`[1, 3, 512, 512]`, 0..1."""
    data = pytest.importorskip("skimage.data")
    return torch.from_numpy(data.astronaut()).movedim(-1, 0)[None] / 255


@pytest.fixture(scope="module")
def encoder():
    """FACE_ENCODER of facenet-pytorch's class with random weights, from a file."""
    facenet_pytorch = pytest.importorskip("facenet_pytorch")
    path = Path(folder_paths.models_dir) / "face_encoders" / "20180402-114759-vggface2.pt"
    torch.manual_seed(0)
    torch.save(facenet_pytorch.InceptionResnetV1(pretrained=None, classify=False).state_dict(), path)
    with torch.inference_mode():
        yield LoadFaceEncoder().load(path.name, "output")[0]
    path.unlink()


def make(encoder, images, **changes):
    settings = {
        "references": "one per sample",
        "crop": "detect",
        "detect_every": 1,
        "margin": 0.0,
        "distance": "euclidean",
    }
    box = {"box_left": 0.1, "box_top": 0.1, "box_right": 0.9, "box_bottom": 0.9}
    with torch.inference_mode():
        return FaceIDLoss().make(encoder, images.movedim(1, -1), **{**settings, **box, **changes})[0]


def overlap(box, size) -> float:
    """Intersection over union with FACE, of a box in shares of an image of that size."""
    left, top, right, bottom = (share * size for share in box)
    width = max(0, min(right, FACE[2]) - max(left, FACE[0]))
    height = max(0, min(bottom, FACE[3]) - max(top, FACE[1]))
    union = (right - left) * (bottom - top) + (FACE[2] - FACE[0]) * (FACE[3] - FACE[1]) - width * height
    return width * height / union


def test_the_real_detector_finds_the_face_of_the_astronaut(encoder, astronaut):
    faces = make(encoder, astronaut).detector(astronaut[0])
    assert len(faces) == 1
    assert overlap(faces[0], 512) > 0.7


def test_of_a_small_and_a_large_face_the_large_one_is_first(encoder, astronaut, caplog):
    both = torch.zeros(1, 3, 512, 768)
    both[..., 256:, 512:] = F.interpolate(astronaut, size=(256, 256), mode="bilinear", antialias=True)
    both[..., :512] = astronaut
    loss = make(encoder, both)
    assert "the reference shows 2 faces, of which the largest counts" in caplog.text
    large, small = loss.detector(both[0])
    left, top, right, bottom = large
    assert overlap((left * 1.5, top, right * 1.5, bottom), 512) > 0.7
    assert small[0] > 2 / 3


def test_the_gradient_lies_in_the_detected_face(encoder, astronaut):
    estimate = (astronaut + 0.1 * torch.randn(astronaut.shape, generator=torch.Generator().manual_seed(0))).repeat(
        2, 1, 1, 1
    )
    estimate[1] = estimate[1].flip(-1)  # the face of the second is elsewhere
    loss, memory = make(encoder, astronaut), {}
    with differentiable(loss) as recording, recording():
        variable = estimate.clone().requires_grad_()
        value = loss(variable, Step(memory=memory))
        (gradient,) = torch.autograd.grad(value.sum(), variable)
    assert value.shape == (2,) and (value > 0).all()
    assert gradient.isfinite().all()
    first, second = memory[loss].boxes
    assert overlap(first, 512) > 0.6
    assert overlap((1 - second[2], second[1], 1 - second[0], second[3]), 512) > 0.6
    for i, (left, top, right, bottom) in enumerate((first, second)):
        inside = torch.zeros(512, 512, dtype=torch.bool)
        inside[round(top * 512) : round(bottom * 512), round(left * 512) : round(right * 512)] = True
        assert (gradient[i][:, inside] != 0).float().mean() > 0.9
        assert torch.equal(gradient[i][:, ~inside], torch.zeros_like(gradient[i][:, ~inside]))
