"""The JSON file of a benchmark, kept cell by cell so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Result", "interval", "machine", "save"]


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % of the bootstrap, of the mean of `[N]`."""
    draws = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
    return round(float(low), 4), round(float(high), 4)


def save(figure: Any, path: Path) -> None:
    """A plot, in as few bytes as show it."""
    from PIL import Image

    figure.savefig(path)
    Image.open(path).quantize(64).save(path, optimize=True)


def machine() -> dict[str, Any]:
    import comfy.model_management
    import torch

    device = comfy.model_management.get_torch_device()
    return {
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


class Result:
    """`{"benchmark", "host", "machine", "settings", "rows"}`, in `path` once it is complete; with None, nowhere.

    Until then the rows lie in `<path>.partial.json`, and a run of the same host, machine and settings takes them over,
    with what it keeps in `folder`. Others begin anew.
    """

    def __init__(self, benchmark: str, settings: dict[str, Any], path: Path | None, quick: bool = False) -> None:
        self.quick = quick
        host = {"comfyui": getattr(sys.modules.get("comfyui_version"), "__version__", "0.0.1 (PyPI)")}
        settings = settings | ({"quick": True} if quick else {})
        self.head = {"benchmark": benchmark, "host": host, "machine": machine(), "settings": settings}
        self.rows: list[dict[str, Any]] = []
        self.path = path
        self.partial = path.with_suffix(".partial.json") if path else None
        self._temporary = None if path else tempfile.TemporaryDirectory()  # goes with this object
        self._folder = path.with_suffix(".partial") if path else Path(self._temporary.name)
        earlier = json.loads(self.partial.read_text()) if self.partial and self.partial.exists() else {}
        if {**earlier, "rows": []} == {**self.head, "rows": []}:
            self.rows = earlier["rows"]
        else:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def folder(self) -> Path:
        """For what takes long and is no row. It goes when the result is complete."""
        if not self._folder.exists():
            self._folder.mkdir(parents=True)
            self.keep()  # so that a later run knows whose it is
        return self._folder

    def find(self, cell: dict[str, Any]) -> dict[str, Any] | None:
        """The row of this cell, if it is there."""
        return next((row for row in self.rows if cell.items() <= row.items()), None)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.keep()

    def keep(self) -> None:
        if self.partial:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self.partial.write_text(json.dumps({**self.head, "rows": self.rows}))

    def finish(self, draw: Callable[[list[dict[str, Any]], Path], None] | None = None, whole: bool = True) -> None:
        """Writes the result and its plot, of the whole plan; the rows of a part stay for a later run."""
        if not whole and not self.quick:
            print("A part of the plan: the rows are kept, and a run of the whole plan takes them over.")
            return
        if self.path and self.partial:
            self.path.write_text(json.dumps({**self.head, "rows": self.rows}, indent=1) + "\n")
            if draw:
                draw(self.rows, self.path.with_suffix(".png"))
            self.partial.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)
