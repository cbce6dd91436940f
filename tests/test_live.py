"""What guidance tells the page while it samples: the event `sphereguide.trace`."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import comfy.samplers
import gaussian_mixture
import numpy as np
import pytest
import torch
from comfy_server import ComfyServer
from sphereguide import NODE_CLASS_MAPPINGS
from sphereguide.demo.run import load, node_of
from sphereguide.samplers.dps import Posterior, posterior_guided
from sphereguide.samplers.dsg import Guidance, guided
from sphereguide.samplers.trace import GuidanceTrace
from test_dsg import Distance
from test_guidance_node import SETTINGS, guide

WORKFLOWS = Path(__file__).resolve().parent.parent / "workflows"


class StubServer:
    """What ComfyUI's server shows of itself while it runs a prompt."""

    client_id: str | None = "page"
    last_prompt_id = "prompt 1"

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict, str]] = []
        self.extra_data: dict = {"extra_pnginfo": {"workflow": {"id": "tab 1"}}}
        self.prompt_queue = self

    def get_current_queue(self) -> tuple[list[tuple], list[tuple]]:
        return [(0, self.last_prompt_id, {}, self.extra_data, [])], []

    def send_sync(self, event: str, data: dict, client: str) -> None:
        self.sent.append((event, json.loads(json.dumps(data, allow_nan=False)), client))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> StubServer:
    stub = StubServer()
    module = SimpleNamespace(PromptServer=SimpleNamespace(instance=stub))
    monkeypatch.setitem(sys.modules, "server", module)
    return stub


def sample(sampler: comfy.samplers.KSAMPLER, batch: int = 2, steps: int = 5) -> torch.Tensor:
    return gaussian_mixture.sample(sampler, gaussian_mixture.patcher(), batch=batch, steps=steps)


def test_a_run_tells_that_it_begins_and_each_guided_step_to_the_page_that_runs_it(server):
    sampler, trace = guide(unique_id="12:3")
    sample(sampler)
    begun, *steps = server.sent
    common = {"node": "12:3", "steps": 5, "prompt_id": "prompt 1"}
    assert begun == ("sphereguide.trace", {**common, "workflow": "tab 1"}, "page")
    assert len(trace.steps) == 4
    assert steps == [
        ("sphereguide.trace", {**common, "step": step.step, "loss": step.loss}, "page") for step in trace.steps
    ]


def test_a_cached_sampler_tells_the_page_of_its_later_run(server):
    sampler, _ = guide(unique_id="7")
    sample(sampler)
    first = [data for _, data, _ in server.sent]
    server.sent, server.client_id, server.last_prompt_id = [], "other page", "prompt 2"
    sample(sampler)
    assert {client for *_, client in server.sent} == {"other page"}
    assert [data for _, data, _ in server.sent] == [{**data, "prompt_id": "prompt 2"} for data in first]


@pytest.mark.parametrize("guides", [guided, posterior_guided])
def test_who_listens_does_not_change_the_image(server, guides):
    objective = Guidance(Distance()) if guides is guided else Posterior(Distance())
    plain = comfy.samplers.ksampler("euler_ancestral")
    told, silent = (sample(guides(plain, objective, GuidanceTrace(node))) for node in ("7", None))
    assert len([data for _, data, _ in server.sent if "step" in data]) == (4 if guides is guided else 5)
    assert torch.equal(told, silent)
    server.sent, server.client_id = [], None  # queued by nobody who listens
    assert torch.equal(sample(guides(plain, objective, GuidanceTrace("7"))), silent)
    assert server.sent == []
    del sys.modules["server"]
    assert torch.equal(sample(guides(plain, objective, GuidanceTrace("7"))), silent)


def test_a_loss_that_is_not_finite_is_told_as_none(server):
    class Broken(Distance):
        def forward(self, latents, step=None):
            return super().forward(latents) * (torch.tensor([1.0, torch.nan]) if step.index == 2 else 1)

    sampler, _ = guide(loss=Broken(), unique_id="7")
    sample(sampler)
    gaps = [[value is None for value in data["loss"]] for _, data, _ in server.sent if "loss" in data]
    assert gaps == [[False, False], [False, False], [False, True], [False, False]]


