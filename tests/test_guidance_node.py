"""The DSG Guidance and Guidance Report nodes: what they accept, refuse and say."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace

import comfy.latent_formats
import comfy.model_management
import comfy.samplers
import gaussian_mixture
import pytest
import tiny_models
import torch
from sphereguide import host
from sphereguide.losses.base import Loss
from sphereguide.losses.measurement import Inpainting, SuperResolution
from sphereguide.models.decoder import Decoder
from sphereguide.nodes import report as report_nodes
from sphereguide.nodes.figure import drawn, new_figure
from sphereguide.nodes.guidance import DSGGuidance
from sphereguide.nodes.report import GuidanceReport
from sphereguide.samplers import autograd, kernel
from sphereguide.samplers.autograd import differentiable
from test_dsg import Distance

SETTINGS = {
    "guidance_rate": 0.2,
    "interval": 1,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "gradient": "full",
    "checkpointing": False,
}


def guide(sampler=None, loss=None, vae=None, **changes):
    sampler = comfy.samplers.sampler_object("euler_ancestral") if sampler is None else sampler
    return DSGGuidance().guide(sampler, Distance() if loss is None else loss, **{**SETTINGS, **changes}, vae=vae)


@pytest.mark.parametrize("name", [n for n in comfy.samplers.KSampler.SAMPLERS if n not in host.stochastic_samplers()])
def test_deterministic_samplers_are_refused_by_name_with_those_that_work(name):
    with pytest.raises(ValueError, match=r"euler_ancestral.*ddpm") as error:
        guide(comfy.samplers.sampler_object(name))
    assert "adds none" in str(error.value)
    if name not in ("ddim", "dpm_fast", "dpm_adaptive", "uni_pc", "uni_pc_bh2"):  # the host builds those from others
        assert f"({name})" in str(error.value)


def test_eta_zero_is_refused():
    with pytest.raises(ValueError, match=r"\(euler_ancestral\) adds none.*eta or s_noise"):
        guide(comfy.samplers.ksampler("euler_ancestral", {"eta": 0.0}))


def test_an_image_loss_without_a_vae_asks_for_one():
    with pytest.raises(ValueError, match=r"no VAE to decode them\. Connect the VAE"):
        guide(loss=Inpainting(torch.rand(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)))


def test_a_latent_loss_needs_no_vae():
    sampler, trace = guide()
    gaussian_mixture.sample(sampler, gaussian_mixture.patcher(), steps=4)
    assert len(trace.steps) == 3


@pytest.mark.parametrize("gradient", ["full", "fast"])
def test_a_loss_sees_what_the_vae_makes_of_the_estimate_in_its_own_scale(gradient):
    """SD1.5's latents are 0.18215 of the VAE's."""
    seen, estimates, vae = [], [], tiny_models.TinyVAE()

    class Spy(Loss):
        def forward(self, images, step=None):
            seen.append(images.detach().clone())
            return images.flatten(1).sum(1)

    model = gaussian_mixture.patcher("EPS", comfy.latent_formats.SD15())
    sampler, _ = guide(loss=Spy(), vae=vae, gradient=gradient)
    gaussian_mixture.sample(
        sampler, model, batch=2, steps=4, callback=lambda _, denoised, *rest: estimates.append(denoised.clone())
    )
    assert len(seen) == 3
    with torch.inference_mode():
        for images, denoised in zip(seen, estimates[:3], strict=True):
            torch.testing.assert_close(images, Decoder(vae)(denoised / 0.18215))


def test_a_loss_knows_the_seed_of_the_run_and_remembers_until_its_end():
    class Spy(Distance):
        def forward(self, latents, step=None):
            seen.append((step.seed, step.memory.get("told"), step.index))
            step.memory["told"] = step.index
            return super().forward(latents)

    for seed in (7, 8):
        seen = []
        sampler, _ = guide(loss=Spy())
        gaussian_mixture.sample(sampler, gaussian_mixture.patcher(), steps=4, seed=seed)
        assert seen == [(seed, None, 0), (seed, 0, 1), (seed, 1, 2)]


def test_an_empty_range_is_refused():
    with pytest.raises(ValueError, match=r"start_percent \(0.8\) is not before end_percent \(0.2\)"):
        guide(start_percent=0.8, end_percent=0.2)


def test_an_image_of_the_wrong_size_is_refused_at_the_first_guided_step():
    loss = SuperResolution(torch.rand(1, 3, 4, 4), 4)
    sampler, _ = guide(loss=loss, vae=tiny_models.TinyVAE())
    model = tiny_models.sd15()
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(tiny_models.conditioning(), tiny_models.conditioning())
    with torch.inference_mode(), pytest.raises(ValueError, match=r"4×4 pixels, where this latent calls for 16×16"):
        sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "karras", 3)
        guider.sample(torch.randn(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), sampler, sigmas, disable_pbar=True, seed=0)


@pytest.mark.parametrize("guided_steps", [True, False])
def test_the_report_passes_the_latent_through_and_draws(guided_steps, monkeypatch):
    figures = []
    monkeypatch.setattr(report_nodes, "drawn", lambda figure: figures.append(figure) or drawn(figure))
    sampler, trace = guide(guidance_rate=0.2 if guided_steps else 0.0)
    latent = {"samples": gaussian_mixture.sample(sampler, gaussian_mixture.patcher(), batch=2, steps=5)}
    report = GuidanceReport().report(latent, trace)
    passed, image, summary = report["result"]
    assert passed is latent
    assert image.shape == (1, 360, 1200, 3) and image.dtype == torch.float32
    assert 0 <= image.min() < 0.2 and image.max() == 1  # ink on paper
    steps, (loss, norm, radius) = trace.steps, [axes.get_lines() for axes in figures[0].axes]
    assert [axes.get_title().split("  ")[0] for axes in figures[0].axes] == ["loss", "gradient norm", "radius error"]
    if not guided_steps:
        assert not (loss or norm or radius)
    else:
        for i in range(2):
            assert loss[i].get_xdata().tolist() == [step.sigma for step in steps]
            assert loss[i].get_ydata().tolist() == [step.loss[i] for step in steps]
            assert norm[i].get_ydata().tolist() == [step.gradient_norm[i] for step in steps]
            assert radius[i].get_ydata().tolist() == [abs(step.radius[i] - 1) for step in steps]
    assert report["ui"] == {"text": [summary]}
    if guided_steps:
        first, *samples = summary.splitlines()
        assert first == f"DSG Guidance: 4 steps guided, sigma {trace.steps[0].sigma:.3g} to {trace.steps[-1].sigma:.3g}"
        assert [line.split(":")[0] for line in samples] == ["sample 1", "sample 2"]
        assert f"loss {trace.steps[0].loss[1]:.4g} to {trace.steps[-1].loss[1]:.4g}" in samples[1]
        assert samples[0].endswith("no steps skipped")
    else:
        assert summary == "DSG Guidance: no step was guided."


def test_the_report_shows_rates_where_they_differ():
    def reported(**settings):
        sampler, trace = guide(**settings)
        latent = {"samples": gaussian_mixture.sample(sampler, gaussian_mixture.patcher(), batch=2, steps=5)}
        _, image, summary = GuidanceReport().report(latent, trace)["result"]
        return image, summary, [[step.rate[i] for step in trace.steps] for i in range(2)]

    same, plain, _ = reported(guidance_rate=0.2, rate_steps=0)
    other, found, rates = reported(guidance_rate=0.2, auto_strength=1.0)
    assert "guidance_rate" not in plain
    for line, own in zip(found.splitlines()[1:], rates, strict=True):
        assert max(own) > 1.5 * min(own) and f"guidance_rate {min(own):.2g} to {max(own):.2g}" in line
    frames = [int(((image[0, 180] < 0.3).all(-1)).sum()) for image in (same, other)]  # left and right of each plot
    assert frames[1] > frames[0]


def test_the_summary_counts_what_was_skipped():
    class Broken(Distance):
        def forward(self, latents, step=None):
            return super().forward(latents) * (torch.tensor([1.0, torch.nan]) if step.index == 2 else 1)

    sampler, trace = guide(loss=Broken())
    gaussian_mixture.sample(sampler, gaussian_mixture.patcher(), batch=2, steps=5)
    first, second = trace.summary().splitlines()[1:]
    assert first.endswith("no steps skipped") and second.endswith("1 step skipped")
    assert GuidanceReport().report({"samples": torch.zeros(1, 4, 8, 8)}, trace)["result"][1].isfinite().all()


def test_without_matplotlib_the_latent_passes_and_the_report_names_the_command(monkeypatch):
    _, trace = guide()
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    report = GuidanceReport().report(latent, trace)
    samples, picture, summary = report["result"]
    assert samples is latent and report["ui"]["text"] == [summary]
    assert summary.startswith(trace.summary()) and summary.endswith("pip install matplotlib")
    assert picture.shape == (1, 360, 1200, 3) and 0.001 < (picture < 0.5).float().mean() < 0.1
    with pytest.raises(ImportError, match=r"^Calibrate draws with matplotlib.*pip install matplotlib"):
        new_figure("Calibrate", 1, 1)


class Interrupted(BaseException):
    """What newer hosts raise when a run is cancelled is of this kind."""


def test_the_trace_of_a_cancelled_run_is_kept():
    def cancel(step, *_):
        if step == 2:
            raise Interrupted

    sampler, trace = guide()
    model = gaussian_mixture.patcher()
    with pytest.raises(Interrupted):
        gaussian_mixture.sample(sampler, model, steps=6, callback=cancel)
    assert [step.step for step in trace.steps] == [0, 1] and not trace.finished
    assert "2 steps guided" in trace.summary() and "cancelled or failed after sigma" in trace.summary()
    gaussian_mixture.sample(sampler, model, steps=6)
    assert len(trace.steps) == 5 and "cancelled" not in trace.summary()


def test_before_any_run_the_report_says_so():
    _, trace = guide()
    assert GuidanceReport().report({"samples": torch.zeros(1, 4, 8, 8)}, trace)["result"][2] == "No run yet."


def test_an_empty_range_of_recurrence_is_refused():
    with pytest.raises(ValueError, match=r"recurrence_start \(0.8\) is not before recurrence_end \(0.2\)"):
        guide(recurrence=1, recurrence_start=0.8, recurrence_end=0.2)
    guide(recurrence=0, recurrence_start=0.8, recurrence_end=0.2)  # nothing asks for it


def test_a_smaller_decode_gives_an_image_of_full_size_and_a_gradient():
    vae = tiny_models.TinyVAE()
    latents = torch.randn(2, 4, 9, 6, generator=torch.manual_seed(0)).requires_grad_()
    with differentiable(vae.first_stage_model) as recording, recording():
        whole, half = (Decoder(vae, size)(latents) for size in (1.0, 0.5))
        (gradient,) = torch.autograd.grad(half.square().sum(), latents)
    assert half.shape == whole.shape == (2, 3, 72, 48)
    assert gradient.isfinite().all() and (gradient != 0).all()
    small = torch.nn.functional.interpolate(latents.detach(), size=(4, 3), mode="bicubic", antialias=True)
    with torch.inference_mode():
        expected = torch.nn.functional.interpolate(Decoder(vae)(small), size=(72, 48), mode="bilinear")
    torch.testing.assert_close(half.detach(), expected)


def test_a_smaller_decode_reserves_less_and_refuses_several_frames():
    vae = tiny_models.TinyVAE()
    vae.memory_used_decode = lambda shape, dtype: float(torch.Size(shape).numel())
    assert Decoder(vae, 0.5).memory_required(torch.Size((2, 4, 8, 8))) == 2 * 0.25 * 4 * 4 * 4  # TAESD
    with pytest.raises(ValueError, match=r"the latent is a video of 3 frames\. Guide a latent of one frame"):
        Decoder(vae, 0.5)(torch.zeros(1, 4, 3, 8, 8))
    with torch.inference_mode():
        image = Decoder(vae, 0.5)(torch.zeros(1, 4, 1, 8, 8))
    assert image.shape == (1, 3, 64, 64)


def test_a_vae_of_another_kind_of_model_is_refused_with_what_to_connect():
    vae = tiny_models.TinyVAE()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"latents of 16 channels\. Connect the VAE"):
        Decoder(vae)(torch.zeros(1, 16, 8, 8))


def test_a_small_decode_guides_measured_images():
    known = torch.rand(1, 3, 64, 64, generator=torch.manual_seed(1))
    results = {}
    for size in (1.0, 0.5):
        loss = Inpainting(known, torch.zeros(1, 1, 64, 64))
        sampler, trace = guide(loss=loss, vae=tiny_models.TinyVAE(), decode_scale=size)
        guider = comfy.samplers.CFGGuider(tiny_models.sd15())
        guider.set_conds(tiny_models.conditioning(), tiny_models.conditioning())
        with torch.inference_mode():
            sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.model.model_sampling, "karras", 4)
            noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0))
            results[size] = guider.sample(noise, torch.zeros(1, 4, 8, 8), sampler, sigmas, disable_pbar=True, seed=0)
        assert len(trace.steps) == 3 and not any(any(step.skipped) for step in trace.steps)
    assert not torch.equal(results[1.0], results[0.5])


def test_out_of_memory_in_the_gradient_is_tried_again_with_checkpointing(monkeypatch, caplog):
    """Once a run, in the first gradient; the run that follows it does without again."""
    model, asked = tiny_models.sd15(), []

    def recording(lenient=False, checkpointing=None):
        asked.append(checkpointing is not None)
        if checkpointing is None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return autograd._recording(lenient, checkpointing)

    @contextlib.contextmanager
    def differentiable_with_little_memory(*modules, holders=()):
        with differentiable(*modules, holders=holders):
            yield recording

    target = Distance(torch.zeros(1, 4, 8, 8))

    def result(**changes):
        sampler, _ = guide(loss=target, **changes)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(tiny_models.conditioning(), tiny_models.conditioning())
        with torch.inference_mode():
            sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "karras", 4)
            noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0))
            return guider.sample(noise, torch.zeros(1, 4, 8, 8), sampler, sigmas, disable_pbar=True, seed=0)

    expected = result(checkpointing=True)
    with monkeypatch.context() as context:
        context.setattr(kernel, "differentiable", differentiable_with_little_memory)
        assert torch.equal(result(), expected)
        assert asked == [False, True, True, True]
        assert caplog.text.count("out of memory. Trying again with checkpointing") == 1
        context.setattr(autograd, "_recording", None)  # no memory for that either
        asked.clear()
        with pytest.raises(TypeError):
            result()
        with pytest.raises(torch.cuda.OutOfMemoryError):
            result(gradient="fast")
        assert asked == [False, True, False]
    assert torch.equal(result(checkpointing=True), expected)


def test_decoding_a_batch_reserves_memory_for_it_but_one_by_one():
    vae = tiny_models.TinyVAE()
    vae.memory_used_decode = lambda shape, dtype: float(torch.Size(shape[2:]).numel())  # the host's is of one sample
    four = Decoder(vae).memory_required(torch.Size((4, 4, 8, 8)))
    assert four == 4 * Decoder(vae).memory_required(torch.Size((1, 4, 8, 8))) == 0.25 * 4 * 64  # of a TAESD
    vae.first_stage_model = torch.nn.Identity()
    assert Decoder(vae).memory_required(torch.Size((4, 4, 8, 8))) == 2.7 * 4 * 64


@pytest.mark.parametrize("gradient", ["full", "fast"])
def test_checkpointing_decodes_one_sample_at_a_time(gradient):
    vae, decoded = tiny_models.TinyVAE(), []
    own = vae.first_stage_model.decode
    vae.first_stage_model.decode = lambda latents: decoded.append(len(latents)) or own(latents)
    results = []
    for checkpointing in (False, True):
        decoded.clear()
        loss = Inpainting(torch.rand(3, 3, 16, 16, generator=torch.manual_seed(2)), torch.zeros(1, 1, 16, 16))
        sampler, _ = guide(loss=loss, vae=vae, gradient=gradient, checkpointing=checkpointing)
        results.append(gaussian_mixture.sample(sampler, gaussian_mixture.patcher(), batch=3, steps=3))
        assert decoded == ([1] * 12 if checkpointing else [3, 3])  # two guided steps, forward and again backward
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_a_batch_whose_decode_no_device_holds_is_decoded_one_by_one(monkeypatch):
    vae, decoded = tiny_models.TinyVAE(), []
    own = vae.first_stage_model.decode
    vae.first_stage_model.decode = lambda latents: decoded.append(len(latents)) or own(latents)
    vae.memory_used_decode = lambda shape, dtype: comfy.model_management.get_total_memory(tiny_models.CPU)
    loss = Inpainting(torch.rand(1, 3, 16, 16), torch.zeros(1, 1, 16, 16))
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: tiny_models.CPU)
    for batch in (3, 5):  # of TAESD's quarter
        decoded.clear()
        sampler, _ = guide(loss=loss, vae=vae)
        gaussian_mixture.sample(sampler, gaussian_mixture.patcher(), batch=batch, steps=3)
        assert set(decoded) == ({3} if batch == 3 else {1})


@pytest.mark.parametrize(("batch", "asked"), [(1, 1), (3, 2)])
def test_out_of_memory_in_fast_is_tried_again_where_decoding_one_by_one_saves_some(monkeypatch, batch, asked):
    seen = []

    def decode(self, latents):
        seen.append(len(latents))
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Decoder, "_decoded", decode)
    loss = Inpainting(torch.rand(3, 3, 16, 16), torch.zeros(1, 1, 16, 16))
    sampler, _ = guide(loss=loss, vae=tiny_models.TinyVAE(), gradient="fast")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        gaussian_mixture.sample(sampler, gaussian_mixture.patcher(), batch=batch, steps=3)
    assert seen == [batch, 1][:asked]


def test_a_checkpoint_without_a_vae_is_named():
    """Its loader gives a VAE that holds no network."""
    vae = SimpleNamespace(first_stage_model=None, process_output=lambda image: image)
    loss = Inpainting(torch.rand(1, 3, 16, 16), torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match=r"the checkpoint that this VAE comes from holds none\. Connect Load VAE"):
        guide(loss=loss, vae=vae)


def test_the_host_is_told_what_a_gradient_needs(monkeypatch):
    told = []
    own = vars(comfy.model_management) | {"load_models_gpu": lambda patchers, memory: told.append(memory)}
    management = SimpleNamespace(**own)
    monkeypatch.setattr(kernel, "comfy", SimpleNamespace(model_management=management, samplers=comfy.samplers))
    model = tiny_models.sd15()
    for settings in ({"gradient": "fast"}, {"checkpointing": True}, {}):
        sampler, _ = guide(loss=Distance(torch.zeros(1, 4, 8, 8)), **settings)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(tiny_models.conditioning(), tiny_models.conditioning())
        with torch.inference_mode():
            sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "karras", 2)
            guider.sample(torch.randn(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), sampler, sigmas, disable_pbar=True)
    fast, checkpointing, full = told
    assert fast == model.memory_required([2, 4, 8, 8])  # cond and uncond
    assert fast < checkpointing < full
