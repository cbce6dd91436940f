"""What a person reads at the canvas: of every node a description, tooltips, words to find it by, and a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sphereguide import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "web" / "docs"
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN"}


def inputs(node: type) -> dict[str, tuple]:
    groups = node.INPUT_TYPES()
    return {key: entry for group in ("required", "optional") for key, entry in groups.get(group, {}).items()}


@pytest.mark.parametrize("node_id", NODE_CLASS_MAPPINGS)
def test_every_node_explains_itself(node_id):
    node = NODE_CLASS_MAPPINGS[node_id]
    assert node_id.startswith("SphereGuide") and node.CATEGORY.startswith("SphereGuide/")
    assert node.DESCRIPTION.endswith(".") and node.SEARCH_ALIASES
    assert len(node.OUTPUT_TOOLTIPS) == len(node.RETURN_TYPES) and all(node.OUTPUT_TOOLTIPS)
    assert all(entry[1]["tooltip"].endswith((".", "…", "?", ")")) for entry in inputs(node).values())


@pytest.mark.parametrize("node_id", NODE_CLASS_MAPPINGS)
def test_every_node_has_a_page(node_id):
    page = (PAGES / f"{node_id}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {NODE_DISPLAY_NAME_MAPPINGS[node_id]}\n")
    settings = [
        key
        for key, (kind, *_) in inputs(NODE_CLASS_MAPPINGS[node_id]).items()
        if isinstance(kind, list) or kind in WIDGETS
    ]
    if "as in **" not in page:  # sends for them to the page of a node that it is like
        assert [key for key in settings if re.sub(r"_\d$", "", key) not in page] == []
    for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", page):
        assert (PAGES / picture).is_file()


def test_no_page_and_no_picture_is_left_over():
    pages = {path.stem: path.read_text(encoding="utf-8") for path in PAGES.glob("*.md")}
    assert pages.keys() == NODE_CLASS_MAPPINGS.keys()
    pictures = {path.name for path in (PAGES / "strengths").iterdir()}
    assert pictures == set(re.findall(r"strengths/([^)]+)", " ".join(pages.values())))


def test_every_node_is_in_the_readme():
    table = re.findall(r"^\| (.+) \(`(\w+)`\) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {node_id: name for name, node_id in table} == NODE_DISPLAY_NAME_MAPPINGS


@pytest.mark.parametrize(
    "words, node_id",
    [
        ("face", "SphereGuideFaceIDLoss"),
        ("style transfer", "SphereGuideStyleGramLoss"),
        ("few steps", "SphereGuideAMEDSampler"),
        ("upscale", "SphereGuideSuperResolutionLoss"),
        ("inpaint", "SphereGuideInpaintingLoss"),
        ("deblur", "SphereGuideGaussianDeblurLoss"),
        ("clip guidance", "SphereGuideCLIPTextLoss"),
        ("segmentation", "SphereGuideSegmentationLoss"),
        ("exposure bias", "SphereGuideEpsilonScaling"),
    ],
)
def test_what_an_artist_searches_for_finds_the_node(words, node_id):
    node = NODE_CLASS_MAPPINGS[node_id]
    assert any(words in text.lower() for text in (NODE_DISPLAY_NAME_MAPPINGS[node_id], *node.SEARCH_ALIASES))
