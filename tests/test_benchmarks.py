"""The benchmarks run, their rows have what they promise, and the page of results shows what the files hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bootstrap import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import page

COLUMNS = {
    "guidance": {"task", "method", "steps", "nfe", "strength", "psnr", "ssim", "frechet", "success", "n"},
    "inverse": {"task", "method", "steps", "nfe", "strength", "psnr", "ssim", "frechet", "off_shell", "n"},
    "posterior": {"task", "dim", "method", "steps", "nfe", "strength", "wasserstein", "floor", "std_ratio", "n"},
    "epsilon_scaling": {"sampler", "steps", "correction", "b", "k", "frechet", "frechet_se", "n"},
    "amed": {"solver", "schedule", "learned", "nfe", "rmse", "n"},
    "cost": {"model", "gradient", "cfg", "interval", "checkpointing", "step_ratio", "peak_memory_mb"},
}
"""Of the rows with results; others say what they are."""


def test_page_shows_the_results() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "python benchmarks/page.py brings it up to date"


@pytest.mark.parametrize("name", [*COLUMNS, "inverse_open", "inverse_many"])
def test_results_have_their_columns(name: str) -> None:
    result = json.loads((page.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert {"benchmark", "host", "machine", "settings", "rows"} <= result.keys()
    whole, rest = rows(result, "inverse" if name.startswith("inverse") else name)
    assert whole
    notes = "reference", "tries", "diversity"
    assert all(row.get("settings") in notes or row.keys() == {"solver", "predictor", "over_euler"} for row in rest)


def rows(result: dict[str, Any], name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Those with all columns, and the others."""
    whole = [row for row in result["rows"] if row.keys() >= COLUMNS[name]]
    return whole, [row for row in result["rows"] if row not in whole]


@pytest.mark.slow
@pytest.mark.parametrize("name", COLUMNS)
def test_quick_run(name: str, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    command = [sys.executable, "-B", str(ROOT / "benchmarks" / f"{name}.py"), "--quick", "--json", str(file)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["benchmark"] == name
    assert rows(result, name)[0]
    assert run.stdout.strip()
    assert file.with_suffix(".png").exists()
