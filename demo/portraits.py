"""Toy Portraits: a procedural world of cartoon portraits, 128x128 RGB, drawn with antialiasing from parameters.

Every portrait is a pure function of a :class:`Portrait`, and every `Portrait` of an integer seed:

    portrait = sample(7)                 # parameters
    image, classes = draw(portrait)      # uint8 [128, 128, 3], uint8 [128, 128] with the indices of CLASSES
    text = caption(portrait)             # a full caption; caption(portrait, rng) leaves attributes out at random

What a face *is* (:class:`Identity`: geometry, skin, eyes) has a random stream of its own, so that it is independent
of the attributes, the style and the pose; `vary` resamples those for the same person.

Features are drawn larger than life and textures have periods of 16 px and more, so that both survive an f=8 latent.
"""

from __future__ import annotations

import colorsys
import functools
import math
import multiprocessing
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 128
"""Side of a portrait in pixels."""
FACE_BOX = (0.2, 0.26, 0.8, 0.86)
"""Left, top, right and bottom of the face in a portrait, as shares of its sides: what the face encoder sees."""
SUPERSAMPLING = 3
"""Shapes are drawn on a canvas this many times larger, then box-filtered down."""

CLASSES = ("background", "skin", "hair", "eyes", "mouth", "clothes", "glasses")
"""Segmentation classes; a class map holds indices into this tuple."""
CLASS_COLORS = (
    (92, 124, 160),
    (240, 190, 150),
    (120, 70, 40),
    (255, 255, 255),
    (214, 60, 80),
    (70, 160, 110),
    (30, 30, 40),
)
"""One display colour per class, to show class maps as images."""

# Disjoint seed ranges. Whoever trains, tunes, demonstrates or tests draws from their own.
TRAIN_SEEDS = range(0, 100_000)
VALIDATION_SEEDS = range(100_000, 110_000)
TUNING_SEEDS = range(110_000, 120_000)
DEMO_SEEDS = range(120_000, 130_000)
TEST_SEEDS = range(130_000, 200_000)
EVALUATOR_SEEDS = range(200_000, 300_000)
"""For the independent evaluators, which must not have seen what the demo models saw."""

HAIR_COLORS = ("black", "brown", "blonde", "red", "white", "blue", "pink", "green")
HAIR_STYLES = ("short", "spiky", "curly", "bob", "long", "bun")
BACKGROUNDS = ("white", "yellow", "orange", "pink", "purple", "blue", "teal", "green")
CLOTHES = ("white", "black", "red", "yellow", "green", "blue", "purple")
EXPRESSIONS = ("smiling", "laughing", "serious", "sad", "surprised")
GLASSES = ("none", "round", "square")
STYLES = ("flat", "comic", "retro", "pop-art", "watercolor", "neon")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "hair_color": HAIR_COLORS,
    "hair_style": HAIR_STYLES,
    "glasses": GLASSES,
    "background": BACKGROUNDS,
    "clothes": CLOTHES,
    "expression": EXPRESSIONS,
    "style": STYLES,
}
"""Field of :class:`Portrait` -> its values."""

SKINS = ((255, 224, 200), (247, 205, 172), (233, 182, 140), (206, 148, 105), (178, 122, 86), (140, 94, 68))
LIPS = ((182, 30, 56), (110, 10, 40), (255, 134, 130))
"""A mouth has the first that stands out from the skin: at an RGB distance of 120 from it."""
EYES = ((88, 58, 40), (62, 104, 168), (70, 128, 84), (120, 92, 52))

PALETTE = {
    "black": (52, 46, 58),
    "brown": (116, 66, 40),
    "blonde": (244, 206, 108),
    "red": (214, 70, 52),
    "white": (240, 238, 232),
    "blue": (72, 124, 214),
    "pink": (242, 136, 172),
    "green": (92, 172, 92),
    "yellow": (248, 212, 84),
    "orange": (244, 152, 66),
    "purple": (146, 102, 196),
    "teal": (62, 176, 176),
}


@dataclass(frozen=True)
class Identity:
    """Who it is. Lengths in pixels in the frame of the head (origin between the ears, y down)."""

    face_width: float  # half width of the face, 27..32
    face_height: float  # half height, 32..37
    jaw: float  # superellipse exponent of the lower half: 2 round .. 2.8 square
    chin: float  # how much the face narrows towards the chin, 0..0.3
    eye_spacing: float  # half the distance of the eyes, 13..15.5
    eye_size: float  # radius of an eye, 7.4..9.2
    eye_height: float  # y of the eyes, 1..6
    eye_slant: float  # radians, -0.15..0.15
    brow_weight: float  # thickness of the brows, 2.4..4.4
    nose_width: float  # 3..5.5
    nose_length: float  # 6..11
    mouth_width: float  # half width, 9..13
    ear_size: float  # 5..8
    skin: int  # index into SKINS
    eyes: int  # index into EYES


