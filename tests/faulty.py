"""A server with the nodes of `fault_nodes.py` in it, and what a prompt leaves behind there."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import portraits
import torch
from bootstrap import ROOT
from comfy_server import ComfyServer, ExecutionError, Interrupted, Run
from PIL import Image
from prompts import BASE, custom, dsg, empty, guided, node
from safetensors.torch import load_file, save_file
from sphereguide.demo.run import Prompt

__all__ = ["FULL", "SEED", "SIDE", "Faulty", "Left", "Outcome", "faulty", "prompt_with", "running"]

SIDE = 64
SEED = 0
BITS = node("Fingerprint", samples=["sample", 0])
FULL = dsg(gradient="full")
LOOK = {"model": ["toy", 0], "vae": ["toy", 2], "clip": ["toy", 1], "latent": ["latent", 0], "seed": SEED}
_salt = itertools.count(1)


@dataclass
class Outcome:
    """How a prompt ended: "goes on", "stops" or "is cancelled"; what it said; and the bits of each latent."""

    end: str
    message: str = ""
    at: str = ""
    bits: list[str] = field(default_factory=list)
    finite: bool = True
    run: Run | None = None
    log: str = ""


@dataclass
class Left:
    """What `LookAtWhatIsLeft` saw, and then the bits of an unguided run."""

    seen: dict[str, Any]
    bits: list[str]

    @property
    def state(self) -> dict[str, Any]:
        """All that has to stay."""
        return {name: self.seen[name] for name in ("weights", "hooks", "patches", "process", "random")}

    @property
    def bytes(self) -> list[str]:
        """Of all weights."""
        return [about[0] for network in self.seen["weights"].values() for about in network.values()]


class Faulty:
    """A server whose first prompt is an unguided one: what a fresh server gives, and how it is then."""

    def __init__(self, server: ComfyServer) -> None:
        self.server = server
        self.fresh = self.look()

    def run(self, prompt: Prompt, **options: Any) -> Outcome:
        seen: list[Run] = []
        before = self.server.log_path.stat().st_size

        def follow(run: Run) -> None:
            seen[:] = [run]

        try:
            run = self.server.run(prompt, on_progress=follow, timeout=120, **options)
            text = run.outputs.get("save", {}).get("text", [])
            outcome = Outcome("goes on", "", "", text[:-1], text[-1:] != ["not finite"], run)
        except ExecutionError as error:
            outcome = Outcome("stops", error.exception_message, error.node_type, run=seen[0] if seen else None)
        except Interrupted:
            outcome = Outcome("is cancelled", run=seen[0] if seen else None)
        with open(self.server.log_path, "rb") as log:
            log.seek(before)
            outcome.log = log.read().decode(errors="replace")
        return outcome

    def restart(self) -> None:
        """Kill the process and start another, with the same files."""
        self.server.process.kill()
        self.server.process.wait()
        self.server.start()
        self.fresh = self.look()

    def look(self, batch: int = 1) -> Left:
        prompt = {
            **BASE,
            "latent": empty(SIDE),
            "look": node("LookAtWhatIsLeft", **LOOK, batch=batch, salt=next(_salt)),
            "sample": custom(sampler=["plain", 0], latent_image=["look", 0], noise_seed=SEED),
            "bits": BITS,
        }
        outputs = self.server.run(prompt, timeout=120).outputs
        return Left(json.loads(outputs["look"]["text"][0]), outputs["bits"]["text"][:-1])


def prompt_with(fault: str = "", kind: str = "raises", /, **nodes: Any) -> Prompt:
    """`prompts.guided` on a small latent, run anew, and its bits.

    fault  which of "loss", "vae", "model", "sampler" is faulty, with the settings in `fault_…`
    """
    settings = {"where": "forward", "first": 0, "times": 1, "salt": next(_salt)}
    settings |= {name.removeprefix("fault_"): nodes.pop(name) for name in list(nodes) if name.startswith("fault_")}
    prompt = guided(**{"latent": empty(SIDE), "save": BITS, "sampler": FULL, **nodes})
    # What differs is a negative prompt, which cfg 1 leaves out.
    prompt["unused"] = node("CLIPTextEncode", text=f"run {settings['salt']}", clip=["toy", 1])
    prompt = rewired(prompt, ["text", 0], ["unused", 0], inputs=("negative",))
    if fault:
        source, wire, title = FAULTY[fault]
        prompt = rewired(prompt, source, ["faulty", 0])
        prompt["faulty"] = node(title, **{wire: source, "fault": kind, **settings})
    return prompt


def rewired(prompt: Prompt, before: list[Any], after: list[Any], inputs: tuple[str, ...] = ()) -> Prompt:
    """The prompt with one output in place of another, at all inputs or at those of these names."""
    return {
        name: {
            **given,
            "inputs": {
                key: after if value == before and (not inputs or key in inputs) else value
                for key, value in given["inputs"].items()
            },
        }
        for name, given in prompt.items()
    }


#: The output that is made faulty, the input of the node that does it, and that node.
FAULTY = {
    "loss": (["loss", 0], "guidance_loss", "FaultLoss"),
    "vae": (["toy", 2], "vae", "FaultVAE"),
    "model": (["toy", 0], "model", "FaultModel"),
    "sampler": (["plain", 0], "sampler", "FaultSampler"),
}


def faulty(base: Path) -> ComfyServer:
    """A server in `base`, not started."""
    server = ComfyServer(base)
    write_lora(base / "models" / "loras" / "lora.safetensors")
    shutil.copy(Path(__file__).parent / "fault_nodes.py", base / "custom_nodes" / "fault_nodes.py")
    picture = Image.fromarray(portraits.render(portraits.TEST_SEEDS[0]))
    picture.resize((SIDE, SIDE)).save(server.input / "portrait.png")
    return server


def write_lora(path: Path) -> None:
    """A LoRA for Toy Portraits' attention."""
    weights, generator = {}, torch.Generator().manual_seed(1)
    for name, weight in load_file(ROOT / "demo" / "weights" / "toy_portraits_unet.safetensors").items():
        if "attn" in name and name.endswith(".weight"):
            key = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
            up, down = ((weight.shape[0], 2), (2, weight.shape[1]))
            weights[f"{key}.lora_up.weight"] = torch.randn(up, generator=generator) * 0.1
            weights[f"{key}.lora_down.weight"] = torch.randn(down, generator=generator) * 0.1
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)


@contextmanager
def running(base: Path) -> Iterator[Faulty]:
    with faulty(base) as server:
        yield Faulty(server)
