"""The workflows in ComfyUI's own page, in a browser. Needs Chromium, node and playwright-core; skipped without them.

`npm install playwright-core` in any folder, and NODE_PATH=<that folder>/node_modules, is enough.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from comfy_server import ComfyServer
from sphereguide.demo.run import RESTORED, STEERED, load, node_of

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def reason_to_skip() -> str:
    if not CHROMIUM:
        return "no Chromium on the PATH"
    if not (node := shutil.which("node")):
        return "no node on the PATH"
    if subprocess.run([node, "-e", "require('playwright-core')"], capture_output=True).returncode:
        return "node does not find playwright-core: npm install playwright-core, and set NODE_PATH"
    return ""


pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.skipif(reason_to_skip() != "", reason=reason_to_skip())]


def dropped(server: ComfyServer, workflow: dict, tmp_path: Path, **environment: str) -> dict:
    """What the page says of the workflow, which it has been given and has queued."""
    return in_page("page.cjs", server, workflow, tmp_path, **environment)


def in_page(
    script: str, server: ComfyServer, workflow: dict, tmp_path: Path, *arguments: str, **environment: str
) -> dict:
    """What a script of the tests says, which has given the workflow to the page."""
    for picture in (ROOT / "workflows").glob("sphereguide_*.png"):
        shutil.copy(picture, server.input)
    (path := tmp_path / "workflow.json").write_text(json.dumps(workflow), encoding="utf-8")
    page = subprocess.run(
        ["node", str(ROOT / "tests" / script), server.url, str(path), *arguments],
        env={**os.environ, "CHROMIUM": CHROMIUM or "", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert page.returncode == 0, page.stderr
    seen = json.loads(page.stdout)
    assert seen["missing"] == []
    return seen


def read(name: str, steps: int) -> tuple[dict, dict]:
    """The workflow for the page and its twin for the server, with fewer steps: time matters, their number does not."""
    workflow = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    twin = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for key, node in twin.items():
        if isinstance(node["inputs"].get("steps"), int) and node["class_type"] != "SphereGuideAMEDTrain":
            (drawn,) = (one for one in workflow["nodes"] if str(one["id"]) == key)
            drawn["widgets_values"][drawn["widgets_values"].index(node["inputs"]["steps"])] = steps
            node["inputs"]["steps"] = steps
    return workflow, twin


def asked(prompt: dict) -> dict:
    return {
        # The older page sends its upload button along.
        key: (node["class_type"], {name: value for name, value in node["inputs"].items() if name != "upload"})
        for key, node in prompt.items()
    }


@pytest.mark.parametrize("name", [*RESTORED, *STEERED])
def test_workflow_dropped_on_the_page_gives_the_picture_of_its_api_twin(
    comfy_server: ComfyServer, name: str, tmp_path: Path
) -> None:
    workflow, twin = read(name, steps=4)
    earlier = comfy_server.get_json("/history").keys()
    assert asked(dropped(comfy_server, workflow, tmp_path)["prompt"]) == asked(twin)

    save = node_of(twin, "SaveImage")
    from_page = finished(comfy_server, earlier)["outputs"][save]["images"]
    twin[node_of(twin, "SphereGuideDSG")]["inputs"]["end_percent"] = 0.999  # past the cache: no step lies so late
    run = comfy_server.run(twin)
    assert node_of(twin, "SamplerCustom") not in run.cached
    for image, expected in zip(from_page, load(comfy_server.images(run, save)), strict=True):
        query = {key: image[key] for key in ("filename", "subfolder", "type")}
        np.testing.assert_array_equal(load([comfy_server.get("/view", **query)])[0], expected)


def test_the_sweep_dropped_on_the_page_is_its_api_twin(comfy_server: ComfyServer, tmp_path: Path) -> None:
    workflow, twin = read("toy_strength_sweep", steps=2)
    earlier = comfy_server.get_json("/history").keys()
    assert asked(dropped(comfy_server, workflow, tmp_path)["prompt"]) == asked(twin)
    assert len(finished(comfy_server, earlier)["outputs"][node_of(twin, "SaveImage")]["images"]) == 7


def test_a_training_says_on_its_node_what_came_of_it(comfy_server: ComfyServer, tmp_path: Path) -> None:
    workflow, twin = read("toy_amed_train", steps=0)
    key = node_of(twin, "SphereGuideAMEDTrain")
    (node,) = (node for node in workflow["nodes"] if str(node["id"]) == key)
    small = {"steps": 1, "trajectories": 4, "epochs": 1, "batch_size": 4, "name": "tests/page"}
    for name, value in small.items():
        node["widgets_values"][list(twin[key]["inputs"]).index(name)] = value
    twin[key]["inputs"] |= small
    seen = dropped(comfy_server, workflow, tmp_path, SAYS="SphereGuideAMEDTrain")
    assert asked(seen["prompt"]) == asked(twin)
    assert seen["said"].startswith("ipndm with 2 model calls comes out ")


def test_the_scheduler_of_a_predictor_says_for_what_it_is(comfy_server: ComfyServer, tmp_path: Path) -> None:
    workflow, twin = read("toy_amed_sample", steps=0)
    seen = dropped(comfy_server, workflow, tmp_path, SAYS="SphereGuideAMEDScheduler")
    assert asked(seen["prompt"]) == asked(twin)
    assert seen["said"].startswith("ipndm, 6 model calls") and "It was trained for this model." in seen["said"]


@pytest.mark.parametrize("name", ["sd15_text_style", "sdxl_segmentation", "sdxl_amed_train", "sd3_super_resolution"])
def test_workflow_for_a_checkpoint_dropped_on_the_page_is_its_api_twin(
    comfy_server: ComfyServer, name: str, tmp_path: Path
) -> None:
    workflow, twin = read(name, steps=3)
    assert asked(dropped(comfy_server, workflow, tmp_path)["prompt"]) == asked(twin)  # its checkpoint is not here


def test_the_report_says_on_the_node_what_happened_and_leaves_the_prompt_alone(
    comfy_server: ComfyServer, tmp_path: Path
) -> None:
    workflow, twin = read("toy_inpainting", steps=5)
    seen = dropped(comfy_server, workflow, tmp_path, SAYS="SphereGuideReport")
    first, sample = seen["said"].splitlines()
    assert first.startswith("DSG Guidance: 4 steps guided, sigma ")
    assert sample.startswith("sample 1: loss ") and sample.endswith("no steps skipped")
    assert asked(seen["later"]) == asked(twin)


@pytest.mark.parametrize(("name", "samples"), [("toy_calibrate", 4), ("toy_epsilon_scaling", 5)])
def test_the_calibration_says_its_verdict_on_the_node(
    comfy_server: ComfyServer, name: str, samples: int, tmp_path: Path
) -> None:
    workflow, twin = read(name, steps=2)
    for widgets in (node["widgets_values"] for node in workflow["nodes"] if "Calibrate" in node["type"]):
        widgets[1] = samples  # another number: from the cache the page gets no verdict
    twin[node_of(twin, "SphereGuideEpsilonScalingCalibrate")]["inputs"]["samples"] = samples
    seen = dropped(comfy_server, workflow, tmp_path, SAYS="SphereGuideEpsilonScalingCalibrate")
    assert asked(seen["prompt"]) == asked(twin)
    assert f"{samples} samples leave b uncertain" in seen["said"]


def test_a_session_drop_queue_turn_the_strength_queue_and_drop_the_picture(
    comfy_server: ComfyServer, tmp_path: Path
) -> None:
    workflow, twin = read("toy_inpainting", steps=4)
    seen = in_page("session.cjs", comfy_server, workflow, tmp_path, "0.7")
    dropped, once, twice, back = (seen[moment] for moment in ("dropped", "once", "twice", "back"))
    assert seen["errors"] == []
    assert asked(dropped["prompt"]) == asked(once["prompt"]) == asked(back["prompt"]) == asked(twin)
    assert twice["rate"] == pytest.approx(0.7)
    assert once["pixels"] != twice["pixels"]
    assert back["rate"] == dropped["rate"] == 0.2

    # The curve: nothing before a run, a point a guided step, anew in each run; the node keeps its height.
    assert dropped["curve"] == back["curve"] == []
    assert [step for step, _ in once["curve"]] == [step for step, _ in twice["curve"]] == [0, 1, 2]
    assert once["curve"] != twice["curve"]
    assert all(loss > 0 for _, (loss,) in once["curve"])
    assert seen["elsewhere"]["curve"] == twice["curve"]  # while another workflow runs
    assert {moment["height"] for moment in (dropped, once, twice, back)} == {dropped["height"]}

    # What was drawn or said is not in the saved workflow, and no value there has moved.
    written = values(workflow["nodes"])
    assert values(dropped["saved"]) == values(once["saved"]) == values(back["saved"]) == written
    assert all("loss curve" not in node.get("widgets_values_named", {}) for node in once["saved"])


def values(nodes: list[dict]) -> dict[int, list]:
    """What a saved workflow holds of the widgets of the pack's nodes."""
    return {node["id"]: node.get("widgets_values") or [] for node in nodes if node["type"].startswith("SphereGuide")}


def finished(server: ComfyServer, earlier: set[str], timeout: float = 300.0) -> dict:
    """The history of the prompt that is not among the earlier ones, once it is there."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        history = server.get_json("/history")
        if new := history.keys() - earlier:
            return history[new.pop()]
        time.sleep(0.5)
    raise TimeoutError(f"The page's prompt was not done within {timeout:.0f} seconds.{server.log_tail()}")
