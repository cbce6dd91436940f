"""Losses made of losses: what a weight means, in sums, over the schedule and in regions."""

from __future__ import annotations

import comfy.samplers
import gaussian_mixture
import pytest
import torch
from sphereguide.losses.base import Loss, Step
from sphereguide.losses.combine import Combined, Masked, Scheduled
from sphereguide.losses.measurement import Inpainting, LowPass
from sphereguide.nodes.combine import CombineLosses, MaskLoss, ScheduleLoss
from sphereguide.samplers.diffrgd import Riemannian, riemannian_guided
from sphereguide.samplers.dps import Posterior, posterior_guided
from sphereguide.samplers.dsg import Guidance, guided
from sphereguide.samplers.tfg import Unified, unified_guided
from sphereguide.samplers.trace import GuidanceTrace


class Linear(Loss):
    """scale · ⟨direction, image⟩: its gradient is known."""

    def __init__(self, direction, scale=1.0, space="image"):
        super().__init__()
        self.direction, self.scale, self.space = direction, scale, space
        self.seen = []

    def forward(self, images, step=None):
        self.seen.append(images.detach())
        direction = self.direction.to(images)
        if images.shape[-2:] != direction.shape[-2:]:
            direction = torch.ones_like(images[:1])
        return self.scale * (images * direction).flatten(1).sum(1)


@pytest.fixture
def directions():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 3, 8, 8, generator=generator) for _ in range(3)]


@pytest.fixture
def images():
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def gradient(loss, images, step=None):
    images = images.clone().requires_grad_()
    value = loss(images, step)
    return value.detach(), torch.autograd.grad(value.sum(), images)[0]


# -- sums --------------------------------------------------------------------------------------------------------------


def test_raw_sums_add_values_and_gradients(images, directions):
    a, b = Linear(directions[0], 100.0), Linear(directions[1], 0.01)
    value, g = gradient(Combined([a, b], [1.0, 2.0], normalise=False), images)
    torch.testing.assert_close(value, a(images) + 2 * b(images))
    torch.testing.assert_close(g, (100 * directions[0] + 0.02 * directions[1]).expand_as(g))


def test_normalised_sums_weigh_directions_whatever_the_numbers(images, directions):
    unit = [d / d.norm() for d in directions]
    for scale in (1e-3, 1.0, 1e4):
        loss = Combined([Linear(directions[0], scale), Linear(directions[1])], [1.0, 0.5])
        value, g = gradient(loss, images)
        torch.testing.assert_close(g, (unit[0] + 0.5 * unit[1]).expand_as(g))
        torch.testing.assert_close(
            value, scale * (images * directions[0]).flatten(1).sum(1) + 0.5 * loss.losses[1](images)
        )


def test_each_sample_is_normalised_by_itself(images):
    class Squared(Loss):
        def forward(self, images, step=None):
            return images.square().flatten(1).sum(1)

    large = torch.cat([images[:1], 1000 * images[:1]])
    _, g = gradient(Combined([Squared(), LowPass(torch.zeros(1, 3, 8, 8), 2)], [1.0, 0.0]), large)
    torch.testing.assert_close(g.flatten(1).norm(dim=1), torch.ones(2))


def test_sums_nest(images, directions):
    unit = [d / d.norm() for d in directions]
    inner = Combined([Linear(directions[0], 50.0), Linear(directions[1])], [1.0, 1.0])
    _, g = gradient(Combined([inner, Linear(directions[2], 7.0)], [2.0, -1.0]), images)
    both = unit[0] + unit[1]
    torch.testing.assert_close(g, (2 * both / both.norm() - unit[2]).expand_as(g))


