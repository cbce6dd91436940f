"""What a person reads at the canvas: of every node a description, tooltips, words to find it by, and a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sphereguide import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from sphereguide.demo.run import node_of, read, recipe
from sphereguide.demo.strengths import LIMIT, STRIPS

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "web" / "docs"
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN"}
PICTURED = {f"SphereGuide/{category}" for category in ("guidance", "losses", "epsilon scaling", "amed")}
NO_PICTURE = {
    "SphereGuideClassifierLoss": "no classifier comes with the pack: the page says in words what to look for",
    "SphereGuideAMEDSave": "writes a file, and changes no picture",
}
PICTURE = re.compile(r"^!\[[^]]+\]\(([^)]+)\)\n\n\*[^*\n][^*]*\*$", re.MULTILINE)
# Papers of networks whose code is in other packages, so that no docstring here cites them.
CITED_BY_PAGES_ALONE = {"1503.03832", "1710.08092", "1801.07698", "2212.07143"}


def inputs(node: type) -> dict[str, tuple]:
    groups = node.INPUT_TYPES()
    return {key: entry for group in ("required", "optional") for key, entry in groups.get(group, {}).items()}


def page_of(node_id: str) -> str:
    return (PAGES / f"{node_id}.md").read_text(encoding="utf-8")


def sections(page: str) -> dict[str, str]:
    """What stands below each heading; below the title, under ""."""
    _, *parts = re.split(r"^(?:# .+|## (.+))\n", page, flags=re.MULTILINE)
    return {heading or "": body.strip() for heading, body in zip(parts[::2], parts[1::2], strict=True)}


def settings_table(page: str) -> dict[str, tuple[str, ...]]:
    """The other cells of each setting's row in the settings table. A row may be for several, with commas between."""
    rows: dict[str, tuple[str, ...]] = {}
    for line in sections(page).get("Settings", "").splitlines():
        if line.startswith("|") and not line.startswith(("|---", "| setting")):
            names, *cells = (cell.strip() for cell in line.strip().strip("|").split(" | "))
            first, dots, last = names.partition(" … ")
            digits = range(int(first[-1]), int(last[-1]) + 1) if dots else ()
            spread = [f"{first[:-1]}{digit}" for digit in digits] or names.split(", ")
            rows |= {name: tuple(cells) for name in spread}
    return rows


def gaps(node_id: str, page: str) -> list[str]:
    """What this page of a node lacks."""
    node, parts, table = NODE_CLASS_MAPPINGS[node_id], sections(page), settings_table(page)
    found = []
    if not page.startswith(f"# {NODE_DISPLAY_NAME_MAPPINGS[node_id]}\n\n"):
        found.append("the title is the node's name")
    what = parts[""].split("\n\n")[0]
    if not re.match(r"[A-Z*]", what) or not what.endswith(".") or re.search(r"\.\s", what):
        found.append("the first paragraph says in one sentence what the node does")
    if not re.search(r"^Use it \w+", f"{parts['']}\n\n{parts.get('When to use it', '')}", re.MULTILINE):
        found.append("when to use it")
    paper = parts.get("Paper", parts.get("Papers", ""))
    if not re.search(r"arXiv\s\d{4}\.\d{5}", paper):
        found.append("the paper, or that of the method which the node serves")
    for key, (kind, *_) in inputs(node).items():
        if isinstance(kind, list) or kind in WIDGETS:
            if key not in table:
                found.append(f"{key}: what it does")
            elif kind in ("INT", "FLOAT") and not re.search(r"\d|\bany\b", table[key][-1]):
                found.append(f"{key}: a range that works")
    found += [f"{key}: a row of three cells" for key, cells in table.items() if len(cells) != 2 or not all(cells)]
    if node.CATEGORY in PICTURED and node_id not in NO_PICTURE and not PICTURE.search(page):
        found.append("a picture, and a line that says what it shows")
    return found


@pytest.mark.parametrize("node_id", NODE_CLASS_MAPPINGS)
def test_every_node_explains_itself(node_id):
    node = NODE_CLASS_MAPPINGS[node_id]
    assert node_id.startswith("SphereGuide") and node.CATEGORY.startswith("SphereGuide/")
    assert node.DESCRIPTION.endswith(".") and node.SEARCH_ALIASES
    assert len(node.OUTPUT_TOOLTIPS) == len(node.RETURN_TYPES) and all(node.OUTPUT_TOOLTIPS)
    assert all(entry[1]["tooltip"].endswith((".", "…", "?", ")")) for entry in inputs(node).values())


