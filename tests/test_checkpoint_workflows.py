"""The workflows for checkpoints of one's own, on small ones of the same layout with random weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import random_checkpoints
from comfy_server import ComfyServer
from sphereguide.demo.run import load, node_of

pytestmark = [pytest.mark.server, pytest.mark.slow]

API = Path(__file__).resolve().parent.parent / "workflows" / "api"
PICTURE = "sphereguide_portrait.png"
TOY = "toy_portraits/"
SIDE = 32
LATENT = {"width": SIDE, "height": SIDE, "batch_size": 1}
SMALL: dict[str, dict[str, Any]] = {  # and networks that come with the pack
    "BasicScheduler": {"steps": 3},
    "EmptyLatentImage": LATENT,
    "EmptySD3LatentImage": LATENT,
    "ImageScale": {"width": SIDE // 4, "height": SIDE // 4},
    "LoadImage": {"image": PICTURE},
    "SphereGuideFaceIDLoss": {"crop": "fixed box"},
    "SphereGuideLoadFaceEncoder": {"name": TOY},
    "SphereGuideLoadOpenCLIP": {"model": TOY},
    "SphereGuideLoadSegmentationModel": {"name": TOY},
    "SphereGuideSegmentationLoss": {"class_name": "hair"},
    "SphereGuideSegmentationTarget": {"class_name": "skin"},
}
TINY = {"width": 16, "height": 16}
STEPS = {"values": "2, 5"}
TRAINING = {"cfg": 1.0, "steps": 1, "teacher_points": 1, "trajectories": 64, "batch_size": 64, "epochs": 1}
STEERED = [name for name in checkpoints.WORKFLOWS if not name.endswith(("amed_train", "amed_sample", "scaling"))]
UNETS = ["sd15", "sdxl"]


@pytest.fixture(scope="module")
def run(comfy_server: ComfyServer) -> Iterator[Callable[..., Any]]:
    """Runs the workflow of that name in small: what came of it, the prompt, and the pictures."""
    shutil.copy(API.parent / PICTURE, comfy_server.input)
    written = []

    def run_small(name: str, on_progress: Any = lambda _: None, **changes: dict[str, Any]) -> Any:
        family = name.split("_")[0]
        prompt = of_family(family, json.loads((API / f"{name}.json").read_text(encoding="utf-8")))
        for node in prompt.values():
            kind, inputs = node["class_type"], node["inputs"]
            small = {**SMALL.get(kind, {}), **changes.get(kind, {})}
            inputs |= {name: value for name, value in small.items() if not isinstance(inputs.get(name), list)}
            if kind == "CLIPTextEncode":  # the same in all of them: the host does not encode it again
                inputs["text"] = node["_meta"]["title"]
        file = prompt[node_of(prompt, "CheckpointLoaderSimple")]["inputs"]["ckpt_name"]
        path = comfy_server.base / "models" / "checkpoints" / file
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            random_checkpoints.write(random_checkpoints.LAYOUTS[family], path)
            written.append(path)
        done = comfy_server.run(prompt, on_progress=on_progress)
        saved = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]
        pictures = [picture for key in saved for picture in load(comfy_server.images(done, key))]
        return done, prompt, np.array(pictures, dtype=int)

    yield run_small
    for path in written:  # the page's tests queue these workflows, and don't mean to train SDXL
        path.unlink()


def of_family(family: str, prompt: dict[str, Any]) -> dict[str, Any]:
    """With ids of its own: the host of 2024 takes a node of another type from its cache, if id and inputs agree."""

    def renamed(value: Any) -> Any:
        return [f"{family} {value[0]}", value[1]] if isinstance(value, list) else value

    return {
        f"{family} {key}": {**node, "inputs": {name: renamed(value) for name, value in node["inputs"].items()}}
        for key, node in prompt.items()
    }


@pytest.mark.parametrize("name", STEERED)
def test_workflow_that_steers_runs_on_its_checkpoint_and_guides(run: Any, name: str) -> None:
    done, prompt, (picture,) = run(name)
    assert picture.shape == (SIDE, SIDE, 3) and picture.std() > 2
    (summary,) = done.outputs[node_of(prompt, "SphereGuideReport")]["text"]
    steps = "1 step" if name in ("sd15_style", "sdxl_style") else "2 steps"  # those are guided in the middle alone
    assert f"{steps} guided" in summary and "no steps skipped" in summary


@pytest.mark.parametrize("family", UNETS)
def test_epsilon_scaling_runs_on_its_checkpoint_and_changes_the_picture(run: Any, family: str) -> None:
    _, _, (off, little, more) = run(f"{family}_epsilon_scaling")
    assert 0 < np.abs(little - off).mean() < np.abs(more - off).mean()


def test_a_predictor_is_trained_for_its_checkpoint_and_drawn_with(run: Any) -> None:
    done, prompt, (drawn,) = run("sd15_amed_train", SphereGuideAMEDTrain=TRAINING, EmptyLatentImage=TINY)
    assert "ipndm with 2 model calls" in done.outputs[node_of(prompt, "SphereGuideAMEDTrain")]["text"][0]
    _, _, (learned, stock, fifty) = run("sd15_amed_sample", EmptyLatentImage=TINY, SphereGuideSweep=STEPS)
    assert drawn.shape == learned.shape == (16, 16, 3)
    assert np.abs(learned - stock).mean() > 0 and np.abs(stock - fifty).mean() > 0


def test_a_predictor_is_drawn_with_on_a_large_checkpoint(run: Any) -> None:
    of_another = {"name": "toy_portraits_ipndm_6.safetensors"}
    changes = {"SphereGuideAMEDLoad": of_another, "SphereGuideSweep": STEPS}
    _, _, (learned, stock, _) = run("sdxl_amed_sample", EmptyLatentImage=TINY, **changes)
    assert learned.shape == (16, 16, 3) and np.abs(learned - stock).mean() > 0


@pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="minutes for 64 trajectories of SDXL: on a checkout only")
def test_a_predictor_is_trained_for_a_large_checkpoint(run: Any) -> None:
    done, prompt, (drawn,) = run("sdxl_amed_train", SphereGuideAMEDTrain=TRAINING, EmptyLatentImage=TINY)
    assert "ipndm with 2 model calls" in done.outputs[node_of(prompt, "SphereGuideAMEDTrain")]["text"][0]
    assert drawn.shape == (16, 16, 3) and drawn.std() > 2
