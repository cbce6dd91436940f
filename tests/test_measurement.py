"""The measurement operators against direct computation, and the losses and nodes made of them."""

from __future__ import annotations

import math

import comfy.sampler_helpers
import numpy as np
import pytest
import torch
from scipy.ndimage import convolve1d, gaussian_filter, rotate
from sphereguide.losses.measurement import (
    GaussianDeblur,
    Inpainting,
    LowPass,
    MotionDeblur,
    SuperResolution,
    downsample,
    gaussian_blur,
    low_pass,
    motion_blur,
)
from sphereguide.nodes.degrade import DegradeImage
from sphereguide.nodes.measurement import (
    GaussianDeblurLoss,
    InpaintingLoss,
    LowPassLoss,
    MotionDeblurLoss,
    SuperResolutionLoss,
)


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


LOSSES = {
    "inpainting": lambda y: Inpainting(y, torch.zeros(1, 1, *y.shape[-2:])),
    "super-resolution": lambda y: SuperResolution(downsample(y, 4), 4),
    "gaussian blur": lambda y: GaussianDeblur(gaussian_blur(y, 21, 2.0), 21, 2.0),
    "motion blur": lambda y: MotionDeblur(motion_blur(y, 7.0, 30.0), 7.0, 30.0),
    "low pass": lambda y: LowPass(y, 4),
}


# -- operators ---------------------------------------------------------------------------------------------------------


def test_blur_is_scipys_gaussian_filter(images):
    ours = gaussian_blur(images.double(), 61, 3.0)
    theirs = gaussian_filter(images.double().numpy(), sigma=(0, 0, 3.0, 3.0), mode="mirror", radius=(0, 0, 30, 30))
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-12)


def test_blur_too_wide_for_the_image_says_what_fits():
    with pytest.raises(ValueError, match=r"kernel_size 61 .* 16×16 pixels.* at most 31"):
        gaussian_blur(torch.rand(1, 3, 16, 16), 61, 3.0)
    gaussian_blur(torch.rand(1, 3, 16, 16), 31, 3.0)


def test_motion_along_an_axis_is_a_running_mean_along_it(images):
    ours = motion_blur(images.double(), 7.0, 0.0).numpy()
    np.testing.assert_allclose(ours, convolve1d(images.double().numpy(), np.full(7, 1 / 7), axis=3, mode="mirror"))
    upright = motion_blur(images.double().mT.contiguous(), 7.0, 90.0).mT.numpy()
    np.testing.assert_allclose(upright, ours, atol=1e-12)


def test_motion_at_an_angle_is_the_rotated_line():
    point = torch.zeros(1, 1, 41, 41)
    point[..., 20, 20] = 1
    line = motion_blur(point, 21.0, 30.0)[0, 0].numpy()
    turned_back = rotate(line, -30, reshape=False, order=1)  # scipy turns clockwise, with rows counted downwards
    assert math.isclose(line.sum(), 1, rel_tol=1e-5)
    assert turned_back[19:22, 9:32].sum() > 0.97
    assert (
        motion_blur(point, 21.0, 30.0)[0, 0, 14:18, 24:29].sum()
        > motion_blur(point, 21.0, -30.0)[0, 0, 14:18, 24:29].sum()
    )


def test_motion_too_long_for_the_image_says_what_fits():
    with pytest.raises(ValueError, match=r"40 pixels is too long .* 16×16 pixels.* at most 30"):
        motion_blur(torch.rand(1, 3, 16, 16), 40.0, 0.0)
    motion_blur(torch.rand(1, 3, 16, 16), 30.0, 0.0)


def test_low_pass_keeps_a_gradient_of_grey_and_loses_a_fine_pattern(images):
    ramp = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    assert (low_pass(ramp, 4) - ramp)[..., 8:-8].abs().max() < 0.01
    x = torch.arange(64)
    fine = ((x[:, None] + x) % 2).float().expand(1, 1, 64, 64)
    assert (low_pass(fine, 4) - 0.5).abs().max() < 0.01


