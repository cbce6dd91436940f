"""Makes the pack and its host importable, and starts the ComfyUI server that the end-to-end tests drive.

The repository root *is* the package, and its folder may be called anything: here it is always imported as
`sphereguide`. The host is the checkout that `COMFYUI_PATH` names, or else the PyPI package `comfyui`. Tests in this
process run on the CPU; the modules of `demo/` are importable by their bare names, as they are for `demo/run.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOST = os.environ.get("COMFYUI_PATH")


class RootIsThePack:
    """The root's `__init__.py` belongs to the pack: pytest must not import it as a package of tests."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(RootIsThePack())
    # `python -m pytest` puts the root on the path, where the pack's `nodes` would hide ComfyUI's.
    sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]
    import_host()
    import_pack()


def import_host() -> None:
    """Make `comfy`, `folder_paths` and their like importable as they are inside a running ComfyUI, on the CPU."""
    if HOST:
        sys.path.insert(0, str(Path(HOST).resolve()))
    import comfy.options

    # The command line is pytest's: ComfyUI's own defaults hold, except for the device.
    comfy.options.args_parsing = False
    from comfy.cli_args import args

    args.cpu = True
    # ComfyUI makes its folders where it is told to, which must not be where pytest happens to run.
    args.cwd = args.base_directory = tempfile.mkdtemp(prefix="sphereguide-tests-")

    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or min(4, os.cpu_count() or 1)))

    if not HOST:  # The packaged host gives custom nodes ComfyUI's module names in the same way.
        for name in ("folder_paths", "latent_preview"):
            sys.modules[name] = importlib.import_module(f"comfy.cmd.{name}")
        sys.modules["node_helpers"] = importlib.import_module("comfy.node_helpers")


def import_pack() -> None:
    if "sphereguide" in sys.modules or not (ROOT / "__init__.py").exists():
        return
    spec = importlib.util.spec_from_file_location(
        "sphereguide", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["sphereguide"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


@pytest.fixture(scope="session")
def comfy_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """A running ComfyUI with the pack, in a folder with a hyphen in its name, as a browser's ZIP download has."""
    from comfy_server import ComfyServer

    with ComfyServer(tmp_path_factory.mktemp("comfyui"), pack_name="sphere-guide-main") as server:
        yield server
