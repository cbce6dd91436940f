"""Whatever is guided by whatever, and however it ends: the server is then as a fresh one is.

Random graphs of the pack's nodes, in a running ComfyUI. SPHEREGUIDE_EXAMPLES sets how many; more than the default are
other ones each time.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
from fault_nodes import KINDS, MESSAGE
from faulty import SEED, SIDE, Faulty, prompt_with
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from prompts import BASE, PICTURE, STEPS, clip_text, custom, empty, face, node, segmented, styled
from sphereguide.demo.run import Prompt
from sphereguide.samplers.tfg import PRESETS
from test_faults import as_before

MORE = os.environ.get("SPHEREGUIDE_EXAMPLES")
EXAMPLES = int(MORE or 12)
SAMPLERS = ("euler_ancestral", "ddpm", "dpmpp_sde", "dpmpp_2m_sde", "lcm", "dpm_2_ancestral")
LORA = node("LoraLoaderModelOnly", model=["toy", 0], lora_name="lora.safetensors", strength_model=0.5)
CARRIES_GUIDANCE = importlib.util.find_spec("comfy.patcher_extension") is not None
PERCENTS = {"start_percent": 0.0, "end_percent": 1.0}
NETWORKS = {
    "text": clip_text(),
    "map": segmented(class_name="hair", mask=["black", 0], unlabelled="skin"),
    "style": styled(open_clip_model=["loader", 0]),
    "face": face(),
}
"""Prompts whose loss looks through a network."""


class Graph:
    """Nodes by name; `add` returns the name of a new one."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}

    def add(self, class_type: str, **inputs: Any) -> list[Any]:
        name = f"{class_type} {len(self.nodes)}"
        self.nodes[name] = node(class_type, **inputs)
        return [name, 0]

    def copy(self, prompt: Prompt, name: str) -> list[Any]:
        """A node of a prompt, and those that it needs beside the ones that every prompt has."""
        inputs = {
            key: [self.copy(prompt, value[0])[0], value[1]]
            if isinstance(value, list) and value[0] not in BASE
            else value
            for key, value in prompt[name]["inputs"].items()
        }
        return self.add(prompt[name]["class_type"], **inputs)


def draw_loss(draw: Any, graph: Graph, depth: int) -> list[Any]:
    kinds = ["low pass", "super-resolution", "blur", "motion", "inpainting", *NETWORKS]
    kind = draw(st.sampled_from(kinds + ["sum", "schedule", "region"] * (depth > 0)))
    if kind == "low pass":
        return graph.add("SphereGuideLowPassLoss", image=PICTURE, factor=draw(st.sampled_from((2, 8))))
    if kind == "super-resolution":
        small = graph.add("ImageScale", image=PICTURE, upscale_method="area", width=16, height=16, crop="disabled")
        return graph.add("SphereGuideSuperResolutionLoss", image=small, factor=4)
    if kind == "blur":
        return graph.add("SphereGuideGaussianDeblurLoss", image=PICTURE, kernel_size=9, sigma=2.0)
    if kind == "motion":
        return graph.add("SphereGuideMotionDeblurLoss", image=PICTURE, length=7, angle=30.0)
    if kind == "inpainting":
        mask = graph.add("SolidMask", value=1.0, width=SIDE, height=SIDE)
        return graph.add("SphereGuideInpaintingLoss", image=PICTURE, mask=mask)
    if kind in NETWORKS:
        return graph.copy(NETWORKS[kind], "loss")
    inner = draw_loss(draw, graph, depth - 1)
    if kind == "sum":
        weights = {f"weight_{i}": draw(st.sampled_from((1.0, -0.5))) for i in range(1, 5)}
        other = draw_loss(draw, graph, depth - 1)
        return graph.add(
            "SphereGuideCombineLosses", loss_1=inner, loss_2=other, normalise=draw(st.booleans()), **weights
        )
    if kind == "schedule":
        curve = draw(st.sampled_from(("constant", "ramp up", "ramp down")))
        return graph.add("SphereGuideScheduleLoss", loss=inner, weight=1.0, curve=curve, **PERCENTS)
    mask = graph.add("SolidMask", value=1.0, width=SIDE, height=SIDE)
    return graph.add("SphereGuideMaskLoss", loss=inner, mask=mask, sees="whole image")