@pytest.mark.parametrize("node_id", NODE_CLASS_MAPPINGS)
def test_every_node_has_a_page_that_lacks_nothing(node_id):
    assert gaps(node_id, page_of(node_id)) == []


@pytest.mark.parametrize("node_id", NODE_CLASS_MAPPINGS)
def test_page_is_about_its_node(node_id):
    page = page_of(node_id)
    names = {key for group in NODE_CLASS_MAPPINGS[node_id].INPUT_TYPES().values() for key in group}
    assert settings_table(page).keys() <= names
    for picture in re.findall(r"!\[[^]]*\]\(([^)]*)\)", page):
        assert (PAGES / picture).is_file()
    assert len(PICTURE.findall(page)) == page.count("![")


@pytest.mark.parametrize(
    "old, new, gap",
    [
        (r"# DSG Guidance", "# Guidance", "title"),
        (r"Steers any[^\n]+", "It is good. Very good.", "one sentence"),
        (r"Steers any[^\n]+\n\n## When to use it", "## When to use it", "one sentence"),
        (r"Use it when", "When", "when to use it"),
        (r"## When to use it", "## Notes", "when to use it"),
        (r"## Papers", "## Notes", "the paper"),
        (r"arXiv ", "", "the paper"),
        (r"\| interval \| [^\n]+\n", "", "interval: what it does"),
        (r"\| interval \| ([^|]+) \| [^\n]+", r"| interval | \1 | |", "interval: a range"),
        (r"\| interval \| ([^|]+) \| [^\n]+", r"| interval | \1 |", "interval: a row"),
        (r"\| interval \| ([^|]+) \| [^\n]+", r"| interval | \1 | as you like |", "interval: a range"),
        (r"(\| gradient \| [^|]+\| )[^|]+\|", r"\1|", "gradient: a row"),
        (r"(\| vae \| [^|]+\| )[^|]+\|", r"\1|", "vae: a row"),
        (r"!\[[^\n]+", "", "a picture"),
        (r"(!\[[^\n]+)\n\n\*[^*]+\*", r"\1", "a picture"),
    ],
)
def test_what_a_page_lacks_is_found(old, new, gap):
    page = page_of("SphereGuideDSG")
    worse = re.sub(old, new, page)
    assert worse != page
    assert [found for found in gaps("SphereGuideDSG", worse) if found.startswith(gap) or gap in found]


def test_only_nodes_that_can_have_none_are_without_a_picture():
    for node_id in NO_PICTURE:
        assert NODE_CLASS_MAPPINGS[node_id].CATEGORY in PICTURED and "![" not in page_of(node_id)
    assert "What to look for" in sections(page_of("SphereGuideClassifierLoss"))


def test_pages_cite_what_the_code_cites():
    code = " ".join(
        file.read_text(encoding="utf-8")
        for folder in ("losses", "samplers", "models", "nodes")
        for file in (ROOT / folder).rglob("*.py")
    )
    pages = " ".join(page_of(node_id) for node_id in NODE_CLASS_MAPPINGS)
    known, cited = (set(re.findall(r"arXiv\s(\d{4}\.\d{5})", text)) for text in (code, pages))
    assert cited - known == CITED_BY_PAGES_ALONE


def test_no_page_and_no_picture_is_left_over():
    pages = {path.stem: path.read_text(encoding="utf-8") for path in PAGES.glob("*.md")}
    assert pages.keys() == NODE_CLASS_MAPPINGS.keys()
    pictures = {path.name for path in (PAGES / "strengths").iterdir()}
    assert pictures == set(re.findall(r"strengths/([^)]+)", " ".join(pages.values())))
    assert pictures == {f"{name}.jpg" for name in STRIPS}
    assert [picture for picture in pictures if (PAGES / "strengths" / picture).stat().st_size > LIMIT] == []


@pytest.mark.parametrize("name", STRIPS)
def test_strip_shows_a_setting_of_a_workflow(name):
    strip = STRIPS[name]
    prompt = read(strip.workflow)
    strip.changed(prompt)
    made = []
    for value in strip.values:
        prompt[node_of(prompt, strip.of)]["inputs"][strip.setting] = value
        made.append(recipe(prompt, node_of(prompt, "SaveImage")))  # follows each wire to its end
    assert all(made.count(picture) == 1 for picture in made)
    assert len(strip.values) == 1 if strip.plot else len(strip.values) >= 3
    assert not strip.labels or len(strip.labels) == len(strip.values)


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