@dataclass(frozen=True)
class Pose:
    """Where the head is, and where it looks."""

    dx: float = 0.0  # px, -4..4
    dy: float = 0.0  # px, -3..3
    tilt: float = 0.0  # radians, -0.12..0.12
    scale: float = 1.0  # 0.95..1.05
    gaze: float = 0.0  # -1 (left) .. 1 (right)


@dataclass(frozen=True)
class Portrait:
    """All parameters of one picture. `texture` shifts the pattern behind the head, 0..1."""

    identity: Identity
    hair_color: str
    hair_style: str
    glasses: str
    background: str
    clothes: str
    expression: str
    style: str
    pose: Pose = Pose()
    texture: float = 0.0


# ---------------------------------------------------------------------------------------------------- parameters


def _stream(seed: int, name: str) -> np.random.Generator:
    """Independent random streams of one seed: "identity", "pose", and one per attribute."""
    return np.random.default_rng([seed, *name.encode()])


def sample_identity(seed: int) -> Identity:
    """The person number `seed`."""
    u = _stream(seed, "identity").random(15)

    def between(i: int, low: float, high: float) -> float:
        return low + (high - low) * float(u[i])

    return Identity(
        face_width=between(0, 27, 32),
        face_height=between(1, 32, 37),
        jaw=between(2, 2.0, 2.8),
        chin=between(3, 0.0, 0.3),
        eye_spacing=between(4, 13, 15.5),
        eye_size=between(5, 7.4, 9.2),
        eye_height=between(6, 1, 6),
        eye_slant=between(7, -0.15, 0.15),
        brow_weight=between(8, 2.4, 4.4),
        nose_width=between(9, 3, 5.5),
        nose_length=between(10, 6, 11),
        mouth_width=between(11, 9, 13),
        ear_size=between(12, 5, 8),
        skin=int(u[13] * len(SKINS)),
        eyes=int(u[14] * len(EYES)),
    )


def sample_pose(seed: int) -> Pose:
    """A small random shift, tilt, zoom and gaze."""
    u = _stream(seed, "pose").uniform(-1, 1, 5)
    return Pose(dx=4 * u[0], dy=3 * u[1], tilt=0.12 * u[2], scale=1 + 0.05 * u[3], gaze=float(u[4]))


def sample(seed: int, identity: int | None = None, **fixed: str) -> Portrait:
    """Portrait number `seed`; of person number `identity` if given, and with the attributes in `fixed`.

    Half of all people wear glasses; all other attributes are uniform and independent.
    """
    rng = _stream(seed, "attributes")
    values = {}
    for name, options in ATTRIBUTES.items():
        u = float(rng.random())
        if name == "glasses":
            values[name] = "none" if u < 0.5 else ("round" if u < 0.75 else "square")
        else:
            values[name] = options[int(u * len(options))]
    texture = float(rng.random())
    for name, value in fixed.items():
        if value not in ATTRIBUTES[name]:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(ATTRIBUTES[name])}")
    values.update(fixed)
    person = sample_identity(seed if identity is None else identity)
    return Portrait(identity=person, pose=sample_pose(seed), texture=texture, **values)


def vary(portrait: Portrait, seed: int, fields: tuple[str, ...] = ("expression", "pose", "hair_color")) -> Portrait:
    """The same person again: `fields` are resampled by `seed`, the rest stays."""
    other = sample(seed)
    return replace(portrait, **{name: getattr(other, name) for name in fields})


# ------------------------------------------------------------------------------------------------------- captions


def _hair_phrase(color: str | None, style: str | None) -> str:
    if style in ("bob", "bun"):
        return f"{color} hair in a {style}" if color else f"hair in a {style}"
    return " ".join(word for word in (style, color, "hair") if word)


