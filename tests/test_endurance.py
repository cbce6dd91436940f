"""Many prompts in one server, from several clients, cancelled and killed: it stays as it is, and the bits stay.

The long run is `quickstart.py bench endurance`; here is a short one.
"""

from __future__ import annotations

import importlib.util
import json
import time
import uuid
from typing import Any

import psutil
import pytest
import torch
import websocket
from bootstrap import ROOT
from faulty import SIDE, Faulty, prompt_with
from prompts import RANGE, custom, dsg, empty, node
from safetensors.torch import load_file
from sphereguide.demo.run import Prompt
from test_faults import as_before, bits_of
from torch import Tensor

spec = importlib.util.spec_from_file_location("endurance", ROOT / "benchmarks" / "endurance.py")
endurance = importlib.util.module_from_spec(spec)
spec.loader.exec_module(endurance)

pytestmark = [pytest.mark.server, pytest.mark.slow]
#: Runs that have nothing but the model in common.
MIXED: dict[str, dict[str, Any]] = {
    "DSG": {},
    "batch of two, checkpointing": {
        "latent": empty(SIDE, 2),
        "sampler": dsg(gradient="full", checkpointing=True),
    },
    "unguided": {"sampler": node("KSamplerSelect", sampler_name="euler_ancestral")},
    "cfg": {"sample": custom(cfg=3.0, negative=["text", 0])},
}


# -- long runs ---------------------------------------------------------------------------------------------------------


def settled(process: psutil.Process) -> dict[str, float]:
    """What the process holds at least, in two seconds: the server closes a connection later than its client does."""
    found = [endurance.measured(process)]
    for _ in range(20):
        time.sleep(0.1)
        found.append(endurance.measured(process))
    return {name: min(one[name] for one in found) for name in found[0]}


def test_rounds_of_guided_prompts_leave_no_tensor_handle_or_thread(faulty_server: Faulty) -> None:
    process = psutil.Process(faulty_server.server.process.pid)
    found = []
    for i in range(3):
        count = len(endurance.WORKFLOWS)
        list(endurance.endured(faulty_server.server, endurance.prompts(count, SIDE, first_seed=100 + i * count)))
        tensors = as_before(faulty_server, draws=None).seen["tensors"]
        found.append({"tensors": tensors, **settled(process)})
    _, second, third = found  # in the first, caches fill
    assert third["tensors"] == second["tensors"]
    assert third["handles"] <= second["handles"] and third["threads"] <= second["threads"]
    assert third["rss_mb"] - second["rss_mb"] < 20  # the graph of one of these runs takes more


def test_slopes_tell_a_leak_from_noise() -> None:
    names = endurance.WORKFLOWS
    rows = [
        {
            "prompt": i,
            "workflow": names[i % len(names)],
            "seconds": 1.0 + i % len(names) + 0.1 * (i * 7 % 11),
            "rss_mb": 900 + (i * 5 % 13),
            "handles": 8 + i // 4,
            "threads": 4,
        }
        for i in range(400)
    ]
    slopes = {row["slope"]: row for row in endurance.slopes(rows)}
    for flat in ("rss_mb", "relative_seconds", "threads"):
        assert slopes[flat]["low"] <= 0 <= slopes[flat]["high"], flat
    assert 0.24 < slopes["handles"]["low"] <= slopes["handles"]["high"] < 0.26


# -- several clients ---------------------------------------------------------------------------------------------------


class Client:
    """A page: it queues prompts, and hears what the server sends it."""

    def __init__(self, faulty: Faulty) -> None:
        self.id, self.server = uuid.uuid4().hex, faulty.server
        self.channel = self.server.listen(self.id, timeout=1)

    def queue(self, prompt: Prompt) -> str:
        return json.loads(self.server.post("/prompt", {"prompt": prompt, "client_id": self.id}))["prompt_id"]

    def heard(self, patience: float = 1.0) -> list[dict[str, Any]]:
        """All events until there are no more for so many seconds."""
        self.channel.settimeout(patience)
        events = []
        while True:
            try:
                message = self.channel.recv()
            except websocket.WebSocketTimeoutException:
                return events
            events += [json.loads(message)] if isinstance(message, str) else []


