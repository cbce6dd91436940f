"""Plots as IMAGEs."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["drawn", "new_figure", "written"]


def new_figure(title: str, width: float, height: float) -> Figure:
    """An empty figure, in hundreds of pixels. Raises ImportError, for the node of that title, without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"{title} draws with matplotlib, which can't be imported ({error}). Install it into the Python that runs "
            "ComfyUI:  pip install matplotlib"
        ) from error
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def drawn(figure: Figure) -> Tensor:
    """IMAGE `[1, height, width, 3]`."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(np.float32) / 255
    return torch.from_numpy(pixels)[None]


def written(text: str, width: int, height: int) -> Tensor:
    """IMAGE `[1, height, width, 3]` of words, where no figure can be drawn."""
    picture = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(picture).multiline_text(
        (24, 24), textwrap.fill(text, width // 11), "black", ImageFont.load_default(20)
    )
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]