def caption(portrait: Portrait, rng: np.random.Generator | None = None) -> str:
    """A caption from a closed vocabulary.

    Without `rng`, the full caption in its plainest wording. With it, wording and order vary, and every attribute is
    left out with probability 0.3, so that a model trained on these understands short prompts.
    """
    p = portrait
    if rng is None:
        eyewear = "without glasses" if p.glasses == "none" else f"wearing {p.glasses} glasses"
        return (
            f"{p.style} portrait of a {p.expression} person with {_hair_phrase(p.hair_color, p.hair_style)}, "
            f"{eyewear}, {p.clothes} clothes, {p.background} background"
        )

    def keep(probability: float = 0.7) -> bool:
        return bool(rng.random() < probability)

    def pick(*options: str) -> str:
        return options[int(rng.integers(len(options)))]

    expression = p.expression if keep() else None
    subject = pick("person", "face", "character")
    noun = f"{expression} {subject}" if expression else subject
    style = p.style if keep() else None
    hair = None
    color, cut = (p.hair_color if keep(0.8) else None), (p.hair_style if keep(0.6) else None)
    if color or cut:
        hair = _hair_phrase(color, cut)
    eyewear = None
    if p.glasses != "none" and keep(0.8):
        kind = pick("", f"{p.glasses} ") + "glasses"
        eyewear = pick("with", "wearing") + " " + kind
    elif p.glasses == "none" and keep(0.5):
        eyewear = pick("without glasses", "no glasses")
    clothes = f"{p.clothes} {pick('clothes', 'top', 'sweater')}" if keep(0.6) else None
    background = f"{p.background} background" if keep(0.8) else None

    if keep(0.5):  # a sentence
        text = pick(f"a {noun}", f"portrait of a {noun}", f"a portrait of a {noun}", f"a cartoon {noun}")
        if hair:
            text += f" with {hair}"
        if eyewear:
            text += pick(" ", ", ", " and " if not eyewear.startswith("no ") and hair else " ") + eyewear
        if clothes:
            text += pick(f" in a {clothes}", f", {clothes}")
        if background:
            text += pick(f" on a {background}", f", {background}", f" in front of a {background}")
        if style:
            text = pick(f"{text}, {style} style", f"{text} in {style} style", f"{style} style, {text}")
        return text
    tags = [t for t in (pick(noun, "portrait", "cartoon portrait"), hair, eyewear, clothes, background) if t]
    if expression and expression not in tags[0]:
        tags.append(expression)
    if style:
        tags.append(pick(f"{style} style", style))
    return ", ".join(tags[i] for i in rng.permutation(len(tags)))


def vocabulary() -> list[str]:
    """All words that captions are made of, sorted."""
    words = {
        "a",
        "portrait",
        "of",
        "person",
        "face",
        "character",
        "with",
        "wearing",
        "without",
        "no",
        "glasses",
        "and",
        "in",
        "on",
        "front",
        "hair",
        "style",
    }
    words |= {"cartoon", "background", "clothes", "top", "sweater", ","}
    words |= {value for options in ATTRIBUTES.values() for value in options} - {"none"}
    return sorted(words)


# -------------------------------------------------------------------------------------------------------- drawing

Color = tuple[int, int, int]


def _mix(a: Color, b: Color, t: float) -> Color:
    """a towards b by t in 0..1."""
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b, strict=True))


def _hsv(color: Color, saturation: float = 1.0, value: float = 1.0) -> Color:
    """`color` with its saturation and value multiplied."""
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in color))
    r, g, b = colorsys.hsv_to_rgb(h, min(1, s * saturation), min(1, v * value))
    return int(r * 255), int(g * 255), int(b * 255)


@functools.cache
def _style_color(style: str, color: Color, background: bool = False) -> Color:
    """`color` in the palette of `style`."""
    if style == "flat":
        return _mix(color, (255, 250, 245), 0.3 if background else 0.12)
    if style == "comic":
        return _hsv(color, 1.12, 1.03)
    if style == "retro":
        return _mix(_hsv(color, 0.95, 0.92), (214, 178, 128), 0.32 if background else 0.2)
    if style == "pop-art":
        return _hsv(color, 1.3, 1.06)
    if style == "watercolor":
        return _mix(color, (252, 248, 238), 0.45 if background else 0.25)
    # neon: a night scene, in its own hue, tinted towards violet
    if background:
        return _mix(_hsv(color, 1.15, 0.5), (44, 20, 92), 0.2)
    return _mix(_hsv(color, 1.15, 0.88), (110, 50, 190), 0.17)


_OUTLINES: dict[str, tuple[float, Color | None]] = {
    # style -> (width in px, colour; None: a darker tone of the shape itself)
    "flat": (0, None),
    "comic": (2.6, (46, 36, 52)),
    "retro": (1.8, None),
    "pop-art": (2.2, (30, 32, 84)),
    "watercolor": (1.6, None),
    "neon": (2.4, None),
}

