"""The procedural world of the demo: what it promises to whoever trains on it or measures against it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sphereguide.demo import portraits
from sphereguide.demo.portraits import ATTRIBUTES, CLASSES


def class_index(name: str) -> int:
    return CLASSES.index(name)


def test_a_seed_is_one_picture():
    image, classes = portraits.draw(portraits.sample(130_000))
    assert image.shape == (128, 128, 3) and image.dtype == np.uint8
    assert classes.shape == (128, 128) and classes.max() < len(CLASSES)
    assert np.array_equal(image, portraits.render(130_000))
    assert np.array_equal(classes, portraits.segment(130_000))
    assert not np.array_equal(image, portraits.render(130_001))


def test_seed_ranges_are_disjoint():
    names = [name for name in vars(portraits) if name.endswith("_SEEDS")]
    ranges = sorted((getattr(portraits, name) for name in names), key=lambda r: r.start)
    assert len(ranges) == 6
    assert all(a.stop <= b.start for a, b in itertools.pairwise(ranges))


def test_a_fixed_attribute_changes_nothing_else():
    plain, fixed = portraits.sample(5), portraits.sample(5, background="teal")
    assert fixed.background == "teal"
    assert portraits.replace(fixed, background=plain.background) == plain


def test_a_wrong_attribute_names_the_choices():
    with pytest.raises(ValueError, match=r"hair_color='mauve' is not one of black, brown"):
        portraits.sample(1, hair_color="mauve")


def test_the_identity_is_independent_of_everything_else():
    first, second = portraits.sample(7), portraits.sample(7, identity=11)
    assert second.identity == portraits.sample_identity(11) == portraits.sample(11).identity
    assert portraits.replace(second, identity=first.identity) == first
    again = portraits.vary(first, 12)
    assert again.identity == first.identity
    assert (again.background, again.style) == (first.background, first.style)
    assert again.pose == portraits.sample_pose(12)


def test_attributes_are_balanced_and_uncorrelated():
    rows = np.array([list(portraits.labels(portraits.sample(seed)).values()) for seed in range(3000)])
    for column, values in enumerate(ATTRIBUTES.values()):
        shares = np.bincount(rows[:, column], minlength=len(values)) / len(rows)
        expected = np.array([0.5, 0.25, 0.25]) if values == portraits.GLASSES else np.full(len(values), 1 / len(values))
        assert np.abs(shares - expected).max() < 0.04
    assert np.abs(np.corrcoef(rows.T) - np.eye(rows.shape[1])).max() < 0.07


def test_every_portrait_has_its_parts():
    for seed in range(130_000, 130_024):
        portrait = portraits.sample(seed)
        classes = portraits.segment(portrait)
        for name in ("background", "skin", "hair", "clothes"):
            assert (classes == class_index(name)).sum() > 300, (seed, name)
        assert (classes == class_index("eyes")).sum() > 120
        assert (classes == class_index("mouth")).sum() > 25
        assert ((classes == class_index("glasses")).sum() > 100) == (portrait.glasses != "none")


def test_classes_lie_where_the_colours_are():
    portrait = portraits.sample(3, hair_color="green", clothes="red", background="blue", style="comic", glasses="none")
    image, classes = portraits.draw(portrait)
    mean = {name: image[classes == class_index(name)].mean(0) for name in ("hair", "clothes", "background")}
    assert mean["hair"].argmax() == 1 and mean["clothes"].argmax() == 0 and mean["background"].argmax() == 2


def test_captions_tell_the_truth_in_a_closed_vocabulary():
    words = set(portraits.vocabulary())
    rng = np.random.default_rng(0)
    for seed in range(300):
        portrait = portraits.sample(seed)
        for text in (portraits.caption(portrait), portraits.caption(portrait, rng)):
            tokens = text.replace(",", " , ").split()
            assert set(tokens) <= words
            for value in portraits.BACKGROUNDS:
                assert f"{value} background" not in text or value == portrait.background
            for value in portraits.HAIR_COLORS:
                assert f"{value} hair" not in text or value == portrait.hair_color
            for field in ("expression", "style", "hair_style"):
                for value in ATTRIBUTES[field]:
                    assert value not in tokens or value == getattr(portrait, field)
            bare = "no glasses" in text or "without glasses" in text
            assert "glasses" not in text or bare == (portrait.glasses == "none")


def test_captions_leave_attributes_out():
    portrait, rng = portraits.sample(8), np.random.default_rng(1)
    texts = [portraits.caption(portrait, rng) for _ in range(200)]
    assert len(set(texts)) > 100
    assert 0.6 < np.mean(["background" in text for text in texts]) < 0.95


def test_styles_differ_in_palette():
    pictures = [portraits.render(portraits.sample(2, style=style)).astype(float) for style in portraits.STYLES]
    for i, a in enumerate(pictures):
        for b in pictures[i + 1 :]:
            assert np.abs(a - b).mean() > 8
