"""Figures of a page: matplotlib's drawings as SVG elements that follow the page's colours."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

__all__ = ["FIGURE_SIZE", "PageFigure", "page_figure", "page_figures"]

FIGURE_SIZE = (4.8, 3.5)
"""Inches of a figure: readable on a telephone, two of them side by side."""

_LARGEST_SVG = 250_000
_ZOOM = 1.4  # pixels of the page for a point of a figure, at most
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cradle-pyro",
    "font.size": 10.0,
    "savefig.transparent": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.limits": (-7, 7),
}
# The darkest colour of the plots is hard to see on a dark page, which has a lighter one.
_ON_PAGE = {"#0072b2": "var(--down)"}
_GREY = re.compile(r"(fill|stroke): #([0-9a-f]{2})\2\2\b")
_NOT_FOR_HTML = re.compile(
    r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>"
    r"| xmlns(:\w+)?=\"[^\"]*\"|font-family: [^;\"]*;? ?",
    re.DOTALL,
)


class PageFigure(NamedTuple):
    """A drawing as an SVG element, with its title and how to read it."""

    title: str
    svg: str
    caption: str
    is_wide: bool = False


def page_figure(
    title: str,
    draw: Callable[..., object],
    caption: str,
    *,
    size: tuple[float, float] = FIGURE_SIZE,
    is_wide: bool = False,
) -> PageFigure:
    """Return a figure that ``draw(ax=...)`` draws; `size` in inches."""
    (figure,) = page_figures([(title, caption)], lambda *, axes: draw(ax=axes[0]), size=size)
    return figure._replace(is_wide=is_wide)


def page_figures(
    texts: Sequence[tuple[str, str]],
    draw: Callable[..., object],
    *,
    size: tuple[float, float] = FIGURE_SIZE,
) -> list[PageFigure]:
    """Return a figure for each title and caption; ``draw(axes=...)`` draws one axes of each."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figures = [Figure(figsize=size, layout="constrained") for _ in texts]
        draw(axes=[figure.subplots() for figure in figures])
        for figure in figures:
            _keep_greys_on_images(figure)
        return [
            PageFigure(title, _inline(_light(figure), title), caption)
            for figure, (title, caption) in zip(figures, texts, strict=True)
        ]


def _keep_greys_on_images(figure: Any) -> None:
    """Make greys on heat maps a hair blue, so that they stay when other greys follow the page."""
    for ax in figure.axes:
        if not ax.images:
            continue
        for text in ax.texts:
            text.set_color(_off_grey(text.get_color())[0])
        for marks in ax.collections:
            marks.set(
                facecolor=_off_grey(marks.get_facecolor()),
                edgecolor=_off_grey(marks.get_edgecolor()),
            )


def _off_grey(colours: Any) -> np.ndarray:
    from matplotlib.colors import to_rgba_array

    shifted = to_rgba_array(colours)
    shifted[:, 2] += np.where(shifted[:, 2] < 0.5, 1, -1) / 255
    return shifted


def _light(figure: Any) -> str:
    """Return a figure as SVG, its many points as a picture inside where they would weigh much."""
    text = _saved(figure)
    if len(text) <= _LARGEST_SVG:
        return text
    for artist in figure.findobj(_is_heavy):
        artist.set_rasterized(True)
    return _saved(figure)


def _is_heavy(artist: Any) -> bool:
    from matplotlib.collections import Collection

    return isinstance(artist, Collection) and artist.axes is not None


def _saved(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None})
    return buffer.getvalue()


def _inline(text: str, title: str) -> str:
    """Return an SVG document as an element of a page: ids of its own, greys in the page's."""
    text = _GREY.sub(_on_page, _NOT_FOR_HTML.sub("", text).strip()).replace("xlink:href", "href")
    for colour, on_page in _ON_PAGE.items():
        text = text.replace(colour, on_page)
    own = hashlib.sha256((title + text).encode()).hexdigest()[:8]
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{own}-", text)
    head, rest = text.split(">", 1)
    width = float(head.split('viewBox="0 0 ')[1].split()[0])
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    style = f"max-width: {_ZOOM * width:.0f}px"
    return f'{head} role="img" aria-label="{escape(title)}" style="{style}">{rest}'


def _on_page(match: re.Match[str]) -> str:
    """Return a grey as a mixture of the page's text (for black) and its card (for white)."""
    darkness = 1 - int(match[2], 16) / 255
    if darkness == 1:
        return f"{match[1]}: currentColor"
    return f"{match[1]}: color-mix(in srgb, currentColor {darkness:.0%}, var(--card))"