def test_a_run_that_guides_nothing_tells_that_it_begins(server):
    sampler, _ = guide(guidance_rate=0.0, unique_id="7")
    sample(sampler)
    begun = {"node": "7", "steps": 5, "prompt_id": "prompt 1", "workflow": "tab 1"}
    assert [data for _, data, _ in server.sent] == [begun]


@pytest.mark.parametrize("extra_data", [{}, {"extra_pnginfo": "text"}, {"extra_pnginfo": {"workflow": {"id": [1]}}}])
def test_a_prompt_from_elsewhere_has_no_workflow(server, extra_data):
    server.extra_data = extra_data
    sampler, _ = guide(unique_id="7")
    sample(sampler)
    assert server.sent[0][1]["workflow"] is None


def test_every_node_with_a_trace_knows_its_id():
    tracing = [node for node in NODE_CLASS_MAPPINGS.values() if "GUIDANCE_TRACE" in node.RETURN_TYPES]
    assert len(tracing) >= 4
    for node in tracing:
        assert node.INPUT_TYPES()["hidden"] == {"unique_id": "UNIQUE_ID"}


def test_dps_guidance_passes_its_id_on(server):
    settings = {name: value for name, value in SETTINGS.items() if name != "guidance_rate"}
    plain = comfy.samplers.ksampler("euler_ancestral")
    sampler, _ = NODE_CLASS_MAPPINGS["SphereGuideDPS"]().guide(
        plain, Distance(), step_size=0.1, unique_id="7", **settings
    )
    sample(sampler)
    assert [data.get("step") for _, data, _ in server.sent if data["node"] == "7"] == [None, 0, 1, 2, 3, 4]


def test_a_guided_model_passes_its_id_on(server):
    pytest.importorskip("comfy.patcher_extension")
    node = NODE_CLASS_MAPPINGS["SphereGuideDSGModel"]()
    model, _ = node.guide(gaussian_mixture.patcher(), Distance(), unique_id="7", **SETTINGS)
    gaussian_mixture.sample(comfy.samplers.ksampler("euler_ancestral"), model, steps=5)
    assert [data.get("step") for _, data, _ in server.sent if data["node"] == "7"] == [None, 0, 1, 2, 3]


# In a running ComfyUI


def workflow(server: ComfyServer, name: str) -> dict:
    for picture in WORKFLOWS.glob("sphereguide_*.png"):
        (server.input / picture.name).write_bytes(picture.read_bytes())
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.server
def test_a_client_hears_of_its_own_prompts_also_where_the_guidance_node_is_cached(comfy_server: ComfyServer) -> None:
    prompt = workflow(comfy_server, "toy_inpainting")
    prompt[node_of(prompt, "BasicScheduler")]["inputs"]["steps"] = 4
    node = node_of(prompt, "SphereGuideDSG")
    prompt[node]["inputs"]["end_percent"] = 0.998  # none of the other tests' results is in the cache
    pictures = []
    for seed in (11, 12):
        prompt = deepcopy(prompt)
        prompt[node_of(prompt, "SamplerCustom")]["inputs"]["noise_seed"] = seed
        run = comfy_server.run(prompt)
        assert (node in run.cached) == (seed == 12)
        begun, *steps = run.guided
        assert begun == {"node": node, "steps": 4, "prompt_id": run.prompt_id, "workflow": None}
        assert [data["step"] for data in steps] == [0, 1, 2]
        assert all(data["node"] == node and data["loss"][0] > 0 for data in steps)
        pictures.append(load(comfy_server.images(run, node_of(prompt, "SaveImage"))))
    assert np.any(pictures[0][0] != pictures[1][0])


@pytest.mark.server
def test_each_of_several_guided_samplers_tells_of_itself(comfy_server: ComfyServer) -> None:
    prompt = workflow(comfy_server, "toy_strength_sweep")
    key = node_of(prompt, "SphereGuideDSG")
    prompt[node_of(prompt, "SphereGuideSweep")]["inputs"]["values"] = "0, 0.1, 0.2"
    prompt[node_of(prompt, "BasicScheduler")]["inputs"]["steps"] = 2
    prompt[node_of(prompt, "SamplerCustom")]["inputs"]["noise_seed"] = 21  # no other test's
    told = [(data["node"], data.get("step")) for data in comfy_server.run(prompt).guided]
    assert told == [(key, step) for step in (None, None, 0, None, 0)]  # the first is not guided
