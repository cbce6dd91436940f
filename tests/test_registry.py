"""What ComfyUI's registry gets: it holds what the nodes need, and no more, and runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
from bootstrap import ROOT
from comfy_server import ComfyServer
from sphereguide import NODE_CLASS_MAPPINGS
from sphereguide.demo.run import node_of

TOP = {"__init__.py", "host.py", "losses", "models", "nodes", "samplers", "demo", "web", "workflows", "docs"}
TOP |= {"pyproject.toml", "requirements.txt", "README.md", "README.zh-CN.md", "CHANGELOG.md", "LICENSE", "SECURITY.md"}


def git(*arguments: str) -> set[str]:
    if shutil.which("git") is None:
        return set()
    return set(subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.splitlines())


@pytest.fixture(scope="module")
def archive() -> set[str]:
    """The files that `comfy node pack` takes: those of git, without those that .comfyignore names."""
    tracked = git("ls-files")
    if not tracked:
        pytest.skip("not a clone")
    return tracked - git("ls-files", "--cached", "--ignored", "--exclude-from=.comfyignore")


def test_archive_holds_the_pack_and_no_more(archive: set[str]) -> None:
    assert {file.partition("/")[0] for file in archive} == TOP
    assert {file for file in archive if file.startswith("docs/")} == {"docs/troubleshooting.md"}
    assert {Path(file).name for file in archive if file.startswith("demo/") and file.endswith(".py")} == {
        "__init__.py",
        "architecture.py",
        "bootstrap.py",
        "portraits.py",
        "toy_portraits.py",
    }
    assert not [file for file in archive if "judge" in file]
    assert sum((ROOT / file).stat().st_size for file in archive) < 30e6


def test_registry_shows_an_icon_of_the_repository() -> None:
    written = (ROOT / "pyproject.toml").read_text("utf-8")
    repository, icon = (re.search(rf'^{key} = "(.+)"$', written, re.MULTILINE)[1] for key in ("Repository", "Icon"))
    address = repository.replace("github.com", "raw.githubusercontent.com") + "/main/"
    assert icon.startswith(address)
    picture = ElementTree.parse(ROOT / icon.removeprefix(address)).getroot()
    assert max(int(picture.attrib[side]) for side in ("width", "height")) <= 400  # the registry's limit


@pytest.mark.server
@pytest.mark.slow
def test_archive_runs_in_comfyui(archive: set[str], tmp_path: Path) -> None:
    pack = tmp_path / "archive"
    for file in archive:
        (pack / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, pack / file)
    prompt = json.loads((pack / "workflows" / "api" / "toy_combined.json").read_text(encoding="utf-8"))
    prompt[node_of(prompt, "BasicScheduler")]["inputs"]["steps"] = 2
    with ComfyServer(tmp_path / "comfyui", pack=pack) as server:
        for picture in (pack / "workflows").glob("*.png"):
            shutil.copy(picture, server.input)
        nodes = server.get_json("/object_info")
        assert NODE_CLASS_MAPPINGS.keys() <= nodes.keys()
        predictors = nodes["SphereGuideAMEDLoad"]["input"]["required"]["name"][0]
        assert "toy_portraits_ipndm_6.safetensors" in predictors
        assert server.get("/extensions/sphereguide/report.js") == (ROOT / "web" / "report.js").read_bytes()
        assert server.images(server.run(prompt), node_of(prompt, "SaveImage"))


@pytest.mark.skipif(shutil.which("comfy") is None, reason="comfy-cli is not installed")
def test_comfy_cli_packs_the_same(archive: set[str], tmp_path: Path) -> None:
    for file in git("ls-files"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    for command in (["git", "init", "-q"], ["git", "add", "-Af"], ["comfy", "--skip-prompt", "node", "pack"]):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert set(zipfile.ZipFile(tmp_path / "node.zip").namelist()) == archive
