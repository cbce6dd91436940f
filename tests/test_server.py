"""End to end: the workflows and the nodes in a running ComfyUI, driven over HTTP and the websocket as its page does."""

from __future__ import annotations

import itertools
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import portraits
import pytest
import torch
from comfy_server import ComfyServer, ExecutionError, Interrupted, PromptRejected
from PIL import Image
from safetensors.torch import load_file
from sphereguide.demo.run import RESTORED, Prompt, batched, load, node_of, psnr, unguided

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ["portrait_0.png", "portrait_1.png"]
ORIGINALS = [portraits.render(seed) for seed in portraits.TEST_SEEDS[:2]]

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(comfy_server: ComfyServer) -> ComfyServer:
    for name, original in zip(PICTURES, ORIGINALS, strict=True):
        Image.fromarray(original).save(comfy_server.input / name)
    return comfy_server


_runs = itertools.count()


def workflow(name: str = "toy_inpainting", *, steps: int = 6, picture: str = PICTURES[0]) -> Prompt:
    """A demo workflow, short, and different from all before it, so that the server's cache has none of its results.

    What differs is the negative prompt, which ComfyUI leaves out at the workflows' cfg of 1.
    """
    prompt = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    prompt[node_of(prompt, "LoadImage")]["inputs"]["image"] = picture
    prompt[node_of(prompt, "BasicScheduler")]["inputs"]["steps"] = steps
    negative = prompt[node_of(prompt, "SamplerCustom")]["inputs"]["negative"][0]
    prompt[negative]["inputs"]["text"] = "run " + "a" * next(_runs)
    return prompt


def change(prompt: Prompt, class_type: str, **inputs: Any) -> Prompt:
    """The prompt with other inputs for the one node of this type."""
    prompt = deepcopy(prompt)
    prompt[node_of(prompt, class_type)]["inputs"].update(inputs)
    return prompt


def pictures(server: ComfyServer, prompt: Prompt) -> list[np.ndarray]:
    """Run the prompt, without help of the cache, and return what it saved."""
    run = server.run(prompt)
    for sampler in ("SamplerCustom", "SamplerCustomAdvanced"):
        assert not {key for key, node in prompt.items() if node["class_type"] == sampler} & run.cached
    return load(server.images(run, node_of(prompt, "SaveImage")))


# What the pack promises


def test_pack_loads_from_a_folder_with_a_hyphen(server: ComfyServer) -> None:
    assert (server.base / "custom_nodes" / "sphere-guide-main").is_dir()
    nodes = server.get_json("/object_info")
    assert {"SphereGuideDSG", "SphereGuideToyPortraits", "SphereGuideReport"} <= nodes.keys()
    assert all(nodes[key]["category"].startswith("SphereGuide/") for key in nodes if key.startswith("SphereGuide"))


@pytest.mark.slow
@pytest.mark.parametrize("name", RESTORED)
def test_guidance_brings_the_picture_closer_to_the_original(server: ComfyServer, name: str) -> None:
    prompt = workflow(name, steps=30)
    (before,), (after,) = pictures(server, unguided(prompt)), pictures(server, prompt)
    assert psnr(after, ORIGINALS[0]) > psnr(before, ORIGINALS[0]) + 3


def test_strength_0_is_the_unguided_workflow_bit_for_bit(server: ComfyServer) -> None:
    prompt = change(workflow(), "SphereGuideDSG", guidance_rate=0.0)
    np.testing.assert_array_equal(pictures(server, prompt), pictures(server, unguided(workflow())))


def test_seed_reproduces_the_picture_bit_for_bit(server: ComfyServer) -> None:
    first, other, again = (pictures(server, change(workflow(), "SamplerCustom", noise_seed=seed)) for seed in (7, 8, 7))
    np.testing.assert_array_equal(first, again)
    assert np.any(first[0] != other[0])


@pytest.mark.slow
def test_each_picture_of_a_batch_is_guided_by_its_own_measurement(server: ComfyServer) -> None:
    results = pictures(server, batched(workflow(steps=30), PICTURES))
    assert len(results) == 2
    for own, other in ((0, 1), (1, 0)):
        assert psnr(results[own], ORIGINALS[own]) > psnr(results[own], ORIGINALS[other]) + 3


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_sampler_custom_advanced_gives_the_same_picture(server: ComfyServer, cfg: float) -> None:
    prompt = change(workflow(), "SamplerCustom", cfg=cfg)
    expected = pictures(server, prompt)
    np.testing.assert_array_equal(pictures(server, advanced(prompt, "CFGGuider")), expected)
    if cfg == 1:
        np.testing.assert_array_equal(pictures(server, advanced(prompt, "BasicGuider")), expected)


def test_dual_cfg_guider_is_guided(server: ComfyServer) -> None:
    prompt = advanced(workflow(steps=12), "DualCFGGuider")
    (before,), (after,) = pictures(server, unguided_advanced(prompt)), pictures(server, prompt)
    assert psnr(after, ORIGINALS[0]) > psnr(before, ORIGINALS[0])