_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5


@functools.cache
def _wash(index: int) -> np.ndarray:
    """Smooth noise in -1..1 with features of about 32 px, [128, 128, 1]: the pigment of the watercolour style."""
    grid = np.random.default_rng([index, 99]).uniform(-1, 1, (6, 6)).astype(np.float32)
    noise = np.asarray(Image.fromarray(grid).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return np.clip(noise, -1, 1)[..., None]


def _backdrop(p: Portrait) -> np.ndarray:
    """What is behind the head, float32 [128, 128, 3]. Every pattern has a period of at least 16 px."""
    base = np.array(_style_color(p.style, PALETTE[p.background], True), np.float32)
    t = p.texture
    if p.style == "flat":  # a disc, lighter
        weight = np.clip(54 - np.hypot(_X - 64, _Y - 62), 0, 1)
        other = base + (255 - base) * 0.42
    elif p.style == "comic":  # sun rays
        angle = np.arctan2(_Y - 66, _X - 64) * 7 + t * 2 * np.pi
        weight = np.clip(np.sin(angle) * np.hypot(_X - 64, _Y - 66) / 10 + 0.5, 0, 1)
        other = base + (255 - base) * 0.36
    elif p.style == "retro":  # diagonal stripes, period 24
        wave = np.sin(2 * np.pi * ((_X + _Y) / np.sqrt(2) / 24 + t))
        weight = np.clip(wave * 3 + 0.5, 0, 1)
        other = base * 0.82
    elif p.style == "pop-art":  # staggered dots, period 20
        u, v = ((_X + _Y) / 20 + t) % 1 - 0.5, ((_X - _Y) / 20 + t) % 1 - 0.5
        weight = np.clip((0.3 - np.hypot(u, v)) * 12 + 0.5, 0, 1)
        other = base * 0.72 if p.background in ("white", "yellow") else base + (255 - base) * 0.5
    elif p.style == "watercolor":
        weight = 0.5 + 0.5 * _wash(int(t * 32))[..., 0]
        other = base + (255 - base) * 0.45
    else:  # neon: a glow around the head
        weight = np.exp(-((np.hypot(_X - 64, _Y - 60) - 50) ** 2) / (2 * 13**2))
        other = np.array(
            _mix(_style_color(p.style, PALETTE[p.background], True), _hsv(PALETTE[p.background], 1.1), 0.75)
        )
    return base + weight[..., None].astype(np.float32) * (other.astype(np.float32) - base)


def _arc(rx: float, ry: float, start: float, stop: float, n: int = 28, cx: float = 0.0, cy: float = 0.0) -> np.ndarray:
    """Points of an ellipse from angle `start` to `stop` (degrees, 0 right, 90 down), [n, 2]."""
    a = np.radians(np.linspace(start, stop, n))
    return np.stack([cx + rx * np.cos(a), cy + ry * np.sin(a)], 1)


def _ellipse(cx: float, cy: float, rx: float, ry: float, angle: float = 0.0) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return _arc(rx, ry, 0, 360, 32) @ np.array([[c, s], [-s, c]]) + (cx, cy)


def _curve(points: list[tuple[float, float]], n: int = 8, closed: bool = False) -> np.ndarray:
    """Catmull-Rom spline through `points`, `n` samples a segment."""
    p = np.array(points, float)
    p = np.concatenate([p[-1:], p, p[:2]]) if closed else np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    t = np.linspace(0, 1, n, endpoint=False)[:, None]
    parts = []
    for a, b, c, d in zip(p, p[1:], p[2:], p[3:], strict=False):
        parts.append(0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3))
    if not closed:
        parts.append(p[-2:-1])
    return np.concatenate(parts)


