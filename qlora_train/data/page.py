"""The audit as one HTML page for a newcomer: no scripts, nothing from elsewhere, safe whatever stands in the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import escape
from numpy.typing import NDArray

from qlora_train.data.audit import MEANINGS
from qlora_train.printable import printable

MAX_TEXT = 200  # characters of a name, a place or a reason
MAX_LISTED = 30  # sources, and kinds of reason
MAX_PREVIEWS = 20  # rows of a split
PREVIEW_BYTES = 300_000  # for the tokens of all rows together
MAX_BINS = 25
_MARKUP_BYTES = 40  # of a token, at the most

BATCHINGS = {
    "packed": "Whole rows are laid end to end in packs of seq_len tokens, each row blind to the others.",
    "length_grouped": "Rows of like length are padded to the longest of their micro-batch.",
    "shuffled": "Rows are padded to the longest of their micro-batch, in random order.",
}

Json = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """A bar of the chart, in the units of its view box."""

    x: float
    y: float
    width: float
    height: float
    label: str


@dataclass(frozen=True)
class Chart:
    """The histogram as shapes. All bins are drawn equally wide, also a last one that takes in the few longest rows."""

    width: int
    height: int
    bars: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]
    highest: int
    limit_x: float | None  # where the line at seq_len stands; None: beside the chart
    has_wide_end: bool


def render_page(audit: Mapping[str, Any]) -> str:
    """The page for an audit of this shape, all of it plain JSON (`?`: may be absent or None):

    recipe, model: text; seq_len: int; max_lost_frac: float; overlap?: `Overlap.as_dict()`; splits: a list of
    `Audit.as_dict()`, each with duplicates?: `ExactDuplicates.as_dict()`, near_duplicates?: `NearDuplicates.as_dict()`,
    histogram?: `length_histogram()`, batching?: {kind, num_lines, num_steps, padding_frac, unfilled_frac}, previews?:
    `PreviewRow`s as dicts.

    Below a megabyte for any data set: texts and lists are cut, and the page says where.
    """
    previews = [split.get("previews") or [] for split in audit["splits"]]
    num_previews = sum(min(len(rows), MAX_PREVIEWS) for rows in previews)
    budget = PREVIEW_BYTES // max(num_previews, 1)
    view = _safe({key: value for key, value in audit.items() if key != "splits"})
    view["splits"] = [
        _split_view(split, int(audit["seq_len"])) | {"previews": [_fit(row, budget) for row in rows[:MAX_PREVIEWS]]}
        for split, rows in zip(audit["splits"], previews, strict=True)
    ]
    environment = templates("qlora_train.data")
    environment.filters["percent"] = percent
    return environment.get_template("page.html.jinja").render(view, fates=MEANINGS, batchings=BATCHINGS)


def templates(package: str) -> Environment:
    """A package's templates and the shared style. What they are given is escaped, what they are not is an error."""
    return Environment(
        loader=ChoiceLoader([PackageLoader(package, ""), PackageLoader("qlora_train.data", "")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def length_histogram(lengths: NDArray[np.int32], seq_len: int) -> dict[str, list[int]]:
    """Rows by number of tokens: counts[i] of them have edges[i] <= tokens < edges[i + 1].

    At most MAX_BINS bins of one round width; where a few rows are far longer than the others, a last wide one for them.
    """
    if not len(lengths):
        return {"edges": [0, 1], "counts": [0]}
    shortest, longest = int(lengths.min()), int(lengths.max())
    most = int(np.quantile(lengths, 0.995, method="higher"))
    most = longest if longest <= 2 * most else most
    most = seq_len if most < seq_len <= 2 * most else most  # so that the line at seq_len is on the chart
    width = next(width for width in _round_widths() if most // width - shortest // width < MAX_BINS)
    edges = list(range(shortest // width * width, most // width * width + width + 1, width))
    edges += [longest + 1] if longest >= edges[-1] else []
    return {"edges": edges, "counts": np.histogram(lengths, edges)[0].tolist()}


def _round_widths() -> Any:
    """1, 2, 5, 10, 20, 50, 100, ..."""
    return (digit * 10**power for power in count() for digit in (1, 2, 5))


def _split_view(split: Mapping[str, Any], seq_len: int) -> Json:
    """What the template shows of a split, but for its rows."""
    shown = {key: value for key, value in split.items() if key not in ("previews", "reasons", "sources", "histogram")}
    view: Json = _safe(shown)
    for name in ("reasons", "sources"):
        view[name] = _safe(split[name][:MAX_LISTED])
        view[f"num_more_{name}"] = len(split[name][MAX_LISTED:])
    histogram = split.get("histogram")
    view["chart"] = _chart(histogram["edges"], histogram["counts"], seq_len) if histogram else None
    return view


def _safe(value: Any) -> Any:
    """Plain JSON with short texts that show what they hold."""
    if isinstance(value, str):
        shown = printable(value[: MAX_TEXT + 1])
        return shown if len(shown) <= MAX_TEXT else shown[:MAX_TEXT] + "..."
    if isinstance(value, Mapping):
        return {_safe(key): _safe(item) for key, item in value.items()}
    return [_safe(item) for item in value] if isinstance(value, list | tuple) else value


def _fit(row: Mapping[str, Any], budget: int) -> Json:
    """A preview in at most `budget` bytes of HTML: what is too much is left out in the middle."""
    head, tail = _within(row["tokens"], budget // 2), []
    if row["num_left_out"]:
        tail = _within(row["tail"][::-1], budget // 2)[::-1]
    elif len(head) < len(row["tokens"]):
        tail = _within(row["tokens"][: len(head) - 1 : -1], budget // 2)[::-1]
    num_left_out = row["num_left_out"] + len(row["tokens"]) + len(row["tail"]) - len(head) - len(tail)
    return {
        "where": _safe(row["where"]),
        "reason": _safe(row["reason"]),
        "head": head,
        "tail": tail,
        "num_left_out": num_left_out,
    }


def _within(tokens: Sequence[Sequence[Any]], budget: int) -> list[tuple[str, float]]:
    """As many of the first tokens as fit."""
    fitting: list[tuple[str, float]] = []
    for text, weight in tokens:
        shown = printable(text[: budget + 1])
        budget -= len(str(escape(shown)).encode()) + _MARKUP_BYTES // (1 if weight not in (0, 1) else 5)
        if budget < 0:
            break
        fitting.append((shown, float(weight)))
    return fitting


def percent(share: float) -> str:
    """A share as a person writes it, and never 0 % for something or 100 % for not all.

    >>> percent(0.123), percent(0.00001), percent(0.99999), percent(1), percent(0)
    ('12.3 %', '< 0.1 %', '> 99.9 %', '100 %', '0 %')
    """
    if share in (0, 1):
        return f"{share:.0%}".replace("%", " %")
    if abs(share) < 0.001:
        return "< 0.1 %"
    return "> 99.9 %" if 0.999 < share < 1 else f"{share:.1%}".replace("%", " %")


def _chart(edges: Sequence[int], counts: Sequence[int], seq_len: int) -> Chart:
    """Bars over a box of 720 by 200, the highest as high as the box."""
    width, height = 720, 200
    step, highest = width / len(counts), max(*counts, 1)
    bars = []
    for index, (number, (first, stop)) in enumerate(zip(counts, pairwise(edges), strict=True)):
        tall = max(height * number / highest, 1.5 if number else 0)  # one row among a million still shows
        span = f"{first:,} to {stop - 1:,}" if stop - first > 1 else f"{first:,}"
        label = f"{span} tokens: {number:,} rows"
        bars.append(Bar(round(index * step + 1, 1), round(height - tall, 1), round(step - 2, 1), round(tall, 1), label))
    every = -(-len(edges) // 10)
    ticks = [(round(index * step, 1), f"{edge:,}") for index, edge in enumerate(edges) if index % every == 0]
    inside = edges[0] <= seq_len <= edges[-1]
    limit_x = round(float(np.interp(seq_len, edges, np.arange(len(edges)) * step)), 1) if inside else None
    has_wide_end = len(counts) > 1 and edges[-1] - edges[-2] != edges[1] - edges[0]
    return Chart(width, height, tuple(bars), tuple(ticks), highest, limit_x, has_wide_end)