def test_low_pass_loss_is_the_distance_of_the_low_passes_and_takes_a_reference_of_any_size(images):
    estimate = torch.rand_like(images)
    expected = [(low_pass(images, 8) - low_pass(estimate, 8))[i].norm() for i in range(2)]
    torch.testing.assert_close(LowPass(images, 8)(estimate), torch.stack(expected))
    grey = LowPass(torch.full((1, 3, 9, 7), 0.4), 8)
    torch.testing.assert_close(grey(torch.full((1, 3, 32, 48), 0.4)), torch.zeros(1), atol=1e-5, rtol=0)


def test_downsampling_is_antialiased(images):
    x = torch.arange(64)
    fine = ((x[:, None] + x) % 2).float().expand(1, 1, 64, 64)  # finer than the small grid can show: mean grey
    assert (downsample(fine, 4) - 0.5).abs().max() < 0.01
    assert downsample(images, 4).shape == (2, 3, 8, 12)
    torch.testing.assert_close(downsample(torch.full((1, 3, 32, 32), 0.3), 8), torch.full((1, 3, 4, 4), 0.3))


# -- losses ------------------------------------------------------------------------------------------------------------


def test_inpainting_loss_is_the_unsquared_norm_over_known_pixels(images):
    mask = torch.zeros(2, 1, 32, 48)
    mask[:, :, :, :20] = 1
    loss = Inpainting(images, mask)
    estimate = torch.rand_like(images)
    expected = [(images[i] - estimate[i])[:, :, 20:].norm() for i in range(2)]
    torch.testing.assert_close(loss(estimate), torch.stack(expected))


def test_what_lies_under_the_mask_does_not_matter(images):
    mask = torch.zeros(1, 1, 32, 48)
    mask[..., :10, :] = 1
    scribbled = images.clone()
    scribbled[..., :10, :] = 7
    estimate = torch.rand_like(images)
    assert torch.equal(Inpainting(images, mask)(estimate), Inpainting(scribbled, mask)(estimate))


def test_a_mask_of_another_size_is_resized_to_the_image(images):
    mask = torch.rand(1, 1, 8, 12)
    loss = Inpainting(images, mask)
    expected = comfy.sampler_helpers.prepare_mask(mask, images.shape, torch.device("cpu"))[:1, :1]
    torch.testing.assert_close(1 - loss.known[:1], expected)


def test_a_thin_line_of_a_larger_mask_stays_missing(images):
    """Whichever of the mask's pixels it takes: what is missing in part is not known."""
    height, width = images.shape[-2:]
    for offset in range(4):
        mask = torch.zeros(1, 1, 4 * height, 4 * width)
        mask[..., 8 + offset, :] = 1
        known = Inpainting(images, mask).known
        assert known[..., 2, :].max() == 0 and known.sum() == known.numel() - known.shape[0] * width


@pytest.mark.parametrize("name", LOSSES)
def test_a_perfect_estimate_costs_nothing_and_has_a_gradient_of_zero(images, name):
    estimate = images.clone().requires_grad_()
    loss = LOSSES[name](images)(estimate)
    assert torch.equal(loss.detach(), torch.zeros(2))
    loss.sum().backward()
    assert torch.equal(estimate.grad, torch.zeros_like(estimate))