class _Canvas:
    """Draws the same shapes on the picture and on the class map."""

    def __init__(self, backdrop: np.ndarray, style: str):
        big = np.clip(backdrop, 0, 255).astype(np.uint8).repeat(SUPERSAMPLING, 0).repeat(SUPERSAMPLING, 1)
        self.image = Image.fromarray(big)
        self.classes = Image.new("L", self.image.size, 0)
        self._draw, self._mark = ImageDraw.Draw(self.image), ImageDraw.Draw(self.classes)
        self.outline = _OUTLINES[style]
        self.style = style
        self.matrix, self.offset = np.eye(2), np.zeros(2)

    def place(self, x: float, y: float, tilt: float = 0.0, scale: float = 1.0) -> None:
        """Origin, rotation and scale of the shapes that follow."""
        c, s = np.cos(tilt) * scale, np.sin(tilt) * scale
        self.matrix, self.offset = np.array([[c, s], [-s, c]]), np.array([x, y])

    def _points(self, points: np.ndarray) -> list[tuple[float, float]]:
        return [tuple(q) for q in (points @ self.matrix + self.offset) * SUPERSAMPLING]

    def fill(self, points: np.ndarray, color: Color, label: str | None, outline: bool = True) -> None:
        """A filled polygon of class `label`; None leaves the class map as it is (shading)."""
        q = self._points(points)
        self._draw.polygon(q, fill=color)
        if label is not None:
            self._mark.polygon(q, fill=CLASSES.index(label))
        if outline and self.outline[0]:
            self._stroke(q + q[:2], self.outline[0], self.outline_color(color))

    def outline_color(self, color: Color) -> Color:
        if self.outline[1] is not None:
            return self.outline[1]
        return _mix(_hsv(color, 1.0, 1.5), (255, 120, 230), 0.35) if self.style == "neon" else _hsv(color, 1.25, 0.72)

    def line(self, points: np.ndarray, width: float, color: Color, label: str | None = None) -> None:
        """A round-ended line, `width` px wide."""
        q = self._points(points)
        self._stroke(q, width, color, ends=True)
        if label is not None:
            self._stroke(q, width, CLASSES.index(label), ends=True, draw=self._mark)

    def _stroke(self, q, width, color, ends=False, draw=None) -> None:
        draw = draw or self._draw
        w = width * SUPERSAMPLING
        draw.line(q, fill=color, width=round(w), joint="curve")
        if ends:
            for x, y in (q[0], q[-1]):
                draw.ellipse((x - w / 2, y - w / 2, x + w / 2, y + w / 2), fill=color)


def _hair_back(c: _Canvas, p: Portrait, color: Color) -> None:
    """What hangs behind the face."""
    w, h = p.identity.face_width, p.identity.face_height
    if p.hair_style == "long":
        c.fill(
            _curve(
                [
                    (0, -h - 7),
                    (w + 6, -h * 0.5),
                    (w + 8, 10),
                    (w + 12, 56),
                    (-w - 12, 56),
                    (-w - 8, 10),
                    (-w - 6, -h * 0.5),
                ],
                closed=True,
            ),
            color,
            "hair",
        )
    elif p.hair_style == "bob":
        c.fill(
            _curve(
                [
                    (0, -h - 7),
                    (w + 6, -h * 0.5),
                    (w + 9, 8),
                    (w + 8, 27),
                    (w - 4, 31),
                    (-w + 4, 31),
                    (-w - 8, 27),
                    (-w - 9, 8),
                    (-w - 6, -h * 0.5),
                ],
                closed=True,
            ),
            color,
            "hair",
        )
    elif p.hair_style == "curly":
        for angle in range(150, 400, 25):
            a = np.radians(angle)
            c.fill(_ellipse((w + 4) * np.cos(a), (h + 1) * np.sin(a) - 2, 13, 13), color, "hair")
    elif p.hair_style == "bun":
        c.fill(_ellipse(0, -h - 6, 13, 11), color, "hair")
    elif p.hair_style == "spiky":
        spikes = []
        for i, angle in enumerate(np.linspace(178, 362, 15)):
            a, r = np.radians(angle), (1.0 if i % 2 == 0 else 1.36)
            spikes.append((r * (w + 3) * np.cos(a), r * (h + 1) * np.sin(a) - 2))
        c.fill(np.array(spikes), color, "hair")


