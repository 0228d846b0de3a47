"""matplotlib figures as SVG inside a page, in the page's colours and font.

matplotlib writes colours and sizes into each shape. Colours of the page are drawn in stand-in values and written as CSS
variables afterwards, so that one figure serves a light page, a dark one and a printed one.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

WIDTH = 400  # units of a figure's box: points, which a page scales
COLOURS = 8  # of runs, or of causes
_STAND_IN = "#a000{:02x}"
_VARIABLES = ("--ink", "--soft", "--line", *(f"--c{index}" for index in range(COLOURS)))
INK, SOFT, LINE, *SERIES = (_STAND_IN.format(index) for index in range(len(_VARIABLES)))

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # texts stay texts, in the page's font
    "svg.hashsalt": "qlora-train report",  # the same figure is the same bytes
    "text.parse_math": False,
    "font.size": 12,
    "text.color": SOFT,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    "grid.color": LINE,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_NUMBER = re.compile(r"-?\d+\.\d{2,}")
_GEOMETRY = ("d", "x", "y", "width", "height", "transform")
_REFERENCE = re.compile(r"(?:url\(#|^#)([^)]+)")


class Drawing:
    """A figure of one chart, and what it will say to those who do not see it."""

    def __init__(self, height: float) -> None:
        self.figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        FigureCanvasSVG(self.figure)
        self.axes: Axes = self.figure.add_subplot()

    def plain_numbers(self, x: str = "{x:,g}", y: str = "{x:,g}") -> None:
        """Ticks as a person writes them, without offsets and powers."""
        self.axes.xaxis.set_major_formatter(StrMethodFormatter(x))
        self.axes.yaxis.set_major_formatter(StrMethodFormatter(y))

    def svg(self, slug: str, label: str, titles: Sequence[str] = ()) -> Markup:
        """The figure as an <svg> element. `slug` keeps its ids apart from those of other figures of the page.

        `titles` are shown when one points at the cells of a mesh, one a cell.
        """
        file = io.BytesIO()
        unwanted = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        self.figure.savefig(file, format="svg", metadata=unwanted)
        root = ElementTree.fromstring(file.getvalue())
        _slim(root, slug)
        _add_titles(root, titles)
        root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
        ElementTree.register_namespace("", _SVG)
        ElementTree.register_namespace("xlink", _XLINK)
        text = ElementTree.tostring(root, encoding="unicode")
        for index, variable in enumerate(_VARIABLES):
            text = text.replace(_STAND_IN.format(index), f"var({variable})")
        return Markup(text)  # ElementTree has escaped what stands in it


@contextmanager
def page_style() -> Iterator[None]:
    """matplotlib's own defaults, whatever the user's settings are, with the page's look on top."""
    with style.context(_STYLE, after_reset=True):
        yield


def _slim(root: ElementTree.Element, slug: str) -> None:
    """Take out matplotlib's style sheet, which would act on the whole page, unused ids, and digits nobody sees."""
    for parent in root.iter():
        for child in [child for child in parent if child.tag == f"{{{_SVG}}}style"]:
            parent.remove(child)
    values = [value for element in root.iter() for value in element.attrib.values()]
    used = {identifier for value in values for identifier in _REFERENCE.findall(value)}
    for element in root.iter():
        if element.attrib.get("id") not in used:
            element.attrib.pop("id", None)
        for name, value in element.attrib.items():
            element.attrib[name] = _shortened(name, value, slug)


def _shortened(name: str, value: str, slug: str) -> str:
    """An attribute's value with ids of this figure's own and coordinates to a tenth of a unit."""
    if name == "id":
        return f"{slug}-{value}"
    value = _REFERENCE.sub(lambda match: match[0].replace(match[1], f"{slug}-{match[1]}"), value)
    if name not in _GEOMETRY:
        return value
    return _NUMBER.sub(lambda match: f"{float(match[0]):.1f}".removesuffix(".0"), value)


def _add_titles(root: ElementTree.Element, titles: Sequence[str]) -> None:
    """Give each cell of the figure's mesh the text that shows when one points at it."""
    if not titles:
        return
    mesh = next(group for group in root.iter(f"{{{_SVG}}}g") if len(group.findall(f"{{{_SVG}}}path")) == len(titles))
    for path, text in zip(mesh.findall(f"{{{_SVG}}}path"), titles, strict=True):
        path.attrib.pop("clip-path", None)
        ElementTree.SubElement(path, f"{{{_SVG}}}title").text = text