def test_a_loss_that_fails_at_one_sample_leaves_the_others_their_direction(images, directions):
    class Broken(Loss):
        def forward(self, images, step=None):
            return (images * torch.tensor([float("nan"), 1.0]).reshape(-1, 1, 1, 1)).flatten(1).sum(1)

    class Constant(Loss):
        def forward(self, images, step=None):
            return torch.ones(len(images))

    unit = directions[0] / directions[0].norm()
    value, g = gradient(Combined([Linear(directions[0]), Broken(), Constant()], [1.0, 1.0, 1.0]), images)
    torch.testing.assert_close(g[0], unit[0])
    torch.testing.assert_close(g[1], unit[0] + torch.full_like(unit[0], 3 * 64).rsqrt())
    assert value.isnan().tolist() == [True, False]  # the trace shows it


def test_a_weight_of_zero_leaves_the_loss_out(images, directions):
    unused = Linear(directions[1])
    Combined([Linear(directions[0]), unused], [1.0, 0.0])(images)
    assert unused.seen == []


def test_what_can_not_be_added_up_is_refused(directions):
    with pytest.raises(ValueError, match="all weights are 0"):
        Combined([Linear(directions[0])], [0.0])
    with pytest.raises(ValueError, match="image and latent"):
        Combined([Linear(directions[0]), Linear(directions[1], space="latent")], [1.0, 1.0])


def test_patchers_of_all_parts_are_listed_once(directions):
    one, two = Linear(directions[0]), Linear(directions[1])
    one.patchers, two.patchers = ("clip",), ("clip", "face")
    nested = Masked(Scheduled(Combined([one, two], [1, 1]), "constant", 0, 1), torch.ones(1, 1, 8, 8))
    assert nested.patchers == ("clip", "face")


# -- the schedule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ("constant", [2.0, 2.0, 2.0, 2.0, 2.0]),
        ("ramp up", [0.0, 0.0, 1.0, 2.0, 2.0]),
        ("ramp down", [2.0, 2.0, 1.0, 0.0, 0.0]),
        ("window", [0.0, 0.0, 2.0, 0.0, 0.0]),
    ],
)
def test_curves(directions, curve, expected):
    loss = Scheduled(Linear(directions[0]), curve, 0.25, 0.75, weight=2.0)
    assert [loss.weight(Step(progress=p)) for p in (0.0, 0.25, 0.5, 0.75, 1.0)] == expected
    assert Masked(loss, torch.ones(1, 1, 8, 8)).weight(Step(progress=0.5)) == expected[2]


def test_a_range_the_wrong_way_round_is_refused(directions):
    with pytest.raises(ValueError, match=r"start_percent \(0.5\) is not before end_percent \(0.5\)"):
        ScheduleLoss().make(Linear(directions[0]), 1.0, "constant", 0.5, 0.5)


def test_a_sum_follows_the_schedules_of_its_parts(images, directions):
    unit = [d / d.norm() for d in directions]
    fading = Scheduled(Linear(directions[0], 9.0), "ramp down", 0.0, 1.0)
    early = Scheduled(Linear(directions[1]), "window", 0.0, 0.6)
    loss = Combined([fading, early], [1.0, 1.0])
    _, g = gradient(loss, images, Step(progress=0.5))
    torch.testing.assert_close(g, (0.5 * unit[0] + unit[1]).expand_as(g))
    assert loss.weight(Step(progress=0.5)) == 1.0
    _, g = gradient(loss, images, Step(progress=0.75))  # alone, at its own strength
    torch.testing.assert_close(g, unit[0].expand_as(g))
    assert loss.weight(Step(progress=0.75)) == 0.25
    assert loss.weight(Step(progress=1.0)) == 0.0


class Distance(Loss):
    space = "latent"

    def forward(self, latents, step=None):
        return torch.linalg.vector_norm((latents - 2.0).flatten(1), dim=1)


def sample(loss, rate):
    trace = GuidanceTrace()
    sampler = guided(comfy.samplers.ksampler("euler_ancestral"), Guidance(loss, guidance_rate=rate), trace)
    return gaussian_mixture.sample(sampler, gaussian_mixture.patcher(), steps=12), trace