def calibrated(graph: Graph, model: list[Any], text: dict[str, Any], cfg: float) -> list[Any]:
    """An Epsilon Scaling, from as few pictures as can be."""
    portraits = graph.add("SphereGuideDrawToyPortraits", count=8, first=0)
    real = graph.add("VAEEncode", pixels=portraits, vae=["toy", 2])
    wires = {"model": model, **text, "sampler": ["plain", 0], "sigmas": ["sigmas", 0], "latents": real}
    settings = {"cfg": cfg, "samples": 2, "batch_size": 2, "calibration_seed": 0, "from_images": False}
    return [graph.add("SphereGuideEpsilonScalingCalibrate", **wires, **settings)[0], 2]


@st.composite
def graphs(draw: Any) -> tuple[dict[str, Any], int]:
    """The nodes of a guided run on one step after the other, and the size of its batch."""
    graph, batch = Graph(), draw(st.sampled_from((1, 2)))
    loss = draw_loss(draw, graph, depth=2)
    graph.nodes["loss"] = graph.nodes.pop(loss[0])
    name = draw(st.sampled_from(SAMPLERS))
    method = draw(st.sampled_from(["DSG", "DPS", "DiffRGD", "TFG", "AMED", "KSampler"] + ["Model"] * CARRIES_GUIDANCE))
    cfg = draw(st.sampled_from((1.0, 3.0)))
    steps = {
        **STEPS,
        "gradient": draw(st.sampled_from(("full", "cond only", "fast"))),
        "checkpointing": draw(st.booleans()),
        "interval": draw(st.sampled_from((1, 2))),
        "start_percent": draw(st.sampled_from((0.0, 0.1))),
        "loss": ["loss", 0],
        "vae": ["toy", 2],
        "decode_scale": draw(st.sampled_from((0.5, 1.0))),
    }
    model = ["toy", 0]
    if draw(st.booleans()):
        graph.nodes["lora"] = LORA
        model = ["lora", 0]
    sigmas = node("BasicScheduler", model=["toy", 0], scheduler="normal", steps=3, denoise=1.0)
    text = {"positive": ["text", 0], "negative": ["unused", 0]}
    scaling = {"schedule": "uniform", "b": 1.01, "k": 0.0, **PERCENTS}
    if draw(st.sampled_from((False, False, True))):
        scaling |= {"schedule": "measured", "epsilon_schedule": calibrated(graph, model, text, cfg)}
    if draw(st.booleans()):
        model = graph.add("SphereGuideEpsilonScalingModel", model=model, **scaling)
    sampler = ["plain", 0]
    if method == "AMED":
        predictor = graph.add("SphereGuideAMEDLoad", name="toy_portraits_ipndm_4.safetensors")
        sampler = graph.add("SphereGuideAMEDSampler", predictor=predictor)
        sigmas = node("SphereGuideAMEDScheduler", predictor=predictor, model=["toy", 0], points="base")
    if draw(st.booleans()):
        sampler = graph.add("SphereGuideEpsilonScaling", sampler=sampler, **scaling)
    if draw(st.booleans()) and method != "KSampler":
        sampler = graph.add("SphereGuideILVR", sampler=sampler, reference=["latent", 0], factor=2, **PERCENTS)
    recurrence = {"recurrence": draw(st.sampled_from((0, 2))), "recurrence_start": 0.0, "recurrence_end": 1.0}
    recurrence["auto_strength"] = draw(st.sampled_from((0.0, 1.0)))
    if method == "KSampler":
        run = {"seed": SEED, "steps": 3, "cfg": cfg, "sampler_name": name, "scheduler": "normal", "denoise": 1.0}
        wires = {"model": model, "latent_image": ["latent", 0], **text}
        sample = node("SphereGuideKSampler", **wires, **run, **steps, guidance_rate=0.3, rate_steps=50, **recurrence)
    else:
        if method == "DSG":
            own = {"guidance_rate": 0.3, "rate_steps": draw(st.sampled_from((0, 50))), **recurrence}
        elif method == "Model":
            own = {"guidance_rate": 0.3, **recurrence}
        elif method == "DPS":
            own = {"step_size": 0.5}
        elif method == "AMED":
            own = {}
        elif method == "DiffRGD":
            own = {"step_size": 5.0, "iterations": draw(st.sampled_from((1, 2)))}
        else:
            own = {"preset": draw(st.sampled_from(list(PRESETS))), "rho": 0.5, "mu": 0.5, "n_iter": 2, "n_recur": 2}
            own |= {"sigma_bar": draw(st.sampled_from((0.0, 0.05))), "samples": 2}
        if method == "Model":
            model = graph.add("SphereGuideDSGModel", model=model, **steps, **own)
        elif method != "AMED":
            sampler = graph.add(f"SphereGuide{method}", sampler=sampler, **steps, **own)
        witness = graph.add("Witness", sampler=sampler)
        sample = custom(model=model, sampler=witness, cfg=cfg, negative=["unused", 0], noise_seed=SEED)
    return {
        **graph.nodes,
        "plain": node("KSamplerSelect", sampler_name=name),
        "sigmas": sigmas,
        "latent": empty(SIDE, batch),
        "sampler": node("KSamplerSelect", sampler_name=name),  # that of `prompts.guided`
        "sample": sample,
    }, batch