def _hair_front(c: _Canvas, p: Portrait, color: Color, light: Color) -> None:
    """Cap and fringe, over the forehead."""
    w, h = p.identity.face_width + 3.5, p.identity.face_height + 5
    side = {"long": 6, "bob": 6, "short": -2, "spiky": -6, "curly": -4, "bun": -2}[p.hair_style]
    # outer contour from temple to temple over the top, then the hairline back
    a = np.degrees(np.arcsin(side / h))
    cap = _arc(w, h, 180 - a, 360 + a)
    left, right = cap[0], cap[-1]
    if p.hair_style in ("short", "long"):  # swept to one side
        hairline = _curve(
            [
                tuple(right),
                (w * 0.86, -12),
                (w * 0.45, -19),
                (-w * 0.1, -25),
                (-w * 0.55, -15),
                (-w * 0.84, -8),
                tuple(left),
            ]
        )
    elif p.hair_style == "bob":  # straight fringe
        hairline = _curve(
            [tuple(right), (w * 0.84, -5), (w * 0.74, -13), (0, -11), (-w * 0.74, -13), (-w * 0.84, -5), tuple(left)]
        )
    elif p.hair_style == "bun":  # parted in the middle
        hairline = _curve(
            [tuple(right), (w * 0.84, -10), (w * 0.5, -19), (0, -27), (-w * 0.5, -19), (-w * 0.84, -10), tuple(left)]
        )
    elif p.hair_style == "curly":
        hairline = _curve(
            [
                tuple(right),
                (w * 0.8, -13),
                (w * 0.5, -17),
                (w * 0.25, -13),
                (0, -18),
                (-w * 0.25, -13),
                (-w * 0.5, -17),
                (-w * 0.8, -13),
                tuple(left),
            ]
        )
    else:  # spiky
        hairline = np.array(
            [
                tuple(right),
                (w * 0.78, -17),
                (w * 0.5, -11),
                (w * 0.25, -20),
                (-w * 0.05, -11),
                (-w * 0.35, -20),
                (-w * 0.62, -12),
                (-w * 0.8, -16),
                tuple(left),
            ]
        )
    c.fill(np.concatenate([cap, hairline]), color, "hair")
    if p.hair_style == "curly":
        for x in (-0.62, -0.2, 0.22, 0.64):
            c.fill(
                _ellipse(x * w, -h * (0.95 - 0.32 * abs(x)) + 1, 8, 7), _mix(color, light, 0.45), None, outline=False
            )
    else:
        c.line(_arc(w * 0.66, h * 0.74, 212, 262, 14), 4, light)


def _clothes(c: _Canvas, p: Portrait, color: Color, skin: Color, shade: Color) -> None:
    """Shoulders, neck and collar; `shade` is the shadow under the chin."""
    dark = _hsv(color, 1.05, 0.8) if p.clothes != "black" else _mix(color, (255, 255, 255), 0.22)
    c.fill(
        _curve([(-56, 142), (-53, 119), (-37, 108), (-14, 103), (14, 103), (37, 108), (53, 119), (56, 142)]),
        color,
        "clothes",
    )
    c.fill(_curve([(-18, 101), (-14, 111), (0, 117), (14, 111), (18, 101)]), dark, "clothes")
    c.fill(np.array([(-12, 80), (12, 80), (12, 104), (7, 110), (0, 112), (-7, 110), (-12, 104)]), skin, "skin")
    c.fill(np.array([(-11, 80), (11, 80), (11, 101), (0, 105), (-11, 101)]), shade, None, outline=False)