def test_a_constant_schedule_multiplies_the_guidance_rate():
    halved, _ = sample(Scheduled(Distance(), "constant", 0.0, 1.0, weight=0.5), 0.4)
    assert torch.equal(halved, sample(Distance(), 0.2)[0])
    assert not torch.equal(halved, sample(Distance(), 0.4)[0])
    most, _ = sample(Scheduled(Distance(), "constant", 0.0, 1.0, weight=10.0), 0.4)
    assert torch.equal(most, sample(Distance(), 1.0)[0])


#: What a loss's weight multiplies: all of it is the strength, the rest is off.
STRENGTHS = {
    "guidance_rate and auto_strength": (guided, Guidance, ["guidance_rate", "auto_strength"], {}),
    "step_size of DPS": (posterior_guided, Posterior, ["step_size"], {}),
    "step_size of DiffRGD": (riemannian_guided, Riemannian, ["step_size"], {}),
    "rho": (unified_guided, Unified, ["rho"], {"mu": 0.0}),
    "mu": (unified_guided, Unified, ["mu"], {"rho": 0.0}),
}


@pytest.mark.parametrize("method", STRENGTHS)
def test_a_constant_schedule_multiplies_the_strength_of_every_method(method):
    steer, objective, names, rest = STRENGTHS[method]

    def at(loss, strength):
        with torch.inference_mode():
            settings = objective(loss, **dict.fromkeys(names, strength), **rest)
        sampler = steer(comfy.samplers.ksampler("euler_ancestral"), settings, GuidanceTrace())
        return gaussian_mixture.sample(sampler, gaussian_mixture.patcher(), steps=12)

    halved = at(Scheduled(Distance(), "constant", 0.0, 1.0, weight=0.5), 0.4)
    assert torch.equal(halved, at(Distance(), 0.2))
    assert not torch.equal(halved, at(Distance(), 0.4))


def test_among_several_a_weight_above_one_says_how_much_of_the_direction():
    """And not how far to go: that would be the guidance rate."""
    a, b = Linear(torch.ones(1, 3, 8, 8)), Linear(torch.arange(192.0).reshape(1, 3, 8, 8))
    step = Step(progress=0.5)
    tripled = Combined([a, Scheduled(b, "constant", 0.0, 1.0, weight=3.0)], [1.0, 1.0])
    assert tripled.weight(step) == 1.0
    assert Combined([Scheduled(b, "constant", 0.0, 1.0, weight=3.0)], [1.0]).weight(step) == 3.0
    x = torch.rand(1, 3, 8, 8)
    for got, expected in zip(gradient(tripled, x, step), gradient(Combined([a, b], [1.0, 3.0]), x), strict=True):
        torch.testing.assert_close(got, expected)


def test_steps_of_weight_zero_are_not_guided():
    whole, late = sample(Distance(), 0.2)[1], sample(Scheduled(Distance(), "window", 0.3, 0.7), 0.2)[1]
    inside = [step.step for step in late.steps]
    assert 2 <= len(inside) < len(whole.steps) and inside == list(range(inside[0], inside[-1] + 1))
    sampling = gaussian_mixture.patcher().model.model_sampling
    low, high = (float(sampling.percent_to_sigma(p)) for p in (0.7, 0.3))
    assert inside == [step.step for step in whole.steps if low < step.sigma < high]


def test_a_combination_guides_a_sampler_and_nothing_of_the_run_stays():
    loss = Combined([Distance(), Scheduled(Distance(), "ramp down", 0.0, 1.0)], [1.0, 1.0])
    first, _ = sample(loss, 0.2)
    assert torch.equal(first, sample(loss, 0.2)[0])


# -- regions -----------------------------------------------------------------------------------------------------------


