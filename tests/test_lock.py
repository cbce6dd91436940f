"""requirements-lock.txt: what quickstart.py installs for the embedded host, each file by its hash."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("quickstart", ROOT / "quickstart.py")
quickstart = importlib.util.module_from_spec(spec)
spec.loader.exec_module(quickstart)

PYTHONS = ["3.10", "3.11", "3.12"]
SYSTEMS = [("linux", "Linux", "posix"), ("darwin", "Darwin", "posix"), ("win32", "Windows", "nt")]
OF_TORCH = re.compile(r"torch|torchvision|triton|(nvidia|cuda)-.*")


def lines(name: str) -> list[str]:
    text = (ROOT / f"requirements-{name}.txt").read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


LOCK = lines("lock")
DIRECT = [Requirement(line) for name in ("dev", "host") for line in lines(name)]
DIRECT += [Requirement(quickstart.EMBEDDED_HOST), Requirement(quickstart.FACENET)]


def environment(python: str, system: tuple[str, str, str]) -> dict[str, str]:
    names = dict(zip(("sys_platform", "platform_system", "os_name"), system, strict=True))
    return {
        **default_environment(),
        "python_version": python,
        "python_full_version": f"{python}.9",
        "extra": "",
        **names,
    }


def locked(python: str, system: tuple[str, str, str] = SYSTEMS[0]) -> dict[str, str]:
    """The versions that hold there, by name."""
    found: dict[str, str] = {}
    for line in LOCK:
        requirement = Requirement(line.partition("--hash")[0].strip())
        if requirement.marker is None or requirement.marker.evaluate(environment(python, system)):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} is there twice for Python {python}"
            (pin,) = requirement.specifier
            assert pin.operator == "=="
            found[name] = pin.version
    return found


def test_every_line_names_one_version_and_the_hashes_of_its_files() -> None:
    assert len(LOCK) > 100
    for line in LOCK:
        requirement, *hashes = line.split("--hash=")
        assert re.fullmatch(r"[a-z0-9-]+==\S+\s*(; .+)?\s*", requirement), requirement
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest.strip()) for digest in hashes), line


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system[1])
@pytest.mark.parametrize("python", PYTHONS)
def test_it_holds_what_the_requirements_ask_for(python: str, system: tuple[str, str, str]) -> None:
    """A pin that is changed in requirements-dev.txt or requirements-host.txt has to be locked anew."""
    found = locked(python, system)
    for requirement in DIRECT:
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate(environment(python, system)):
            continue
        if not OF_TORCH.fullmatch(name):
            assert name in found and found[name] in requirement.specifier, f"{requirement}: run .ci/lock.py"


def test_it_holds_what_these_need_in_turn() -> None:
    """By what the packages say that are installed here: nothing is left to be resolved when they are installed."""
    python = "{}.{}".format(*sys.version_info)
    if python not in PYTHONS or os.environ.get("COMFYUI_PATH"):
        pytest.skip("this environment is not that of the embedded host")
    found = locked(python, (sys.platform, *next(s[1:] for s in SYSTEMS if s[0] == sys.platform)))
    alone = {canonicalize_name(Requirement(pin).name) for pin in (quickstart.EMBEDDED_HOST, quickstart.FACENET)}
    for name, version in found.items():
        assert importlib.metadata.version(name) == version, f"{name} is not as locked: run quickstart.py"
        for text in [] if name in alone else importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            wanted = needed.marker is None or needed.marker.evaluate({"extra": ""})
            other = canonicalize_name(needed.name)
            if wanted and not OF_TORCH.fullmatch(other):
                assert other in found and needed.specifier.contains(found[other], prereleases=True), f"{name}: {text}"


def test_torch_needs_nothing_unlocked_but_its_own_parts() -> None:
    python = "{}.{}".format(*sys.version_info)
    if python not in PYTHONS or os.environ.get("COMFYUI_PATH"):
        pytest.skip("this environment is not that of the embedded host")
    found = locked(python)
    for name in ("torch", "torchvision"):
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                other = canonicalize_name(needed.name)
                assert OF_TORCH.fullmatch(other) or found[other] in needed.specifier, text


# -- what quickstart.py does with it -----------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """What pip is called with to prepare an environment; nothing is installed."""
    calls: list[list[str]] = []
    monkeypatch.setattr(quickstart, "environment_path", lambda checkout: tmp_path / ".venv")
    monkeypatch.setattr(quickstart, "make_venv", lambda venv, log: venv.mkdir())
    monkeypatch.setattr(quickstart, "reachable", lambda url: True)

    def install(python: Path, log: Path, arguments: Any) -> None:
        log.touch()
        calls.append(list(arguments))

    monkeypatch.setattr(quickstart, "install", install)
    return calls


def test_the_embedded_host_is_installed_by_hash(installed: list[list[str]]) -> None:
    quickstart.prepare(None)
    by_hash, torch = installed
    assert by_hash == ["--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", str(quickstart.LOCK)]
    pins = [argument for argument in torch if "==" in argument]
    assert [pin.partition("==")[0] for pin in pins] == ["torch", "torchvision"]
    # An index beside PyPI could offer any package of the same name: it is asked for torch alone.
    assert set(torch) - set(pins) <= {"--extra-index-url", "https://download.pytorch.org/whl/cpu"} | set(torch[:2])
    assert "--extra-index-url" not in by_hash


def test_a_changed_lock_is_installed(
    installed: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quickstart.prepare(None)
    python = quickstart.python_of(tmp_path / ".venv")
    python.parent.mkdir(parents=True)
    python.touch()
    quickstart.prepare(None)
    assert len(installed) == 2
    changed = tmp_path / "lock.txt"
    changed.write_text(quickstart.LOCK.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    monkeypatch.setattr(quickstart, "LOCK", changed)
    quickstart.prepare(None)
    assert len(installed) == 4


def test_a_file_of_another_hash_is_not_installed(tmp_path: Path) -> None:
    """pip itself, on a package of our own, in this environment's place for things to try."""
    wheel = tmp_path / "nothing_sphereguide-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("nothing_sphereguide.py", "")
        archive.writestr("nothing_sphereguide-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        archive.writestr(
            "nothing_sphereguide-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: nothing-sphereguide\nVersion: 1\n"
        )
    right = hashlib.sha256(wheel.read_bytes()).hexdigest()
    options = [*quickstart.LOCKED[:-1], "-", "--no-index", "--find-links", str(tmp_path), "--dry-run"]
    for digest, matches in ((right, True), ("0" * 64, False)):
        listed = tmp_path / "lock.txt"
        listed.write_text(f"nothing-sphereguide==1 --hash=sha256:{digest}\n", encoding="utf-8")
        arguments = [str(listed) if option == "-" else option for option in options]
        if matches:
            quickstart.install(Path(sys.executable), tmp_path / "install.log", arguments)
            continue
        with pytest.raises(quickstart.Problem, match=r"DO NOT MATCH THE HASHES|Expected sha256"):
            quickstart.install(Path(sys.executable), tmp_path / "install.log", arguments)