faults = st.one_of(
    st.just(None),
    st.tuples(
        st.sampled_from(("loss", "vae", "model", "sampler")),
        st.sampled_from(sorted(KINDS)),
        st.sampled_from(("forward", "backward")),
        st.integers(0, 4),
        st.sampled_from((1, 99)),
    ),
)


@pytest.mark.server
@pytest.mark.slow
def test_after_any_guided_run_the_server_is_as_a_fresh_one(faulty_server: Faulty) -> None:
    @settings(
        max_examples=EXAMPLES,
        derandomize=not MORE,
        phases=tuple(Phase) if MORE else (Phase.generate,),  # shrinking takes minutes
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(graphs(), faults)
    def check(drawn: tuple[dict[str, Any], int], fault: tuple[Any, ...] | None) -> None:
        nodes, batch = drawn
        if fault is None:
            prompt = prompt_with(**nodes)
        else:
            source, kind, where, first, times = fault
            prompt = prompt_with(source, kind, fault_where=where, fault_first=first, fault_times=times, **nodes)
        outcome = faulty_server.run(prompt)
        note(f"{outcome.end} {outcome.message}")
        # A calibration is not made of latents that are not finite, and has seeds of its own.
        refused = fault is not None and outcome.message.startswith(
            "Calibrate Epsilon Scaling: the sampler gave latents"
        )
        left = as_before(faulty_server, batch, **({"draws": None} if refused else {}), patched="lora" in nodes)
        struck, after = left.seen["struck"]
        if not struck:
            assert outcome.end == "goes on"
        elif kind in ("raises", "out of host memory"):
            assert outcome.end == "stops" and MESSAGE in outcome.message and struck == 1
        elif kind == "interrupted":
            assert outcome.end == "is cancelled" and struck == 1
        elif kind == "out of memory":
            again = "out of memory. Trying again with checkpointing" in outcome.log
            assert (outcome.end == "stops" and MESSAGE in outcome.message) or (outcome.end == "goes on" and again)
        elif kind == "cancel":
            assert outcome.end == "is cancelled" or after == 0  # none, where it came too late
        elif kind in ("NaN", "infinite"):
            assert outcome.end == "goes on" or refused
        else:
            assert outcome.end == "goes on"
        if fault is None or kind == "evict" or (kind in ("NaN", "infinite") and source == "loss"):
            assert outcome.finite

    check()