def advanced(prompt: Prompt, guider: str) -> Prompt:
    """The prompt with SamplerCustomAdvanced and a guider in place of SamplerCustom."""
    prompt = deepcopy(prompt)
    custom = prompt[node_of(prompt, "SamplerCustom")]
    inputs = custom["inputs"]
    positive, negative, model = inputs["positive"], inputs["negative"], inputs["model"]
    guiders = {
        "BasicGuider": {"conditioning": positive},
        "CFGGuider": {"positive": positive, "negative": negative, "cfg": inputs["cfg"]},
        "DualCFGGuider": {
            "cond1": positive,
            "cond2": positive,
            "negative": negative,
            "cfg_conds": 2.0,
            "cfg_cond2_negative": 2.0,
            "style": "regular",  # newer hosts ask for it, older ones ignore it
        },
    }
    prompt["noise"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": inputs["noise_seed"]}}
    prompt["guider"] = {"class_type": guider, "inputs": {"model": model, **guiders[guider]}}
    custom["class_type"] = "SamplerCustomAdvanced"
    custom["inputs"] = {
        "noise": ["noise", 0],
        "guider": ["guider", 0],
        **{key: inputs[key] for key in ("sampler", "sigmas", "latent_image")},
    }
    return prompt


def unguided_advanced(prompt: Prompt) -> Prompt:
    guidance = prompt[node_of(prompt, "SphereGuideDSG")]
    return change(prompt, "SamplerCustomAdvanced", sampler=guidance["inputs"]["sampler"])


def test_noise_mask_protects_the_rest_of_the_latent(server: ComfyServer) -> None:
    mask = np.zeros_like(ORIGINALS[0])
    mask[:, 64:] = 255
    Image.fromarray(mask).save(server.input / "right_half.png")
    prompt = workflow()
    toy, loader, sampler = (node_of(prompt, kind) for kind in ("SphereGuideToyPortraits", "LoadImage", "SamplerCustom"))
    prompt["encode"] = {"class_type": "VAEEncode", "inputs": {"pixels": [loader, 0], "vae": [toy, 2]}}
    prompt["mask"] = {"class_type": "LoadImageMask", "inputs": {"image": "right_half.png", "channel": "red"}}
    prompt["masked"] = {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["encode", 0], "mask": ["mask", 0]}}
    for name, source in (("before", "encode"), ("after", sampler)):
        prompt[name] = {"class_type": "SaveLatent", "inputs": {"samples": [source, 0], "filename_prefix": name}}
    server.run(change(prompt, "SamplerCustom", latent_image=["masked", 0]))
    before, after = (
        load_file(next(server.output.glob(f"{name}_*.latent")))["latent_tensor"] for name in ("before", "after")
    )
    torch.testing.assert_close(after[..., :8], before[..., :8], atol=1e-3, rtol=0)
    assert (after[..., 8:] - before[..., 8:]).abs().mean() > 0.1


# What the page shows meanwhile


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    server: ComfyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    server.get_json("/system_stats")
    server.listen().close()


def test_progress_counts_the_steps_and_previews_arrive(server: ComfyServer) -> None:
    prompt = workflow(steps=6)
    run = server.run(prompt)
    counts = [value for _, value, total in run.progress if total == 6]
    assert sorted(set(counts) - {0}) == [1, 2, 3, 4, 5, 6]
    assert counts == sorted(counts)
    assert len(run.previews) >= 3
    assert all(preview.startswith((b"\xff\xd8", b"\x89PNG")) for preview in run.previews)


def test_cancel_stops_within_the_run_and_leaves_no_trace(server: ComfyServer) -> None:
    expected = pictures(server, workflow())
    seen = []

    def cancel(run: Any) -> None:
        seen.append(run.progress[-1])
        if run.progress[-1][1] == 2:
            server.interrupt()

    with pytest.raises(Interrupted):
        server.run(workflow(steps=200), on_progress=cancel)
    assert seen[-1][1] < 100
    np.testing.assert_array_equal(pictures(server, workflow()), expected)


# Bad input


def without_vae(prompt: Prompt) -> Prompt:
    prompt = deepcopy(prompt)
    del prompt[node_of(prompt, "SphereGuideDSG")]["inputs"]["vae"]
    return prompt


@pytest.mark.parametrize(
    ("spoil", "node_type", "words"),
    [
        (
            lambda prompt: change(prompt, "KSamplerSelect", sampler_name="euler"),
            "SphereGuideDSG",
            ["euler", "euler_ancestral", "ddpm"],
        ),
        (without_vae, "SphereGuideDSG", ["VAE", "vae input"]),
        (
            lambda prompt: change(prompt, "EmptyLatentImage", width=192),
            "SamplerCustom",
            ["192", "128"],
        ),
        (
            lambda prompt: change(prompt, "SphereGuideDSG", start_percent=0.8, end_percent=0.2),
            "SphereGuideDSG",
            ["0.8", "0.2"],
        ),
    ],
    ids=["deterministic sampler", "no VAE", "other size", "end before start"],
)
def test_bad_input_is_an_error_that_says_what_to_do_and_the_server_lives_on(
    server: ComfyServer, spoil: Any, node_type: str, words: list[str]
) -> None:
    with pytest.raises(ExecutionError) as error:
        server.run(spoil(workflow()))
    assert error.value.node_type == node_type
    for word in words:
        assert word in error.value.exception_message
    server.run(workflow(steps=2))


def test_value_out_of_range_is_refused_before_the_run(server: ComfyServer) -> None:
    with pytest.raises(PromptRejected, match=r"SphereGuideDSG.*guidance_rate"):
        server.run(change(workflow(), "SphereGuideDSG", guidance_rate=2.0))