def test_a_masked_loss_sees_the_whole_image_and_changes_the_region(images, directions):
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:5, 1:7] = 1
    value, g = gradient(Masked(Linear(directions[0]), mask), images)
    torch.testing.assert_close(value, Linear(directions[0])(images))
    torch.testing.assert_close(g, (directions[0] * mask).expand_as(g))


def test_cropped_a_loss_sees_the_box_of_the_region(images, directions):
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2, 1] = mask[..., 4, 6] = 1
    inner = Linear(directions[0])
    _, g = gradient(Masked(inner, mask, crop=True), images)
    assert torch.equal(inner.seen[0], images[..., 2:5, 1:7])
    torch.testing.assert_close(g, mask.expand_as(g))


def test_masks_are_resized_and_belong_to_their_samples(images, directions):
    masks = torch.zeros(2, 1, 16, 16)
    masks[0, :, :8], masks[1, :, 8:] = 1, 1
    _, g = gradient(Masked(Linear(directions[0]), masks), images.repeat(2, 1, 1, 1)[:3])
    for i in (0, 2):
        assert g[i, :, :3].abs().min() > 0 and g[i, :, 5:].abs().max() == 0
    assert g[1, :, :3].abs().max() == 0 and g[1, :, 5:].abs().min() > 0


def test_a_loss_remembers_each_region_by_itself(images):
    class Remembering(Loss):
        def forward(self, images, step=None):
            seen.append(step.memory.get(self))
            step.memory[self] = images.shape[-1]
            return images.flatten(1).sum(1)

    masks = torch.zeros(2, 1, 1, 8, 8)
    masks[0, ..., :3], masks[1, ..., 3:] = 1, 1
    inner, step, seen = Remembering(), Step(index=2, progress=0.5, seed=3), []
    both = Combined([Masked(inner, mask, crop=True) for mask in masks], [1.0, 1.0])
    for _ in range(2):
        both(images, step)
    assert seen == [None, None, 3, 5]


def test_a_measurement_of_the_whole_image_says_what_to_do_in_a_region(images):
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :3] = 1
    with pytest.raises(ValueError, match=r"Resize the image.*With Mask Loss, set sees to 'whole image'\."):
        Masked(Inpainting(images, torch.zeros(1, 1, 8, 8)), mask, crop=True)(images)


def test_an_empty_mask_is_refused(directions):
    with pytest.raises(ValueError, match="mask is empty"):
        MaskLoss().make(Linear(directions[0]), torch.zeros(1, 8, 8), "region")


# -- nodes -------------------------------------------------------------------------------------------------------------


def test_the_nodes_make_what_they_say(images, directions):
    losses = [Linear(d) for d in directions]
    (combined,) = CombineLosses().make(losses[0], losses[1], 1.0, 0.0, 0.5, 1.0, False, loss_3=losses[2])
    value, g = gradient(combined, images)
    torch.testing.assert_close(value, losses[0](images) + 0.5 * losses[2](images))
    torch.testing.assert_close(g, (directions[0] + 0.5 * directions[2]).expand_as(g))
    (normalised,) = CombineLosses().make(losses[0], losses[1], 1.0, 0.0, 0.5, 1.0, True, loss_3=losses[2])
    unit = [direction / direction.norm() for direction in directions]
    torch.testing.assert_close(gradient(normalised, images)[1], (unit[0] + 0.5 * unit[2]).expand_as(g))
    (scheduled,) = ScheduleLoss().make(combined, 0.5, "ramp up", 0.0, 1.0)
    (masked,) = MaskLoss().make(scheduled, torch.ones(8, 8), "whole image")
    assert masked.weight(Step(progress=0.5)) == 0.25
    torch.testing.assert_close(masked(images), combined(images))
    mask = torch.zeros(8, 8)
    mask[2:5, 1:7] = 1
    for sees, size in (("whole image", (8, 8)), ("region", (3, 6))):
        inner = Linear(directions[0])
        MaskLoss().make(inner, mask, sees)[0](images)
        assert inner.seen[0].shape[-2:] == size
