"""The judge of the demo and the benchmarks, and what is computed from its verdicts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sphereguide.demo import judge, portraits, toy_portraits


@pytest.fixture(scope="module")
def trained() -> judge.Judge:
    return judge.load(toy_portraits.WEIGHTS)


def test_frechet_distance_of_gaussians_with_known_moments() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, 3, generator=rng, dtype=torch.float64)
    scale, shift = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, 0.0, 3.0])
    # |shift|² + Σ (s − 1)²
    assert judge.frechet(x * scale + shift, x) == pytest.approx(9 + 1 + 0.25, rel=0.02)
    assert judge.frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_takes_fewer_samples_than_features() -> None:
    rng = torch.Generator().manual_seed(0)
    assert np.isfinite(judge.frechet(torch.randn(8, 32, generator=rng), torch.randn(500, 32, generator=rng)))


def test_mean_iou_counts_only_classes_that_there_are() -> None:
    truth = np.zeros((4, 4), int)
    truth[:, 2:] = 2
    guess = truth.copy()
    guess[0, 2:] = 0  # 2 of 8 pixels of the class are missed
    assert judge.mean_iou(truth, truth)["mean"] == 1
    iou = judge.mean_iou(guess, truth)
    assert iou["hair"] == 6 / 8 and iou["background"] == 8 / 10
    assert iou["mean"] == pytest.approx((6 / 8 + 8 / 10) / 2)


def test_verification_of_people_that_are_told_apart_and_of_noise() -> None:
    rng = torch.Generator().manual_seed(0)
    who = torch.arange(100).repeat_interleave(3)
    apart = judge.verification(torch.eye(100)[who], who)
    assert apart["auc"] == 1 and apart["accepted_at_far_1"] == 1
    noise = judge.verification(torch.randn(300, 16, generator=rng), who)
    assert noise["auc"] == pytest.approx(0.5, abs=0.08)
    assert noise["accepted_at_far_1"] < 0.05


def test_judge_recognises_portraits_that_it_never_saw(trained: judge.Judge) -> None:
    seeds = portraits.TEST_SEEDS[5000:5064]
    verdict = trained.of(judge.to_tensor(np.stack([portraits.render(seed) for seed in seeds])))
    truth = np.array([list(portraits.labels(portraits.sample(seed)).values()) for seed in seeds])
    assert (verdict.labels == truth).mean() > 0.95
    assert judge.mean_iou(verdict.class_map, np.stack([portraits.segment(seed) for seed in seeds]))["mean"] > 0.8


def test_judge_tells_people_and_styles_apart(trained: judge.Judge) -> None:
    people = [portraits.sample(view, identity=3_000_000 + who) for who in range(40) for view in (1, 2)]
    verdict = trained.of(judge.to_tensor(np.stack([portraits.render(person) for person in people])))
    assert judge.verification(verdict.identity, torch.arange(40).repeat_interleave(2))["auc"] > 0.9

    one = portraits.sample(7, style="neon")
    near, far = portraits.sample(7, style="neon", expression="sad"), portraits.sample(7, style="watercolor")
    style, *others = (trained.of(judge.to_tensor(np.stack([portraits.render(person)]))) for person in (one, near, far))
    same, other = (float(judge.gram_distance(verdict, style)) for verdict in others)
    assert judge.gram_distance(style, style) == 0
    assert same < other
