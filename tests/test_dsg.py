"""DSG against closed forms, on a mixture of Gaussians whose denoiser is exact."""

from __future__ import annotations

import functools
import itertools
import math

import comfy.samplers
import gaussian_mixture
import pytest
import torch
from sphereguide import host
from sphereguide.losses.base import Loss, Step
from sphereguide.samplers.dsg import Guidance, guided, on_sphere
from sphereguide.samplers.kernel import GRADIENTS, progress
from sphereguide.samplers.trace import GuidanceTrace
from torch import Tensor
from torch.nn import functional

N = math.prod(gaussian_mixture.SHAPE)
TARGET = torch.linspace(-1, 1, N).reshape(gaussian_mixture.SHAPE)


class Distance(Loss):
    """‖x̂₀ − target_i‖ for sample i, on latents."""

    space = "latent"

    def __init__(self, targets: Tensor = TARGET[None]) -> None:
        super().__init__()
        self.register_buffer("targets", targets)

    def forward(self, latents: Tensor, step: Step | None = None) -> Tensor:
        return torch.linalg.vector_norm((latents - self.targets.to(latents)).flatten(1), dim=1)


@pytest.fixture(scope="module")
def model():
    return gaussian_mixture.patcher()


def run(model, name="euler_ancestral", loss=None, options=None, settings=None, **kwargs):
    sampler = comfy.samplers.ksampler(name, dict(options or {}))
    trace = GuidanceTrace()
    with torch.inference_mode():
        loss = Distance() if loss is None else loss
    sampler = guided(sampler, Guidance(loss, **(settings or {})), trace)
    return gaussian_mixture.sample(sampler, model, **kwargs), trace


def unguided(model, name="euler_ancestral", options=None, **kwargs):
    return gaussian_mixture.sample(comfy.samplers.ksampler(name, dict(options or {})), model, **kwargs)


# -- the formula -------------------------------------------------------------------------------------------------------


def test_on_sphere_is_the_formula_of_the_paper():
    eps, g, rate = torch.randn(3, *gaussian_mixture.SHAPE), torch.randn(3, *gaussian_mixture.SHAPE), 0.3
    for i in range(3):  # one sample at a time, vector by vector
        e, d = eps[i].flatten(), -math.sqrt(N) * g[i].flatten() / g[i].norm()
        m = e + rate * (d - e)
        expected = (math.sqrt(N) * m / m.norm()).reshape(gaussian_mixture.SHAPE)
        torch.testing.assert_close(on_sphere(eps, g, rate)[i], expected)


def test_rate_one_is_steepest_descent_and_five_dimensional_latents_work():
    eps, g = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    expected = -math.sqrt(48) * g / g.flatten(1).norm(dim=1).reshape(2, 1, 1, 1, 1)
    torch.testing.assert_close(on_sphere(eps, g, 1.0), expected)


def test_with_a_mask_the_sphere_is_that_of_the_free_coordinates():
    eps, g = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    free = torch.zeros(2, 4, 2, 2, dtype=torch.bool)
    free[..., 0] = True
    turned = on_sphere(eps, g, 0.4, free)
    assert torch.equal(turned[..., 1], eps[..., 1])
    torch.testing.assert_close(turned[..., :1], on_sphere(eps[..., :1], g[..., :1], 0.4))


# -- the sampler -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", host.stochastic_samplers())
def test_rate_zero_is_the_unguided_sampler_bit_for_bit(model, name):
    guided_latent, trace = run(model, name, settings={"guidance_rate": 0.0}, batch=2)
    assert torch.equal(guided_latent, unguided(model, name, batch=2))
    assert trace.steps == []


class Indifferent(Loss):
    """A loss that does not depend on the image."""

    space = "latent"

    def forward(self, latents: Tensor, step: Step | None = None) -> Tensor:
        return torch.ones(len(latents))


@pytest.mark.parametrize("name", host.stochastic_samplers())
def test_noise_comes_from_the_source_that_the_sampler_would_have_used(model, name):
    # A zero gradient leaves each ε alone, so the same bits mean the same source, seed and order of draws.
    latent, trace = run(model, name, Indifferent(), batch=2)
    assert torch.equal(latent, unguided(model, name, batch=2))
    assert trace.steps and all(all(step.skipped) for step in trace.steps)


