"""Nothing is fetched unasked: a server with the pack, which can reach no address but this machine's, asks for none.

It runs a guided workflow with each loader. What asks through Python's sockets is seen, and refused; so the tests hold
with and without a network.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from broken_files import write_broken_files, write_networks, write_pictures
from comfy_server import ComfyServer, ExecutionError
from prompts import classified, clip_text, face, guided, node, predicted, segmented, styled, vgg

pytestmark = [pytest.mark.server, pytest.mark.slow]

#: Python imports it before all else, in each process that has its folder on the path.
REFUSE = """
import json, os, sys, traceback

def hear(event, arguments):
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None  # a path: a socket of this machine
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host is None or str(host).startswith("127.") or host in ("", "localhost", "::1", "0.0.0.0"):
        return
    with open(os.environ["REFUSED_ADDRESSES"], "a") as log:
        log.write(json.dumps([str(host), [frame.filename for frame in traceback.extract_stack()]]) + "\\n")
    raise ConnectionRefusedError(f"{host} is not of this machine")

sys.addaudithook(hear)
"""


class Secluded(ComfyServer):
    """A server that is refused all addresses but those of its machine, and `asked`: what it asked for."""

    @property
    def log_of_addresses(self) -> Path:
        return self.base / "addresses.log"

    def environment(self) -> dict[str, str]:
        folder = self.base / "refuse"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(REFUSE, encoding="utf-8")
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        proxies = {name: "" for name in os.environ if name.lower().endswith("_proxy")}
        return {
            **super().environment(),
            **proxies,
            "PYTHONPATH": path,
            "REFUSED_ADDRESSES": str(self.log_of_addresses),
            "HF_HUB_OFFLINE": "0",
        }

    def asked(self) -> list[str]:
        if not self.log_of_addresses.exists():
            return []
        return [json.loads(line)[0] for line in self.log_of_addresses.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secluded]:
    server = Secluded(tmp_path_factory.mktemp("secluded"))
    write_pictures(server.input)
    write_broken_files(server.base)
    write_networks(server.base / "models")
    with server:
        yield server


def test_the_server_is_refused_what_it_asks_for(server: Secluded, tmp_path: Path) -> None:
    """Without this the others would prove nothing."""
    log = tmp_path / "addresses.log"
    environ = {**os.environ, **server.environment(), "REFUSED_ADDRESSES": str(log)}
    script = "import urllib.request; urllib.request.urlopen('http://example.org')"
    answer = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True)
    assert "is not of this machine" in answer.stderr
    assert "example.org" in log.read_text(encoding="utf-8")


def test_no_address_is_asked_for_at_the_start(server: Secluded) -> None:
    assert "SphereGuideDSG" in server.get_json("/object_info")
    assert not server.asked()


SMALL_VGG = {"vgg_layers": "relu1_1", "vgg_size": 64}
WORKFLOWS = {
    "low pass": (guided(), ""),
    "CLIP": (clip_text(), "open_clip"),
    "CLIP style": (styled(open_clip_model=["loader", 0]), "open_clip"),
    "VGG style": (
        styled(loader=node("SphereGuideLoadVGG", name="vgg19.safetensors"), vgg=["loader", 0], **SMALL_VGG),
        "",
    ),
    "segmentation": (segmented(mask=["black", 0], class_name="hair", unlabelled="skin"), "transformers"),
    "face": (face(), "timm"),
    "noise-aware classifier": (classified("noisy/"), ""),
    "classifier of torchvision": (
        classified(
            "resnet18_3.safetensors", loss=node("SphereGuideClassifierLoss", classifier=["loader", 0], class_name="0")
        ),
        "",
    ),
    "AMED": (predicted(), ""),
    "entry that is not here": (clip_text(model="ViT-B-32:laion2b_s34b_b79k"), "open_clip"),
    "tokenizer that is not here": (clip_text(model="without_tokenizer/"), "open_clip"),
    "damaged folder": (segmented("half/"), "transformers"),
    "file that is not here": (vgg("page.pth"), ""),
}
FAILS = {"entry that is not here", "tokenizer that is not here", "damaged folder", "file that is not here"}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_no_address_is_asked_for_by_a_workflow(server: Secluded, name: str) -> None:
    prompt, package = WORKFLOWS[name]
    if package:
        pytest.importorskip(package)
    if name in FAILS:
        with pytest.raises(ExecutionError):
            server.run(prompt)
    else:
        run = server.run(prompt)
        assert run.outputs and len(run.cached) < len(prompt)
    assert not server.asked()


def test_what_the_user_picks_as_a_download_is_asked_for(server: Secluded) -> None:
    """The last, and the only one: the entry itself says that it is a download."""
    pytest.importorskip("open_clip")
    with pytest.raises(ExecutionError, match="'ViT-B-32:laion2b_s34b_b79k' could not be downloaded"):
        server.run(clip_text(model="ViT-B-32:laion2b_s34b_b79k (download)"))
    assert "huggingface.co" in set(server.asked())
