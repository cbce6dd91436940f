"""The workflow files: written by their script, the same in both formats, and known to this host."""

from __future__ import annotations

import json
import shutil
import urllib.error
from itertools import pairwise
from pathlib import Path
from typing import Any

import build
import checkpoints
import numpy as np
import pytest
from comfy_server import ComfyServer, Run
from PIL import Image
from sphereguide.demo.run import RESTORED, STEERED, load, node_of, unguided
from wires import behind, crossings

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
NOT_IN_DEMO = {  # they take long, or need a checkpoint
    *checkpoints.WORKFLOWS,
    "toy_amed_sample",
    "toy_amed_train",
    "toy_calibrate",
    "toy_epsilon_scaling",
    "toy_strength_sweep",
}
PAGE_ONLY = {"Note", "Reroute"}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def read(*path: str) -> dict[str, Any]:
    return json.loads(ROOT.joinpath("workflows", *path).read_text(encoding="utf-8"))


def test_files_are_what_the_script_writes() -> None:
    for path, text in build.files().items():
        assert path.read_text(encoding="utf-8") == text, f"run workflows/build.py: {path.name} is not what it writes"
    assert set(WORKFLOWS) == set(build.WORKFLOWS) == {*RESTORED, *STEERED, *NOT_IN_DEMO}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_thumbnail_lies_beside_the_workflow(name: str) -> None:
    with Image.open(ROOT / "workflows" / f"{name}.jpg") as thumbnail:
        assert min(thumbnail.size) >= 256


@pytest.mark.parametrize("name", ["PICTURE", "MAP", "STYLE"])
def test_picture_of_the_workflows_lies_beside_them(name: str) -> None:
    with Image.open(ROOT / "workflows" / getattr(build, name)) as picture:
        assert picture.size == (128, 128)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_nodes_do_not_overlap_and_lie_in_their_groups(name: str) -> None:
    workflow = read(f"{name}.json")
    title = 30  # of a node or a group, above its position
    boxes = {
        node["id"]: (*node["pos"], node["pos"][0] + node["size"]["0"], node["pos"][1] + node["size"]["1"])
        for node in workflow["nodes"]
    }
    bare = {node["id"] for node in workflow["nodes"] if node["type"] == "Reroute"}  # without a title
    for one, (left, top, right, bottom) in boxes.items():
        for other, (x0, y0, x1, y1) in boxes.items():
            apart = right <= x0 or x1 <= left or bottom + title * (other not in bare) <= y0
            apart = apart or y1 + title * (one not in bare) <= top
            assert one == other or apart, f"nodes {one} and {other} overlap"
        inside = [
            (x, y, x + width, y + height)
            for x, y, width, height in (group["bounding"] for group in workflow["groups"])
            if not (one in bare or right <= x or x + width <= left or bottom <= y or y + height <= top)
        ]
        assert all(x <= left and y + title <= top and right <= x1 and bottom <= y1 for x, y, x1, y1 in inside)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_wires_run_from_left_to_right(name: str) -> None:
    workflow = read(f"{name}.json")
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for _, source, _, target, _, _ in workflow["links"]:
        right = nodes[source]["pos"][0] + nodes[source]["size"]["0"]
        assert right < nodes[target]["pos"][0] or nodes[source]["pos"][0] == nodes[target]["pos"][0]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_no_wire_passes_behind_a_node_and_few_cross(name: str) -> None:
    """None at all is impossible: a checkpoint gives MODEL, CLIP and VAE in that order, a sampler wants another."""
    workflow = read(f"{name}.json")
    assert behind(workflow) == []
    samplers = sum(node["type"] == "SamplerCustom" for node in workflow["nodes"])
    assert len(crossings(workflow)) <= len(workflow["links"]) * (1 if samplers > 1 else 0.7)