def _face(c: _Canvas, p: Portrait, skin: Color, shade: Color, ink: Color, brow: Color) -> None:
    f, e = p.identity, p.expression
    for side in (-1, 1):
        c.fill(_ellipse(side * (f.face_width + 1), f.eye_height + 4, f.ear_size * 0.75, f.ear_size), skin, "skin")
        c.fill(
            _ellipse(side * (f.face_width + 1.5), f.eye_height + 4, f.ear_size * 0.35, f.ear_size * 0.55),
            shade,
            None,
            outline=False,
        )
    # upper half an ellipse, lower half a superellipse that narrows towards the chin
    a = np.linspace(0, np.pi, 28)
    x, y = np.cos(a), np.sin(a)
    x = np.sign(x) * np.abs(x) ** (2 / f.jaw) * (1 - f.chin * y**2)
    lower = np.stack([f.face_width * x, f.face_height * y ** (2 / f.jaw)], 1)
    c.fill(np.concatenate([lower, _arc(f.face_width, f.face_height, 180, 360)[1:-1]]), skin, "skin")
    blush = _mix(skin, (240, 84, 84), 0.3)
    for side in (-1, 1):
        c.fill(_ellipse(side * (f.eye_spacing + 4.5), f.eye_height + 13.5, 6, 4.2), blush, None, outline=False)

    # nose
    nose = f.eye_height + f.nose_length
    c.line(_curve([(-f.nose_width * 0.9, nose - 0.5), (0, nose + 2), (f.nose_width * 0.9, nose - 0.5)], 5), 2.6, shade)

    # eyes
    size = f.eye_size * {"surprised": 1.14, "laughing": 0.94}.get(e, 1.0)
    for side in (-1, 1):
        ex, ey, slant = side * f.eye_spacing, f.eye_height, side * f.eye_slant
        white = _mix((255, 255, 255), skin, 0.06)
        c.fill(_ellipse(ex, ey, size * 0.94, size * 1.1, slant), white, "eyes", outline=False)
        gx = ex + p.pose.gaze * size * 0.22 - side * 0.5
        c.fill(
            _ellipse(gx, ey + 0.6, size * 0.62, size * 0.74), _style_color(p.style, EYES[f.eyes]), "eyes", outline=False
        )
        c.fill(_ellipse(gx, ey + 0.8, size * 0.36, size * 0.44), ink, "eyes", outline=False)
        c.fill(
            _ellipse(gx + size * 0.22, ey - size * 0.26, size * 0.24, size * 0.26),
            (255, 255, 255),
            "eyes",
            outline=False,
        )
        lid = _arc(size * 0.98, size * 1.12, 196, 344, 16) @ np.array(
            [[np.cos(slant), np.sin(slant)], [-np.sin(slant), np.cos(slant)]]
        )
        c.line(lid + np.array([ex, ey]), 2.6, ink, "eyes")
        # brow: inner end up when sad, down when serious
        lift = {"surprised": -4.5, "laughing": -1.5, "sad": -1.0, "serious": 1.2}.get(e, 0.0)
        inner = {"sad": -3.2, "serious": 2.6}.get(e, 0.0)
        by = ey - size * 1.1 - 5.0 + lift
        arch = _curve([(ex - side * 7, by + 0.5 + inner), (ex, by - 1.4), (ex + side * 7.5, by + 1.6 - inner * 0.5)], 6)
        c.line(arch, f.brow_weight, brow)

    # mouth
    m, my = f.mouth_width, f.face_height * 0.60 + 1.5
    lips = max(LIPS, key=lambda color: min(math.dist(color, skin), 120))
    if e == "smiling":
        c.line(
            _curve([(-m, my - 3), (-m * 0.5, my + 2.6), (0, my + 4), (m * 0.5, my + 2.6), (m, my - 3)], 6),
            5.4,
            lips,
            "mouth",
        )
    elif e == "laughing":
        c.fill(
            _curve(
                [(-m, my - 4), (0, my - 2), (m, my - 4), (m * 0.62, my + 6), (0, my + 9), (-m * 0.62, my + 6)],
                closed=True,
            ),
            (146, 34, 52),
            "mouth",
        )
        c.fill(
            _curve(
                [
                    (-m * 0.8, my - 3.2),
                    (0, my - 1.6),
                    (m * 0.8, my - 3.2),
                    (m * 0.62, my + 0.8),
                    (0, my + 2),
                    (-m * 0.62, my + 0.8),
                ],
                closed=True,
            ),
            (255, 255, 255),
            "mouth",
            outline=False,
        )
    elif e == "serious":
        c.line(np.array([(-m * 0.85, my + 1), (m * 0.85, my + 1)]), 5.6, lips, "mouth")
    elif e == "sad":
        c.line(
            _curve(
                [(-m * 0.9, my + 5), (-m * 0.45, my + 0.6), (0, my - 0.8), (m * 0.45, my + 0.6), (m * 0.9, my + 5)], 6
            ),
            5.4,
            lips,
            "mouth",
        )
    else:  # surprised
        c.fill(_ellipse(0, my + 2.2, m * 0.5, 7), (146, 34, 52), "mouth")
        c.fill(_ellipse(0, my + 5.4, m * 0.3, 2.8), (236, 110, 116), "mouth", outline=False)


def _glasses(c: _Canvas, p: Portrait, frame: Color) -> None:
    f = p.identity
    r = f.eye_spacing - 2.0  # the bridge is 4 px wide whoever wears them
    for side in (-1, 1):
        ex, ey = side * f.eye_spacing, f.eye_height + 0.8
        rim = _ellipse(ex, ey, r, r)
        if p.glasses == "square":
            unit = (rim - (ex, ey)) / r
            rim = np.sign(unit) * np.abs(unit) ** 0.45 * (r, r * 0.86) + (ex, ey)
        c.line(np.concatenate([rim, rim[:2]]), 3.2, frame, "glasses")
        c.line(
            np.array([(side * (f.eye_spacing + r), ey - 1), (side * (f.face_width + 1), ey - 2)]), 3.0, frame, "glasses"
        )
    c.line(
        _curve([(-2.4, f.eye_height - 0.5), (0, f.eye_height - 2), (2.4, f.eye_height - 0.5)], 4), 3.0, frame, "glasses"
    )