@pytest.mark.parametrize("name", LOSSES)
def test_a_sample_is_judged_by_its_own_measurement(images, name):
    make = LOSSES[name]
    estimates = torch.rand(5, 3, 32, 48)
    together = make(images)(estimates)
    alone = torch.cat([make(images[i % 2 : i % 2 + 1])(estimates[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_finite_differences(images, name):
    loss = LOSSES[name](images.double())
    estimate = torch.rand(2, 3, 32, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    direction = torch.randn_like(estimate)
    variable = estimate.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(variable).sum(), variable)
    numeric = (loss(estimate + 1e-6 * direction) - loss(estimate - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((gradient * direction).flatten(1).sum(1), numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "low pass"])
def test_an_image_of_another_size_than_the_latent_is_refused_with_both_sizes(images, name):
    with pytest.raises(ValueError, match=r"\d+×\d+ pixels, where this latent calls for \d+×\d+"):
        LOSSES[name](images)(torch.rand(1, 3, 64, 64))


def test_the_measurement_may_be_larger_or_smaller_than_the_batch(images):
    loss = SuperResolution(downsample(images, 2), 2)
    assert loss(torch.rand(1, 3, 32, 48)).shape == (1,)
    assert loss(torch.rand(3, 3, 32, 48)).shape == (3,)


# -- nodes -------------------------------------------------------------------------------------------------------------


def degrade(image, operator, **changes):
    settings = {"mask_fraction": 0.5, "factor": 4, "kernel_size": 21, "sigma": 2.0, "noise": 0.0, "seed": 0, **changes}
    return DegradeImage().degrade(image, operator, **settings)


@pytest.fixture
def image():
    return torch.rand(2, 64, 48, 3, generator=torch.Generator().manual_seed(0))


def test_degraded_image_and_loss_node_fit(image):
    exact = image.movedim(-1, 1)
    masked, mask = degrade(image, "inpainting")
    assert InpaintingLoss().make(masked, mask)[0](exact).abs().max() == 0
    small, _ = degrade(image, "super-resolution")
    assert small.shape == (2, 16, 12, 3)
    assert SuperResolutionLoss().make(small, 4)[0](exact).abs().max() == 0
    blurred, _ = degrade(image, "gaussian blur")
    assert GaussianDeblurLoss().make(blurred, 21, 2.0)[0](exact).abs().max() == 0
    moved, _ = degrade(image, "motion blur", length=9.0, angle=40.0)
    assert not torch.equal(moved, image)
    assert MotionDeblurLoss().make(moved, 9.0, 40.0)[0](exact).abs().max() == 0
    assert LowPassLoss().make(image, 8)[0](exact).abs().max() == 0
    assert LowPassLoss().make(image, 8)[0].factor == 8


def test_mask_fraction_is_the_share_of_missing_pixels(image):
    for fraction in (0.0, 0.3, 0.7, 1.0):
        _, mask = degrade(image, "inpainting", mask_fraction=fraction)
        assert mask.shape == (2, 64, 48)
        assert abs(mask.mean() - fraction) < 0.03
        assert set(mask.unique().tolist()) <= {0.0, 1.0}


def test_other_operators_give_an_empty_mask_of_the_size_of_their_image(image):
    for operator, size in (("super-resolution", (16, 12)), ("gaussian blur", (64, 48))):
        _, mask = degrade(image, operator)
        assert mask.shape == (2, *size) and mask.max() == 0


def test_noise_has_its_std_and_the_seed_decides_it(image):
    for operator in ("inpainting", "super-resolution", "gaussian blur"):
        clean, mask = degrade(image, operator, mask_fraction=0.3)
        noisy, _ = degrade(image, operator, mask_fraction=0.3, noise=0.1)
        known = (mask == 0)[..., None].expand_as(clean)
        std = (noisy - clean)[known].std()
        assert math.isclose(std, 0.1, rel_tol=0.1)
        assert torch.equal(noisy, degrade(image, operator, mask_fraction=0.3, noise=0.1)[0])
        assert not torch.equal(noisy, degrade(image, operator, mask_fraction=0.3, noise=0.1, seed=1)[0])


def test_degrading_leaves_the_random_numbers_of_the_workflow_alone(image):
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    degrade(image, "inpainting", noise=0.1)
    assert torch.equal(torch.rand(2), expected)


def test_an_alpha_channel_is_dropped():
    rgba = torch.rand(1, 16, 16, 4)
    assert InpaintingLoss().make(rgba, torch.zeros(1, 16, 16))[0](rgba[..., :3].movedim(-1, 1)) == 0