@pytest.mark.parametrize("name", host.stochastic_samplers())
def test_guided_noise_lies_on_the_sphere_and_the_loss_falls(model, name):
    schedule = {"batch": 3, "steps": 20, "scheduler": "exponential"}  # the third-order one needs an even spacing
    drawn = []

    sampler_function = comfy.samplers.sampler_object(name).sampler_function

    @functools.wraps(sampler_function)
    def spying(*args, noise_sampler, **kwargs):
        def draw(sigma, sigma_next):
            before = len(trace.steps)
            noise = noise_sampler(sigma, sigma_next)
            # exp_heun_2_x0_sde also draws for a share of zero in its last step, which is not guided.
            drawn.extend([noise.clone()] * (len(trace.steps) - before))
            return noise

        return sampler_function(*args, noise_sampler=draw, **kwargs)

    trace = GuidanceTrace()
    sampler = guided(comfy.samplers.KSAMPLER(spying), Guidance(Distance(), guidance_rate=0.3), trace)
    latent = gaussian_mixture.sample(sampler, model, **schedule)
    radii = torch.stack([noise.flatten(1).norm(dim=1) for noise in drawn]) / math.sqrt(N)
    assert len(radii) >= 6  # sa_solver draws in a part of the schedule only, the others in all but the last step
    assert (radii - 1).abs().max() < 1e-4
    torch.testing.assert_close(radii, torch.tensor([step.radius for step in trace.steps]))
    assert not any(any(step.skipped) for step in trace.steps)
    loss = Distance()
    assert (loss(latent) < loss(unguided(model, name, **schedule))).all()