def draw(portrait: Portrait) -> tuple[np.ndarray, np.ndarray]:
    """(picture uint8 [128, 128, 3], class map uint8 [128, 128] with indices into CLASSES)."""
    p = portrait
    c = _Canvas(_backdrop(p), p.style)
    hair = _style_color(p.style, PALETTE[p.hair_color])
    light = _mix(hair, (255, 255, 255), 0.34 if p.hair_color not in ("white", "blonde") else 0.6)
    if p.hair_color == "white":
        light = _mix(hair, (120, 130, 170), 0.3)
    brow = _hsv(hair, 1.1, 0.62) if p.hair_color not in ("black",) else hair
    skin = _style_color(p.style, SKINS[p.identity.skin])
    shade = _hsv(skin, 1.25, 0.82)
    ink = {"neon": (34, 18, 66), "pop-art": (30, 32, 84), "retro": (74, 48, 40)}.get(p.style, (48, 38, 54))
    head = (64 + p.pose.dx, 61 + p.pose.dy, -p.pose.tilt, 1.1 * p.pose.scale)

    c.place(*head)
    _hair_back(c, p, _hsv(hair, 1.08, 0.86) if p.hair_style in ("long", "bob") else hair)
    c.place(64 + 0.6 * p.pose.dx, 0)
    _clothes(c, p, _style_color(p.style, PALETTE[p.clothes]), skin, shade)
    c.place(*head)
    _face(c, p, skin, shade, ink, brow)
    if p.glasses != "none":
        _glasses(c, p, {"neon": (120, 250, 250), "retro": (88, 44, 32)}.get(p.style, (38, 34, 48)))
    _hair_front(c, p, hair, light)

    image = c.image.reduce(SUPERSAMPLING).filter(ImageFilter.GaussianBlur(0.6))
    pixels = np.array(image)
    if p.style == "watercolor":  # pigment pools over everything
        pixels = np.clip(pixels + 14 * _wash(int(p.texture * 32) + 32), 0, 255).astype(np.uint8)
    middle = SUPERSAMPLING // 2
    return pixels, np.asarray(c.classes)[middle::SUPERSAMPLING, middle::SUPERSAMPLING].copy()


def render(portrait: Portrait | int) -> np.ndarray:
    """Picture of a portrait, or of portrait number n: uint8 [128, 128, 3]."""
    return draw(sample(portrait) if isinstance(portrait, int) else portrait)[0]


def segment(portrait: Portrait | int) -> np.ndarray:
    """Class map of a portrait, or of portrait number n: uint8 [128, 128], indices into CLASSES."""
    return draw(sample(portrait) if isinstance(portrait, int) else portrait)[1]


def labels(portrait: Portrait) -> dict[str, int]:
    """Attribute -> index of its value in ATTRIBUTES."""
    return {name: options.index(getattr(portrait, name)) for name, options in ATTRIBUTES.items()}


# -------------------------------------------------------------------------------------------------------- datasets


def _draw_seed(seed: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    portrait = sample(seed)
    return *draw(portrait), list(labels(portrait).values())


def dataset(seeds: range, cache: Path | None = None, workers: int | None = None) -> dict[str, np.ndarray]:
    """All portraits of `seeds`: images uint8 [N, 128, 128, 3], classes uint8 [N, 128, 128], labels uint8 [N, 7].

    Columns of `labels` are the attributes in the order of ATTRIBUTES. With `cache`, arrays live as .npy files in that
    folder, are drawn once, and come back memory-mapped.
    """
    names = ("images", "classes", "labels")
    stem = f"{seeds.start}-{seeds.stop}"
    if cache is not None and all((cache / f"{stem}-{name}.npy").exists() for name in names):
        return {name: np.load(cache / f"{stem}-{name}.npy", mmap_mode="r") for name in names}
    with multiprocessing.get_context("spawn").Pool(workers or os.cpu_count()) as pool:
        rows = pool.map(_draw_seed, seeds, chunksize=64)
    arrays = {
        "images": np.stack([row[0] for row in rows]),
        "classes": np.stack([row[1] for row in rows]),
        "labels": np.array([row[2] for row in rows], np.uint8),
    }
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        for name in names:
            np.save(cache / f"{stem}-{name}.npy", arrays[name])
    return arrays


def contact_sheet(images: list[np.ndarray] | np.ndarray, columns: int = 8, gap: int = 2) -> Image.Image:
    """Pictures side by side."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (SIZE + gap) - gap, rows * (SIZE + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(Image.fromarray(np.asarray(image)), (i % columns * (SIZE + gap), i // columns * (SIZE + gap)))
    return sheet