def to_api(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """What the page would send for this workflow: widgets in the order in which the host lists them."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    behind = {str(node["id"]): node["inputs"][0]["link"] for node in workflow["nodes"] if node["type"] == "Reroute"}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in PAGE_ONLY:
            continue
        declared = object_info[node["type"]]["input"]
        inputs = {}
        values = iter(node["widgets_values"])
        for name, (kind, *options) in {**declared.get("required", {}), **declared.get("optional", {})}.items():
            if not (isinstance(kind, list) or kind in WIDGETS):
                continue
            inputs[name] = next(values)
            if name in ("seed", "noise_seed"):
                assert next(values) == "fixed"  # control_after_generate, which the page adds
            if options and options[0].get("image_upload"):
                assert next(values) == "image"  # the upload button
        assert not list(values), f"{node['type']} has more widget values than widgets"
        for socket in node["inputs"]:
            if socket["link"] is not None:
                wire = links[socket["link"]]
                while wire[0] in behind:
                    wire = links[behind[wire[0]]]
                inputs[socket["name"]] = wire
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


@pytest.mark.server
@pytest.mark.parametrize("name", WORKFLOWS)
def test_page_format_converts_to_the_api_twin(comfy_server: ComfyServer, name: str) -> None:
    twin = {
        key: {part: node[part] for part in ("class_type", "inputs")}
        for key, node in read("api", f"{name}.json").items()
    }
    assert to_api(read(f"{name}.json"), comfy_server.get_json("/object_info")) == twin


@pytest.mark.server
@pytest.mark.parametrize("name", WORKFLOWS)
def test_sockets_are_those_of_this_host(comfy_server: ComfyServer, name: str) -> None:
    object_info = comfy_server.get_json("/object_info")
    for node in read(f"{name}.json")["nodes"]:
        if node["type"] in PAGE_ONLY:
            continue
        info = object_info[node["type"]]
        declared = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        sockets = [key for key, (kind, *_) in declared.items() if not (isinstance(kind, list) or kind in WIDGETS)]
        assert [socket["name"] for socket in node["inputs"] if "widget" not in socket] == sockets
        assert all(declared[socket["name"]][0] == socket["type"] for socket in node["inputs"] if "widget" in socket)
        outputs = len(node["outputs"])  # newer hosts have added some at the end of core nodes
        assert [socket["type"] for socket in node["outputs"]] == info["output"][:outputs]
        assert [socket["name"] for socket in node["outputs"]] == info["output_name"][:outputs]


@pytest.mark.server
def test_the_host_lists_the_workflows_as_templates_of_the_pack_and_serves_them(comfy_server: ComfyServer) -> None:
    try:
        listed = comfy_server.get_json("/api/workflow_templates")
    except urllib.error.HTTPError as error:
        assert error.code == 404
        pytest.skip("this ComfyUI has no templates of packs")
    ((pack, names),) = listed.items()
    assert sorted(names) == WORKFLOWS
    for name in names:
        template, thumbnail = (f"/api/workflow_templates/{pack}/{name}{ending}" for ending in (".json", ".jpg"))
        assert comfy_server.get_json(template) == read(f"{name}.json")
        assert comfy_server.get(thumbnail).startswith(b"\xff\xd8")


@pytest.mark.server
@pytest.mark.parametrize("name", STEERED)
def test_workflow_that_steers_runs_and_makes_another_picture_than_without_guidance(
    comfy_server: ComfyServer, name: str
) -> None:
    for picture in STEERED[name].pictures:
        shutil.copy(ROOT / "workflows" / picture, comfy_server.input)
    prompt = read("api", f"{name}.json")
    prompt[node_of(prompt, "BasicScheduler")]["inputs"]["steps"] = 3
    save = node_of(prompt, "SaveImage")
    guided, plain = (load(comfy_server.images(comfy_server.run(one), save))[0] for one in (prompt, unguided(prompt)))
    assert guided.shape == (128, 128, 3)
    assert np.abs(guided.astype(int) - plain).mean() > 1


@pytest.mark.server
def test_the_sweep_makes_another_picture_for_each_strength(comfy_server: ComfyServer) -> None:
    prompt = read("api", "toy_strength_sweep.json")
    prompt[node_of(prompt, "BasicScheduler")]["inputs"]["steps"] = 6
    sweep, save = node_of(prompt, "SphereGuideSweep"), node_of(prompt, "SaveImage")
    pictures = np.array(load(comfy_server.images(comfy_server.run(prompt), save)), dtype=int)
    rates = [float(value) for value in prompt[sweep]["inputs"]["values"].split(",")]
    assert len(pictures) == len(rates) and rates == sorted(rates) and (rates[0], rates[-1]) == (0, 1)
    assert all(np.abs(one - other).mean() > 1 for one, other in pairwise(pictures))
    prompt[node_of(prompt, "SphereGuideDSG")]["inputs"]["guidance_rate"] = rates[2]
    (alone,) = load(comfy_server.images(comfy_server.run(prompt), save))
    assert np.array_equal(alone, pictures[2])


@pytest.mark.server
def test_the_corrections_side_by_side_begin_with_the_same_pictures(comfy_server: ComfyServer) -> None:
    prompt = read("api", "toy_epsilon_scaling.json")
    short(prompt)
    run = comfy_server.run(prompt)
    pictures = drawn(comfy_server, prompt, run)
    off, uniform = pictures["Without, and uniform"].reshape(2, 4, 128, 128, 3)
    calibrated = pictures["Calibrated"]
    assert np.abs(uniform - off).mean() > 0.5
    # With so few samples the calibration may say that there is no evidence: then it is off to the bit.
    (verdict,) = run.outputs[node_of(prompt, "SphereGuideEpsilonScalingCalibrate")]["text"]
    assert verdict.startswith(("Use the schedule", "Leave the correction off"))
    assert (np.abs(calibrated - off).max() == 0) == verdict.startswith("Leave")


@pytest.mark.server
def test_the_calibration_draws_its_curves(comfy_server: ComfyServer) -> None:
    prompt = read("api", "toy_calibrate.json")
    short(prompt)
    (curves,) = load(comfy_server.images(comfy_server.run(prompt), node_of(prompt, "SaveImage")))
    assert curves.shape == (400, 1200, 3) and curves.std() > 10


@pytest.mark.server
def test_a_predictor_is_trained_saved_and_drawn_with(comfy_server: ComfyServer) -> None:
    prompt = read("api", "toy_amed_train.json")
    train, save = (node_of(prompt, f"SphereGuideAMED{name}") for name in ("Train", "Save"))
    prompt[train]["inputs"] |= {"trajectories": 4, "batch_size": 4, "epochs": 1, "steps": 1, "name": "tests/kept"}
    prompt[save]["inputs"]["name"] = "tests/saved"
    run = comfy_server.run(prompt)
    pictures = np.array(load(comfy_server.images(run, node_of(prompt, "SaveImage"))))
    assert pictures.shape == (4, 128, 128, 3) and pictures.std((1, 2, 3)).min() > 10
    assert "ipndm with 2 model calls" in run.outputs[train]["text"][0]
    names = comfy_server.get_json("/object_info/SphereGuideAMEDLoad")["SphereGuideAMEDLoad"]["input"]["required"][
        "name"
    ][0]
    assert {"tests/kept.training.safetensors", "tests/saved.safetensors"} <= set(names)


@pytest.mark.server
def test_six_learned_calls_come_nearer_to_fifty_than_six_stock_ones(comfy_server: ComfyServer) -> None:
    prompt = read("api", "toy_amed_sample.json")
    pictures = drawn(comfy_server, prompt, comfy_server.run(prompt))
    learned = pictures["AMED with 6 calls, four pictures"]
    stock, fifty = pictures["Stock with 6 calls, then with 50, four each"].reshape(2, 4, 128, 128, 3)
    assert np.abs(learned - fifty).mean() < np.abs(stock - fifty).mean()


def drawn(server: ComfyServer, prompt: dict[str, Any], run: Run) -> dict[str, np.ndarray]:
    """The pictures of each Save Image, by its title."""
    return {
        node["_meta"]["title"]: np.array(load(server.images(run, key)), dtype=int)
        for key, node in prompt.items()
        if node["class_type"] == "SaveImage"
    }


def short(prompt: dict[str, Any]) -> None:
    """Two steps, few samples."""
    prompt[node_of(prompt, "BasicScheduler")]["inputs"]["steps"] = 2
    prompt[node_of(prompt, "SphereGuideEpsilonScalingCalibrate")]["inputs"] |= {"samples": 4, "batch_size": 4}
    prompt[node_of(prompt, "SphereGuideDrawToyPortraits")]["inputs"]["count"] = 8