@pytest.mark.parametrize(
    "gradient, model_type, cfg",
    [
        ("full", "EPS", 1.0),
        ("full", "V_PREDICTION", 1.0),
        ("full", "FLOW", 1.0),
        ("full", "EPS", 3.0),
        ("cond only", "EPS", 3.0),
        ("fast", "EPS", 3.0),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_is_that_of_finite_differences_in_float64(gradient, model_type, cfg, masked):
    model, loss, h = gaussian_mixture.patcher(model_type), Distance(), 1e-5
    x = torch.randn(2, *gaussian_mixture.SHAPE, dtype=torch.float64)
    mask = (torch.arange(N) % 3 > 0).double().reshape(1, *gaussian_mixture.SHAPE)
    sigmas = torch.tensor([0.6, 0.3, 0.0], dtype=torch.float64)
    found = {}

    def one_step(model, _x, _sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
        extra_args["denoise_mask"] = mask.expand(2, -1, -1, -1) if masked else None

        def denoise(x):
            return model(x, sigmas[0].expand(2), **extra_args)

        def central_difference(f, x, k):
            step = torch.zeros(2, N, dtype=torch.float64)
            step[:, k] = h
            step = step.reshape(x.shape)
            return (f(x + step) - f(x - step)) / (2 * h)

        if gradient == "fast":  # with respect to x̂₀
            numeric = [central_difference(loss, denoise(x), k) for k in range(N)]
        elif gradient == "cond only":  # the unconditional half stays that of x
            halves = host.guider(model)
            halves.cfg = 0.0
            constant = denoise(x)
            halves.cfg = 1.0

            def combined(x):
                return loss(constant + cfg * (denoise(x) - constant))

            numeric = [central_difference(combined, x, k) for k in range(N)]
            halves.cfg = cfg
        else:
            numeric = [central_difference(lambda x: loss(denoise(x)), x, k) for k in range(N)]
        found["numeric"] = torch.stack(numeric, 1)
        found["loss"] = loss(denoise(x))
        found["noise"] = noise_sampler(sigmas[0], sigmas[1])  # at rate 1 from nothing: −√n·g/‖g‖
        return _x

    silent = {"noise_sampler": lambda sigma, sigma_next: torch.zeros_like(x)}
    settings = Guidance(loss, guidance_rate=1.0, gradient=gradient)
    sampler = guided(comfy.samplers.KSAMPLER(one_step, silent), settings, trace := GuidanceTrace())
    gaussian_mixture.sample(sampler, model, batch=2, steps=2, cfg=cfg)
    step = trace.steps[0]
    torch.testing.assert_close(step.loss, found["loss"].tolist())
    norm, n = torch.tensor(step.gradient_norm, dtype=torch.float64)[:, None], (mask.sum() if masked else N)
    analytic = -found["noise"].flatten(1) * norm / math.sqrt(n)
    expected = found["numeric"] * mask.flatten(1) if masked else found["numeric"]
    torch.testing.assert_close(analytic, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("auto_strength", [0.0, 1.0])
def test_each_sample_of_a_batch_is_guided_by_its_own_loss_alone(model, auto_strength):
    targets = torch.stack([TARGET, -TARGET, 2 * TARGET])
    noise = torch.randn(3, *gaussian_mixture.SHAPE)
    draws = [torch.randn(3, *gaussian_mixture.SHAPE) for _ in range(20)]

    def replay(index):
        remaining = iter(draws)
        return lambda sigma, sigma_next: next(remaining)[index]

    settings = {"guidance_rate": 0.4, "auto_strength": auto_strength}
    batch, _ = run(
        model,
        loss=Distance(targets),
        options={"noise_sampler": replay(slice(None))},
        settings=settings,
        batch=3,
        noise=noise,
    )
    for i in range(3):
        one = slice(i, i + 1)
        single, _ = run(
            model,
            loss=Distance(targets[one]),
            options={"noise_sampler": replay(one)},
            settings=settings,
            noise=noise[one],
        )
        torch.testing.assert_close(batch[one], single, rtol=1e-4, atol=1e-5)


def test_epsilon_and_v_prediction_agree():
    settings = {"guidance_rate": 0.3}
    eps, _ = run(gaussian_mixture.patcher("EPS"), settings=settings, batch=2)
    v, _ = run(gaussian_mixture.patcher("V_PREDICTION"), settings=settings, batch=2)
    torch.testing.assert_close(eps, v, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_each_gradient_mode_lowers_the_loss_under_cfg(model, gradient):
    settings = {"guidance_rate": 0.3, "gradient": gradient}
    latent, _ = run(model, settings=settings, batch=4, cfg=3.0)
    assert (Distance()(latent) < Distance()(unguided(model, batch=4, cfg=3.0))).all()


def test_cond_only_is_the_full_gradient_less_its_unconditional_part():
    # With cfg 1 there is no unconditional half: the two modes agree to the bit. With cfg 3 they differ.
    model = gaussian_mixture.patcher()
    for cfg, same in ((1.0, True), (3.0, False)):
        full, _ = run(model, settings={"gradient": "full"}, cfg=cfg)
        cond_only, _ = run(model, settings={"gradient": "cond only"}, cfg=cfg)
        assert torch.equal(full, cond_only) is same


def test_cond_only_builds_no_graph_for_the_unconditional_half():
    model = gaussian_mixture.patcher()
    shifts_with_graph = []
    apply_model = model.model.apply_model

    def spy(x, t, c_crossattn=None, **kwargs):
        if torch.is_grad_enabled() and x.requires_grad:
            shifts_with_graph.append(round(float(c_crossattn[0, 0, 0]), 3))
        return apply_model(x, t, c_crossattn=c_crossattn, **kwargs)

    model.model.apply_model = spy
    run(model, settings={"gradient": "cond only"}, cfg=3.0)
    assert set(shifts_with_graph) == {0.3}


def test_the_workflows_own_function_wrapper_still_runs_in_cond_only():
    model = gaussian_mixture.patcher()
    seen = []

    def wrapper(apply_model, parameters):
        seen.append(set(parameters["c"]))
        return apply_model(parameters["input"], parameters["timestep"], **parameters["c"])

    model.set_model_unet_function_wrapper(wrapper)
    run(model, settings={"gradient": "cond only"}, cfg=3.0)
    assert seen and not any("sphereguide" in key for keys in seen for key in keys)


def test_interval_and_range_choose_the_steps():
    model = gaussian_mixture.patcher()
    _, every = run(model, steps=8)
    assert [step.step for step in every.steps] == [0, 1, 2, 3, 4, 5, 6]  # the last step draws no noise
    _, third = run(model, settings={"interval": 3}, steps=8)
    assert [step.step for step in third.steps] == [0, 3, 6]
    _, middle = run(model, settings={"start_percent": 0.3, "end_percent": 0.6}, steps=8)
    bounds = [model.model.model_sampling.percent_to_sigma(p) for p in (0.3, 0.6)]
    expected = [step.step for step in every.steps if bounds[1] <= step.sigma <= bounds[0]]
    assert [step.step for step in middle.steps] == expected and 0 < len(expected) < 7


def test_before_the_range_begins_the_run_is_the_unguided_one():
    model = gaussian_mixture.patcher()
    seen: dict[str, list[Tensor]] = {"guided": [], "unguided": []}
    run(model, settings={"start_percent": 0.5}, callback=lambda i, d, x, n: seen["guided"].append(x.clone()))
    unguided(model, callback=lambda i, d, x, n: seen["unguided"].append(x.clone()))
    same = [torch.equal(a, b) for a, b in zip(seen["guided"], seen["unguided"], strict=True)]
    assert same[0] and same[1] and not same[-1] and same == sorted(same, reverse=True)


@pytest.mark.parametrize("name, draws", [("dpmpp_sde", 2), ("seeds_2", 2), ("seeds_3", 3), ("dpm_2_ancestral", 1)])
def test_each_draw_of_a_step_follows_the_latest_model_call(model, name, draws):
    if name not in comfy.samplers.KSampler.SAMPLERS:
        pytest.skip(f"this host has no sampler {name}")
    _, trace = run(model, name, steps=5)
    for step in range(4):
        sigmas = [entry.sigma for entry in trace.steps if entry.step == step]
        assert len(sigmas) == draws
        assert len(set(sigmas)) == draws  # each with a model call of its own


def test_a_denoise_mask_keeps_its_region_and_guides_the_rest(model):
    latent = torch.randn(2, *gaussian_mixture.SHAPE)
    mask = torch.zeros(2, 1, 2, 2)
    mask[..., 0] = 1
    kwargs = {"batch": 2, "latent": latent, "denoise_mask": mask}
    result, trace = run(model, settings={"guidance_rate": 0.3}, **kwargs)
    torch.testing.assert_close(result[..., 1], latent[..., 1], rtol=1e-4, atol=1e-4)
    radii = torch.tensor([step.radius for step in trace.steps])
    assert (radii - 1).abs().max() < 1e-4
    assert (Distance()(result) < Distance()(unguided(model, **kwargs))).all()


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_mask_that_leaves_nothing_free_leaves_the_latent_alone(model, gradient):
    latent = torch.randn(1, *gaussian_mixture.SHAPE)
    mask = torch.zeros(1, 1, 2, 2)
    result, trace = run(model, settings={"gradient": gradient}, latent=latent, denoise_mask=mask)
    torch.testing.assert_close(result, latent, rtol=1e-4, atol=1e-4)
    assert all(step.skipped == [True] for step in trace.steps)


def test_guiding_twice_is_refused(model):
    inner = guided(comfy.samplers.ksampler("euler_ancestral"), Guidance(Distance()), GuidanceTrace())
    outer = guided(inner, Guidance(Distance(-TARGET[None])), GuidanceTrace())
    with pytest.raises(ValueError, match="guided already"):
        gaussian_mixture.sample(outer, model)


def test_a_trace_is_emptied_when_a_run_begins(model):
    trace = GuidanceTrace()
    sampler = guided(comfy.samplers.ksampler("euler_ancestral"), Guidance(Distance()), trace)
    for _ in range(2):
        gaussian_mixture.sample(sampler, model, batch=2)
        assert len(trace.steps) == 7
        assert len(trace.steps[0].loss) == 2
    assert trace.steps[0].sigma > trace.steps[0].sigma_next > 0


def test_the_wrapper_keeps_options_and_shows_the_samplers_signature():
    import inspect

    sampler = comfy.samplers.ksampler("euler_ancestral", {"eta": 0.7}, {"random": True})
    wrapped = guided(sampler, Guidance(Distance()), GuidanceTrace())
    assert "noise_sampler" in inspect.signature(wrapped.sampler_function).parameters
    assert wrapped.extra_options == {"eta": 0.7} and wrapped.extra_options is not sampler.extra_options
    assert wrapped.inpaint_options == {"random": True} and wrapped.inpaint_options is not sampler.inpaint_options


# -- bad input ---------------------------------------------------------------------------------------------------------


class Broken(Distance):
    """NaN for the second sample."""

    def forward(self, latents: Tensor, step: Step | None = None) -> Tensor:
        return super().forward(latents) * torch.tensor([1.0, float("nan"), 1.0])


def test_nan_leaves_the_noise_of_its_sample_alone_and_warns_once(model, caplog):
    result, trace = run(model, loss=Broken(), batch=3)
    assert all(step.skipped == [False, True, False] for step in trace.steps)
    plain, good = unguided(model, batch=3), run(model, batch=3)[0]
    torch.testing.assert_close(result[1], plain[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result[[0, 2]], good[[0, 2]], rtol=1e-4, atol=1e-5)
    warnings = [record.getMessage() for record in caplog.records if record.name == "sphereguide"]
    assert len(warnings) == 1 and "7 of 7" in warnings[0]


def test_a_perfect_fit_has_a_gradient_of_zero_not_nan():
    loss = Distance()
    latents = TARGET[None].clone().requires_grad_()
    loss(latents).sum().backward()
    assert torch.equal(latents.grad, torch.zeros_like(latents))


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "ddim", "uni_pc"])
def test_deterministic_samplers_are_known_as_such(name):
    assert host.adds_noise(comfy.samplers.sampler_object(name)) is False


def test_eta_zero_counts_as_deterministic():
    assert host.adds_noise(comfy.samplers.ksampler("euler_ancestral", {"eta": 0.0})) is False
    assert host.adds_noise(comfy.samplers.ksampler("dpmpp_2m_sde", {"s_noise": 0.0})) is False
    assert host.adds_noise(comfy.samplers.ksampler("euler_ancestral", {"eta": 0.5})) is True


def test_trying_a_sampler_leaves_the_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    host.adds_noise(comfy.samplers.ksampler("lcm"))
    assert torch.equal(torch.rand(3), expected)


def test_a_sampler_that_never_draws_is_refused_while_it_runs(model):
    def pretends(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
        for sigma in sigmas[:-1]:
            x = model(x, sigma.expand(len(x)), **extra_args)
        return x

    sampler = guided(comfy.samplers.KSAMPLER(pretends), Guidance(Distance()), GuidanceTrace())
    with pytest.raises(ValueError, match=r"drew none.*euler_ancestral"):
        gaussian_mixture.sample(sampler, model)


def test_a_sampler_that_draws_elsewhere_in_the_schedule_runs_and_says_so(model, caplog):
    def around_four(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
        for sigma, sigma_next in itertools.pairwise(sigmas):
            x = model(x, sigma.expand(len(x)), **extra_args)
            if 3.9 < sigma < 4.1:
                x = x + noise_sampler(sigma, sigma_next)
        return x

    sampler = comfy.samplers.KSAMPLER(around_four)
    latent = gaussian_mixture.sample(guided(sampler, Guidance(Distance()), trace := GuidanceTrace()), model)
    assert torch.equal(latent, gaussian_mixture.sample(sampler, model)) and not trace
    assert "drew no noise in the steps that were to be guided" in caplog.text


def test_a_model_without_gradients_is_refused_with_a_way_out():
    model = gaussian_mixture.patcher()
    apply_model = model.model.apply_model
    model.model.apply_model = torch.no_grad()(apply_model)
    with pytest.raises(RuntimeError, match=r"DSG Guidance: this model runs without gradients here\. .*'fast'"):
        run(model, settings={"gradient": "full"})
    _, trace = run(model, settings={"gradient": "fast"})
    assert len(trace.steps) == 7 and not any(any(step.skipped) for step in trace.steps)


def test_a_cfg_function_does_not_hide_a_model_without_gradients():
    model = gaussian_mixture.patcher()
    model.model.apply_model = torch.no_grad()(model.model.apply_model)
    model.set_model_sampler_cfg_function(lambda args: args["cond"])  # x enters beside the model's output
    with pytest.raises(RuntimeError, match="without gradients"):
        run(model, cfg=3.0)


def test_a_range_without_a_step_is_said(model, caplog):
    latent, trace = run(model, settings={"start_percent": 0.9999})
    assert trace.steps == [] and torch.equal(latent, unguided(model))
    assert "no step of this run lies where start_percent" in caplog.text


def test_a_schedule_of_one_entry_returns_what_it_was_given(model):
    sampler = guided(comfy.samplers.ksampler("dpmpp_2m_sde"), Guidance(Distance()), GuidanceTrace())
    x = torch.randn(1, *gaussian_mixture.SHAPE)
    assert torch.equal(sampler.sampler_function(None, x, torch.tensor([0.0])), x)


def test_differential_diffusion_guides_what_is_free_at_each_step(model):
    latent = torch.randn(1, *gaussian_mixture.SHAPE)
    grey = torch.linspace(0, 1, 4).reshape(1, 1, 2, 2)
    patched = model.clone()
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "normal", 8)

    def threshold(sigma, denoise_mask, extra_options):
        assert extra_options["model"] and torch.equal(extra_options["sigmas"], sigmas)
        return (denoise_mask >= sigma.max() / sigmas[0]).to(denoise_mask)

    patched.set_model_denoise_mask_function(threshold)
    result, trace = run(patched, settings={"guidance_rate": 0.5}, latent=latent, denoise_mask=grey)
    assert (torch.tensor([step.radius for step in trace.steps]) - 1).abs().max() < 1e-4
    assert not torch.equal(result, unguided(patched, latent=latent, denoise_mask=grey))


def test_after_an_error_in_the_loss_the_model_is_as_it_was(model):
    class Raises(Loss):
        space = "latent"

        def forward(self, latents, step=None):
            raise RuntimeError("boom")

    before = {name: (id(p), p.data_ptr()) for name, p in model.model.named_parameters()}
    plain = unguided(model)
    with pytest.raises(RuntimeError, match="boom"):
        run(model, loss=Raises())
    assert {name: (id(p), p.data_ptr()) for name, p in model.model.named_parameters()} == before
    assert torch.equal(unguided(model), plain)


# -- what the strength means -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options", [("euler_ancestral", {}), ("euler_ancestral", {"eta": 0.5}), ("dpmpp_2m_sde", {})]
)
def test_a_rate_that_knows_its_steps_is_as_strong_with_any_number_of_them(model, name, options):
    def reached(steps, rate_steps):
        settings = {"guidance_rate": 0.2, "rate_steps": rate_steps}
        latent, _ = run(model, name, options=options, settings=settings, batch=200, steps=steps, scheduler="karras")
        return float(Distance()(latent).mean())

    plain = float(Distance()(unguided(model, name, options=options, batch=200, steps=50, scheduler="karras")).mean())
    few, many = (plain - reached(steps, 50) for steps in (20, 100))
    assert abs(many / few - 1) < 0.15
    few, many = (plain - reached(steps, 0) for steps in (20, 100))
    assert many / few > 1.35  # per step, as in the paper, more steps are stronger


def test_the_scaled_rate(model):
    """tan of the angle between ε and m, by √(50/N); a part of a schedule counts as the whole that it is a part of."""

    def angle(steps, rate, denoise=1.0, rate_steps=50):
        drawn = []

        def spying(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
            model(x, sigmas[:1].expand(len(x)), **extra_args)
            drawn.append(noise_sampler(sigmas[0], sigmas[1]))
            return x

        eps = torch.randn(1, *gaussian_mixture.SHAPE, generator=torch.manual_seed(0))
        eps *= math.sqrt(N) / eps.norm()
        guidance = Guidance(Distance(), guidance_rate=rate, rate_steps=rate_steps)
        sampler = guided(comfy.samplers.KSAMPLER(spying), guidance, trace := GuidanceTrace())
        sampler.extra_options["noise_sampler"] = lambda sigma, sigma_next: eps
        sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "simple", round(steps / denoise))
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(gaussian_mixture.conditioning(), gaussian_mixture.conditioning())
        with torch.inference_mode():
            latent = torch.zeros(1, *gaussian_mixture.SHAPE)
            guider.sample(latent + 1, latent, sampler, sigmas[-(steps + 1) :], disable_pbar=True, seed=0)
        assert len(trace.steps) == 1
        return drawn[0], eps

    for steps, denoise in ((20, 1.0), (100, 1.0), (20, 0.4)):
        scale = math.sqrt(50 * denoise / steps)
        rate = 0.2 * scale / (0.8 + 0.2 * scale)
        torch.testing.assert_close(
            angle(steps, 0.2, denoise)[0], angle(steps, rate, denoise, 0)[0], rtol=1e-2, atol=1e-2
        )
    assert torch.equal(angle(50, 0.2)[0], angle(50, 0.2, rate_steps=0)[0])
    assert torch.equal(angle(20, 1.0)[0], angle(20, 1.0, rate_steps=0)[0])


# -- auto strength -----------------------------------------------------------------------------------------------------


class Turning(Loss):
    """Its gradients are of length 1, and the cosine between a step's and the one's before is `cosines [steps, B]`.

    `share(step)`, `[B]`, multiplies them.
    """

    space = "latent"

    def __init__(self, cosines: Tensor, share=lambda step: 1.0) -> None:
        super().__init__()
        self.share = share
        generator = torch.Generator().manual_seed(0)
        directions = [functional.normalize(torch.randn(cosines.shape[1], N, generator=generator), dim=1)]
        for cosine in cosines:
            aside = torch.randn(cosines.shape[1], N, generator=generator)
            aside -= (aside * directions[-1]).sum(1, keepdim=True) * directions[-1]
            sine = (1 - cosine**2).sqrt()
            directions.append(cosine[:, None] * directions[-1] + sine[:, None] * functional.normalize(aside, dim=1))
        self.directions = torch.stack(directions[1:])

    def forward(self, latents: Tensor, step: Step | None = None) -> Tensor:
        return (self.directions[step.index] * latents.flatten(1)).sum(1) * self.share(step.index)


def corrections(trace, kappa=1.0, sample=0, steps=20, kind="EPS"):
    """f of each step, from its rate: what the curve of all steps leaves of tan α."""
    sampling = gaussian_mixture.patcher(kind).model.model_sampling
    found = []
    for step in trace.steps:
        rate = step.rate[sample]
        curve = math.exp(1.25 * (progress(sampling, step.sigma) - 0.5))
        found.append(rate / (1 - rate) / (kappa * 0.5 * math.sqrt(50 / steps) * curve))
    return found


def corrected(f: float, cosine: float) -> float:
    """By the formula."""
    return min(max(f * math.exp(0.5 * (cosine - min(max(cosine, -0.9), -0.3))), 0.5), 1.5)


@pytest.mark.parametrize("kind", ["EPS", "V_PREDICTION", "FLOW"])
@pytest.mark.parametrize("kappa, steps", [(0.6, 20), (1.0, 20), (1.0, 80)])
def test_auto_strength_rises_and_is_corrected_by_the_cosine_between_successive_gradients(kind, kappa, steps):
    cosines = 1 - 2 * torch.rand(steps, 3, generator=torch.Generator().manual_seed(1))
    cosines[steps // 2 :, 1] = -0.99
    settings = {"auto_strength": kappa, "gradient": "fast"}
    _, trace = run(gaussian_mixture.patcher(kind), loss=Turning(cosines), settings=settings, batch=3, steps=steps)
    assert len(trace.steps) == steps - 1
    for i in range(3):
        expected = list(itertools.accumulate(cosines[1:-1, i].tolist(), corrected, initial=1.0))
        assert corrections(trace, kappa, i, steps, kind) == pytest.approx(expected, rel=2e-3)
        assert len({*expected}) > 3


@pytest.mark.parametrize("cosine, factor", [(1.0, 1.5), (-0.6, 1.0), (-1.0, 0.5)])
def test_auto_strength_corrects_by_a_half_at_most(model, cosine, factor):
    settings = {"auto_strength": 2.0, "gradient": "fast"}
    loss = Turning(torch.full((100, 1), cosine))
    latent, trace = run(model, loss=loss, settings=settings, steps=100, scheduler="karras")
    found = corrections(trace, 2.0, 0, 100)
    assert latent.isfinite().all() and found[0] == pytest.approx(1, rel=1e-3)
    assert found[-1] == pytest.approx(factor, rel=1e-3)
    assert min(1, factor) * 0.999 < min(found) and max(found) < max(1, factor) * 1.001


@pytest.mark.parametrize("first", [0.0, 1e30, math.nan])
def test_auto_strength_takes_no_notice_of_a_first_gradient_that_is_none(model, first):
    """1e30: its norm is no float32."""
    cosines = torch.full((20, 2), 0.9)
    loss = Turning(cosines, lambda step: torch.tensor([1.0, first if step == 0 else 1.0]))
    _, trace = run(model, loss=loss, settings={"auto_strength": 1.0, "gradient": "fast"}, batch=2, steps=20)
    assert [step.skipped for step in trace.steps[:2]] == [[False, True], [False, False]]
    assert corrections(trace, sample=1)[:3] == pytest.approx([1.0, 1.0, 1.5], rel=1e-3)
    assert corrections(trace, sample=0)[:3] == pytest.approx([1.0, 1.5, 1.5], rel=1e-3)


@pytest.mark.parametrize("fourth", [0.0, 1e30, 1e-30, math.inf, math.nan])
def test_auto_strength_takes_no_notice_of_a_later_gradient_that_is_none(model, fourth):
    """1e30, 1e-30: their norms are no float32."""
    loss = Turning(torch.full((20, 1), -0.6), lambda step: fourth if step == 3 else 1.0)
    _, trace = run(model, loss=loss, settings={"auto_strength": 1.0, "gradient": "fast"}, steps=20)
    assert [step.skipped[0] for step in trace.steps] == [step == 3 for step in range(19)]
    assert corrections(trace)[:4] == pytest.approx([1.0] * 4, rel=1e-3)


def test_auto_strength_in_part_of_a_schedule_with_a_mask_and_steps_between(model):
    """N is that of the whole schedule, and the cosine that between guided steps, in the coordinates that are free."""
    steps, left = 50, 20
    sampling = model.model.model_sampling
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)[-left - 1 :]
    mask = torch.ones(1, 1, 2, 2)
    mask[..., 0] = 0
    loss = Turning(1 - 2 * torch.rand(left, 1, generator=torch.Generator().manual_seed(2)))
    settings = {"auto_strength": 0.7, "gradient": "fast", "interval": 2}
    _, trace = run(model, loss=loss, settings=settings, sigmas=sigmas, denoise_mask=mask)
    assert [step.step for step in trace.steps] == list(range(0, left - 1, 2))
    whole = left / (progress(sampling, float(sigmas[-1])) - progress(sampling, float(sigmas[0])))
    seen = [(loss.directions[step.step].reshape(gaussian_mixture.SHAPE) * mask[0]).flatten() for step in trace.steps]
    cosines = [float(functional.cosine_similarity(*pair, dim=0)) for pair in itertools.pairwise(seen)]
    expected = list(itertools.accumulate(cosines, corrected, initial=1.0))
    assert corrections(trace, 0.7, 0, whole) == pytest.approx(expected, rel=2e-3)
    assert 45 < whole < 55


def test_auto_strength_follows_the_level_of_each_call_within_a_step(model):
    loss = Turning(torch.full((20, 1), -0.6))
    _, trace = run(model, "dpmpp_sde", loss=loss, settings={"auto_strength": 1.0, "gradient": "fast"}, steps=20)
    # Both calls of a step find the same gradient, which lets f grow; from one step to the next it stays.
    assert len({step.sigma for step in trace.steps}) == len(trace.steps) == 38
    assert corrections(trace) == pytest.approx([1.0] + [1.5] * 37, rel=2e-3)


def test_with_auto_strength_guidance_rate_and_rate_steps_do_not_count(model):
    first, *others = (
        run(model, settings={"auto_strength": 1.0, "guidance_rate": rate, "rate_steps": steps})[0]
        for rate, steps in ((0.2, 0), (0.0, 50), (1.0, 20))
    )
    assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(first, unguided(model))


def test_auto_strength_corrects_once_a_model_call_however_often_noise_is_drawn_after_it(model):
    def twice(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
        for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
            x = model(x, sigma * x.new_ones(len(x)), **extra_args)
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": x})
            if sigma_next > 0:
                draws = noise_sampler(sigma, sigma_next), noise_sampler(sigma, sigma_next)
                x = x + sigma_next * (draws[0] + draws[1]) / 2**0.5
        return x

    loss = Turning(torch.full((20, 1), -0.95))
    settings = Guidance(loss, auto_strength=1.0, gradient="fast")
    sampler = comfy.samplers.KSAMPLER(twice, {"noise_sampler": lambda *_: torch.randn(1, *gaussian_mixture.SHAPE)})
    gaussian_mixture.sample(guided(sampler, settings, trace := GuidanceTrace()), model, steps=20)
    expected = [math.exp(-0.025 * step) for step in range(19) for _ in range(2)]
    assert corrections(trace) == pytest.approx(expected, rel=2e-3)


def test_the_same_auto_strength_takes_a_run_of_any_steps_about_as_far(model):
    """A mean distance to the target that differs less than that of one rate without rate_steps."""

    def spread(settings):
        found = [
            float(Distance()(run(model, settings=settings, batch=100, steps=steps)[0]).mean())
            for steps in (15, 40, 100)
        ]
        return max(found) / min(found)

    assert spread({"auto_strength": 0.3}) < spread({"guidance_rate": 0.15})


def test_more_auto_strength_is_nearer_to_the_loss(model):
    def reached(kappa):
        latent, _ = run(model, settings={"auto_strength": kappa}, batch=100, steps=30, scheduler="karras")
        return float(Distance()(latent).mean())

    assert reached(1.0) < reached(0.5) < reached(0.2)


@pytest.mark.parametrize("second", [0.0, math.nan])
def test_auto_strength_waits_where_there_is_no_gradient(model, second):
    cosines = torch.linspace(-1, 1, 60).reshape(20, 3)
    settings = {"auto_strength": 1.0, "gradient": "fast"}
    without = Turning(cosines, lambda step: torch.tensor([1.0, second, 1.0]))
    _, trace = run(model, loss=without, settings=settings, batch=3, steps=20)
    _, alone = run(model, loss=Turning(cosines), settings=settings, batch=3, steps=20)
    assert all(step.skipped == [False, True, False] for step in trace.steps)
    assert corrections(trace, sample=1) == pytest.approx([1.0] * len(trace.steps), rel=1e-3)
    for step, other in zip(trace.steps, alone.steps, strict=True):
        assert step.rate[::2] == pytest.approx(other.rate[::2], rel=1e-4)


def test_a_gradient_that_is_missing_at_times_is_followed_where_it_is_there(model):
    loss = Turning(torch.full((20, 2), -0.9), lambda step: torch.tensor([1.0, float(step % 2 == 0)]))
    _, trace = run(model, loss=loss, settings={"auto_strength": 1.0, "gradient": "fast"}, batch=2, steps=20)
    kept = [i for i in range(len(trace.steps)) if i % 2 == 0]
    found, f = corrections(trace, sample=1), 1.0
    for before, after in itertools.pairwise(kept):
        cosine = float((loss.directions[before, 1] * loss.directions[after, 1]).sum())
        f = corrected(f, cosine)
        assert found[after] == pytest.approx(f, rel=2e-3)
    assert f > 1
    assert corrections(trace) == pytest.approx([1.0] * len(trace.steps), rel=1e-3)


def test_repetitions_take_the_angle_of_auto_strength_as_it_is(model):
    loss = Turning(torch.full((12, 1), -1.0))
    settings = {"auto_strength": 1.0, "recurrence": 2, "gradient": "fast"}
    _, trace = run(model, loss=loss, settings=settings, scheduler="karras", steps=12)
    steps = [[entry.rate[0] for entry in trace.steps if entry.step == step] for step in range(2, 10)]
    assert all(len(rates) == 3 for rates in steps)
    assert all(rates[0] == rates[1] != rates[2] for rates in steps)  # the step's own call comes last