def test_each_client_hears_of_its_own_guidance_in_a_queue_of_mixed_workflows(faulty_server: Faulty) -> None:
    alone = {name: faulty_server.run(prompt_with(**nodes)).bits for name, nodes in MIXED.items()}
    pages, watcher = [Client(faulty_server) for _ in range(2)], Client(faulty_server)
    queued = [
        (name, page, page.queue(prompt_with(**nodes)))
        for (name, nodes), page in zip([*MIXED.items(), *MIXED.items()], [*pages * len(MIXED)], strict=True)
    ]
    for name, _, prompt_id in queued:
        assert bits_of(faulty_server, prompt_id) == alone[name], name
    for page in pages:
        own = {prompt_id for _, whose, prompt_id in queued if whose is page}
        events = [event for event in page.heard() if event["type"] == "sphereguide.trace"]
        guided = {prompt_id for name, whose, prompt_id in queued if whose is page and name != "unguided"}
        assert {event["data"]["prompt_id"] for event in events} == guided & own
    seen = watcher.heard(patience=0.2)
    assert seen and {event["type"] for event in seen} <= {"status", "crystools.monitor", "feature_flags"}
    for client in (*pages, watcher):
        client.channel.close()
    as_before(faulty_server)


def test_a_storm_of_cancels_leaves_the_server_as_it_was(faulty_server: Faulty) -> None:
    server = faulty_server.server
    long = node("BasicScheduler", model=["toy", 0], scheduler="normal", steps=300, denoise=1.0)
    queued = [
        server.queue(prompt_with(sigmas=long, sampler=dsg(gradient="full", checkpointing=i % 2 > 0))) for i in range(6)
    ]
    deadline = time.monotonic() + 60
    while any(not server.get_json(f"/history/{prompt_id}") for prompt_id in queued[:4]):
        server.interrupt()
        assert time.monotonic() < deadline
        time.sleep(0.15)
    server.post("/queue", {"delete": queued[5:]})
    while server.get_json("/prompt")["exec_info"]["queue_remaining"]:
        server.interrupt()
        assert time.monotonic() < deadline
        time.sleep(0.15)
    for prompt_id in queued:  # no picture of any
        history = server.get_json(f"/history/{prompt_id}")
        assert not history or not history[prompt_id]["outputs"].get("save")
    as_before(faulty_server, draws=None)


# -- the same bits -----------------------------------------------------------------------------------------------------


def test_a_batch_of_four_is_four_single_runs(faulty_server: Faulty) -> None:
    """As nearly as the host allows: its convolutions round a batch of four in another way, which guidance amplifies.

    (Of each method, on an exact model: `test_a_batch_is_its_samples`.) The host draws other noise for a batch
    than for a single run, so that is made alike here.
    """

    def latents(first: int, length: int, sampler: dict[str, Any]) -> Tensor:
        outcome = faulty_server.run(
            prompt_with(
                four=empty(SIDE, 4),
                latent=node("LatentFromBatch", samples=["four", 0], batch_index=first, length=length),
                each=node("NoiseOfEachSample", sampler=["plain", 0], latent=["latent", 0], first=first),
                sampler=sampler,
                saved=node("SaveLatent", samples=["sample", 0], filename_prefix="four"),
            )
        )
        (file,) = outcome.run.outputs["saved"]["latents"]
        return load_file(faulty_server.server.output / file["subfolder"] / file["filename"])["latent_tensor"]

    def gap(sampler: dict[str, Any]) -> float:
        together = latents(0, 4, sampler)
        singles = torch.cat([latents(i, 1, sampler) for i in range(4)])
        assert (together - together.roll(1, 0)).abs().flatten(1).amax(1).min() > 0.1  # four pictures
        return float((together - singles).abs().max() / together.std())

    each = {"sampler": ["each", 0]}
    unguided = gap(node("SphereGuideEpsilonScaling", **each, schedule="uniform", b=1.0, k=0.0, **RANGE))
    guided = gap(dsg("each", gradient="full"))
    assert unguided < 1e-4
    assert guided == 0 if unguided == 0 else guided < 0.01


def test_a_killed_server_gives_the_same_bits_again(faulty_server: Faulty) -> None:
    runs = {name: faulty_server.run(prompt_with(**nodes)).bits for name, nodes in MIXED.items()}
    fresh = faulty_server.fresh.bits
    page = Client(faulty_server)
    long = node("BasicScheduler", model=["toy", 0], scheduler="normal", steps=300, denoise=1.0)
    page.queue(prompt_with(sigmas=long))
    while '"progress"' not in str(page.channel.recv()):
        pass
    faulty_server.restart()
    assert faulty_server.fresh.bits == fresh
    assert {name: faulty_server.run(prompt_with(**nodes)).bits for name, nodes in MIXED.items()} == runs
    as_before(faulty_server)
