"""docs/faults.md lists what happens when a guided run goes wrong: each row of it, in a running ComfyUI."""

from __future__ import annotations

import ast
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from bootstrap import ROOT
from faulty import SIDE, Faulty, Left, Outcome, prompt_with
from prompts import custom, dsg, empty, node

ROWS = {
    cells[0]: cells[1:]
    for line in (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| what goes wrong")
    for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
}
STEPS = 4
SIGMAS = node("BasicScheduler", model=["toy", 0], scheduler="normal", steps=STEPS, denoise=1.0)
LORA = node("LoraLoaderModelOnly", model=["toy", 0], lora_name="lora.safetensors", strength_model=1.0)
REPEATED = dsg(gradient="full", recurrence=3, recurrence_start=0.0, recurrence_end=1.0)
DECODED = node("VAEDecode", samples=["sample", 0], vae=["toy", 2])
ENDS = ("goes on", "stops", "is cancelled")
ELSEWHERE = {
    "Two prompts with different settings are queued on one model": (
        "test_faults.py",
        "test_two_prompts_on_one_model_are_as_if_each_were_alone",
    ),
    "SphereGuide is loaded anew while ComfyUI runs": (
        "test_faults.py",
        "test_nodes_of_before_and_after_a_reload_go_together",
    ),
    "The page is closed during a run": ("test_faults.py", "test_a_run_goes_on_without_its_page"),
    "ComfyUI is killed during a run": ("test_endurance.py", "test_a_killed_server_gives_the_same_bits_again"),
}
PICTURES = ("no picture", "a picture", "the same picture", "a black picture")


@dataclass(frozen=True)
class Fault:
    """
    source  what is faulty: see `faulty.prompt_with`
    kind    of `fault_nodes.KINDS`
    first   at which call
    times   at how many
    nodes   other nodes of the prompt
    """

    source: str
    kind: str
    where: str = "forward"
    first: int = 1
    times: int = 1
    nodes: dict[str, Any] = field(default_factory=dict)


#: Those of one prompt. The others have a function of their own, below.
FAULTS = {
    "A loss raises an error": Fault("loss", "raises"),
    "A loss is NaN at one step": Fault("loss", "NaN"),
    "A loss is infinite at one step": Fault("loss", "infinite"),
    "The gradient of a loss is NaN at one step": Fault("loss", "NaN", "backward"),
    "The gradient of a loss is infinite at one step": Fault("loss", "infinite", "backward"),
    "The gradient of the model is NaN at one step": Fault("model", "NaN", "backward"),
    "The model gives NaN at one step": Fault("model", "NaN"),
    "The VAE runs out of memory once, in a guided step": Fault("vae", "out of memory"),
    "The VAE runs out of memory in every guided step": Fault("vae", "out of memory", times=99),
    "The backward pass runs out of memory once": Fault("model", "out of memory", "backward"),
    "The backward pass runs out of memory each time": Fault("model", "out of memory", "backward", times=99),
    "The backward pass runs out of memory with gradient fast": Fault(
        "loss", "out of memory", "backward", nodes={"sampler": dsg(gradient="fast")}
    ),
    "The computer's own memory runs out": Fault("model", "out of host memory"),
    "VAE Decode runs out of memory after a guided run": Fault(
        "vae",
        "out of memory",
        first=STEPS - 1,
        nodes={"decode": DECODED, "shown": node("PreviewImage", images=["decode", 0])},
    ),
    "Cancel before the first step": Fault("model", "cancel", first=0),
    "Cancel while the model is called": Fault("model", "cancel"),
    "Cancel while the VAE decodes": Fault("vae", "cancel"),
    "Cancel while a loss is computed": Fault("loss", "cancel"),
    "Cancel during the backward pass through a loss": Fault("loss", "cancel", "backward"),
    "Cancel during the backward pass through the model": Fault("model", "cancel", "backward"),
    "Cancel between two steps": Fault("sampler", "cancel"),
    "Cancel while a step is repeated": Fault("model", "cancel", first=2, nodes={"sampler": REPEATED}),
    "ComfyUI breaks off a forward pass": Fault("model", "interrupted"),
    "ComfyUI breaks off a backward pass": Fault("model", "interrupted", "backward"),
    "All models are unloaded between two steps": Fault("sampler", "evict"),
    "A model with a LoRA is unloaded between two steps": Fault(
        "sampler", "evict", nodes={"lora": LORA, "sample": custom(model=["lora", 0])}
    ),
}


@pytest.fixture(scope="module")
def undisturbed(faulty_server: Faulty) -> Callable[..., Outcome]:
    """The run with these nodes and no fault."""
    known: dict[str, Outcome] = {}

    def run(**nodes: Any) -> Outcome:
        if (key := json.dumps(nodes, sort_keys=True)) not in known:
            known[key] = faulty_server.run(prompt_with(**nodes))
            as_before(faulty_server)
            assert known[key].end == "goes on" and known[key].finite
        return known[key]

    return run


def test_every_row_of_the_page_has_a_test() -> None:
    assert ROWS.keys() == FAULTS.keys() | ELSEWHERE.keys()
    for file, name in ELSEWHERE.values():
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert name in [part.name for part in tree.body if isinstance(part, ast.FunctionDef)]


def test_every_row_says_what_one_sees_and_what_remains() -> None:
    for name, row in ROWS.items():
        assert len(row) == 2 and all(row), name
        assert sum(f"**{end}**" in row[0] for end in ENDS) == (name != "ComfyUI is killed during a run"), name
        assert sum(row[1].startswith(f"**{picture}**") for picture in PICTURES) == 1, name


@pytest.mark.server
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_as_the_page_says(faulty_server: Faulty, undisturbed: Callable[..., Outcome], name: str) -> None:
    fault = FAULTS[name]
    nodes = {"sigmas": SIGMAS, **fault.nodes}
    expected = undisturbed(**nodes)
    settings = {"fault_where": fault.where, "fault_first": fault.first, "fault_times": fault.times}
    outcome = faulty_server.run(prompt_with(fault.source, fault.kind, **settings, **nodes))
    left = as_before(faulty_server)
    ended(outcome, ROWS[name], expected)
    struck, after = left.seen["struck"]
    assert struck == fault.times or (struck and outcome.end == "stops")
    if outcome.end == "is cancelled":
        assert after == 0  # neither the model nor the loss was asked again
    if "the others are" in ROWS[name][1]:
        told = [step["loss"] != [None] for step in outcome.run.guided if "loss" in step]
        assert told.count(False) == (fault.source == "loss" and fault.where == "forward")
        assert len(told) == STEPS - 1


def as_before(faulty: Faulty, batch: int = 1, draws: int | None = STEPS, patched: bool = False) -> Left:
    """Nothing is left of what ran last, on `batch` samples.

    draws    how many noises a whole run takes without guidance, at most; None where it had another seed than `SEED`
    patched  it had a LoRA, which may be off again by now
    """
    left = settled = faulty.look(batch)
    if patched or left.state["patches"] != faulty.fresh.state["patches"]:
        # The host takes a LoRA off when it is in the way: the bytes are the same, in other objects.
        settled = faulty.look()
        assert settled.bytes == faulty.fresh.bytes
        faulty.fresh.seen |= {name: settled.seen[name] for name in ("objects", "weights")}
    for name, state in faulty.fresh.state.items():
        assert settled.state[name] == state, name
    assert settled.seen["objects"] == faulty.fresh.seen["objects"]
    assert left.bits == settled.bits == faulty.fresh.bits
    assert draws is None or 0 <= left.seen["drawn"] <= draws
    assert left.seen["tensors"][1] == 0
    return left


def ended(outcome: Outcome, row: list[str], undisturbed: Outcome) -> None:
    """As the row says."""
    sees, remains = row
    assert f"**{outcome.end}**" in sees, outcome.message
    for quote in re.findall(r"`([^`]+)`|(?<!\*)\*([^*]+)\*(?!\*)", sees):
        words = ".*?".join(map(re.escape, "".join(quote).split("…")))
        assert re.search(words, f"{outcome.message}\n{outcome.log}"), words
    (picture,) = (picture for picture in PICTURES if remains.startswith(f"**{picture}**"))
    assert {
        "no picture": not outcome.bits,
        "a picture": outcome.bits and outcome.finite and outcome.bits != undisturbed.bits,
        "the same picture": outcome.bits and outcome.finite and outcome.bits == undisturbed.bits,
        "a black picture": outcome.bits and not outcome.finite,
    }[picture]


# -- what takes more than one prompt -----------------------------------------------------------------------------------


@pytest.mark.server
def test_two_prompts_on_one_model_are_as_if_each_were_alone(faulty_server: Faulty) -> None:
    first, second = (
        {"guidance_rate": 0.4, "gradient": "full"},
        {"interval": 2, "checkpointing": True, "gradient": "full"},
    )
    alone = [faulty_server.run(prompt_with(sigmas=SIGMAS, sampler=dsg(**given))) for given in (first, second)]
    assert alone[0].bits != alone[1].bits
    waiting = faulty_server.server.queue(prompt_with(sigmas=SIGMAS, sampler=dsg(**first)))
    together = faulty_server.run(prompt_with(sigmas=SIGMAS, sampler=dsg(**second)))
    assert together.bits == alone[1].bits
    assert bits_of(faulty_server, waiting) == alone[0].bits
    as_before(faulty_server)


@pytest.mark.server
def test_nodes_of_before_and_after_a_reload_go_together(faulty_server: Faulty) -> None:
    for changes in ({}, {"guidance_rate": 0.5}):
        settings = {"gradient": "full", **changes}
        expected = faulty_server.run(prompt_with(sigmas=SIGMAS, sampler=dsg(**settings)))
        faulty_server.run(prompt_with(sigmas=SIGMAS))
        # The loss, and without changes the guided sampler, are of before; what samples is loaded in between.
        reload = node("ReloadSphereGuide", latent=["empty", 0], salt=len(changes))
        nodes = {"empty": empty(SIDE), "latent": reload, "sampler": dsg(**settings)}
        outcome = faulty_server.run(prompt_with(sigmas=SIGMAS, **nodes))
        assert (outcome.message, outcome.bits) == ("", expected.bits)
        as_before(faulty_server)


@pytest.mark.server
def test_a_run_goes_on_without_its_page(faulty_server: Faulty) -> None:
    expected = faulty_server.run(prompt_with(sigmas=SIGMAS))
    server = faulty_server.server
    page = server.listen(timeout=60)
    waiting = server.queue(prompt_with(sigmas=SIGMAS))
    while '"progress"' not in str(page.recv()):
        pass
    page.close()
    assert bits_of(faulty_server, waiting) == expected.bits
    as_before(faulty_server)


def bits_of(faulty: Faulty, prompt_id: str) -> list[str]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if found := faulty.server.get_json(f"/history/{prompt_id}"):
            return found[prompt_id]["outputs"]["save"]["text"][:-1]
        time.sleep(0.05)
    raise TimeoutError(prompt_id)
