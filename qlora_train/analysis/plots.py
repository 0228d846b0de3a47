"""The plots of an analysis: spectra by layer, ranks and amplification by module, similarity as in the LoRA paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter
from numpy.typing import NDArray

from qlora_train.adapters.module_names import layer_of, name_of
from qlora_train.analysis.amplification import FEW, Amplification
from qlora_train.analysis.look import Analysis, Look
from qlora_train.analysis.overlap import WHAT, Overlap
from qlora_train.analysis.spectrum import Spectrum

_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.labelcolor": "#444444",
    "text.parse_math": False,
    "svg.hashsalt": "qlora-train analyze",  # the same analysis is the same bytes
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
_LAYERS_MAP, _CELLS_MAP, _AROUND_ONE_MAP = "viridis", "magma_r", "RdBu_r"
_PANEL = 2.35  # inches

Grid = NDArray[np.float64]
Phi = tuple[tuple[float, ...], ...]


@contextmanager
def plot_style() -> Iterator[None]:
    """matplotlib's own defaults, whatever the user's settings are, with our look on top."""
    with style.context(_STYLE, after_reset=True):
        yield


def plots(analysis: Analysis) -> dict[str, Figure]:
    """Every figure by the name of its file. Call it, and save the figures, inside `plot_style`."""
    found: dict[str, Figure] = {}
    for index, look in enumerate(analysis.looks, start=1):
        suffix = f"-{index}" if len(analysis.looks) > 1 else ""
        found[f"spectra{suffix}"] = _spectra(look)
        found[f"ranks{suffix}"] = _ranks(look)
        if look.amplifications:
            found[f"amplification{suffix}"] = _amplification(look)
    if analysis.overlaps:
        found["similarity"] = _similarity(analysis)
    return found


def _spectra(look: Look) -> Figure:
    """A panel for each name of module, a line for each layer."""
    groups = _by_name(look.spectra)
    figure, panels = _panels(len(groups), columns=4, sharey=True)
    layers = [spectrum.layer for spectrum in look.spectra if spectrum.layer is not None]
    norm = Normalize(0, max(layers, default=1) or 1)
    floor = 1e-4 * max((spectrum.values[0] for spectrum in look.spectra), default=1.0)
    for axes, (name, members) in zip(panels, groups.items(), strict=False):
        for spectrum in members:
            colour = colormaps[_LAYERS_MAP](norm(spectrum.layer or 0))
            values = [max(value, floor) for value in spectrum.values]
            axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=1)
        axes.set_title(name)
        if floor > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    figure.supxlabel("direction, the strongest first", fontsize=9)
    figure.supylabel("singular value of the update", fontsize=9)
    figure.suptitle(f"Spectra of the updates: {look.name} ({look.method}, r = {look.r})", fontsize=11)
    if layers:
        bar = figure.colorbar(ScalarMappable(norm, _LAYERS_MAP), ax=panels, shrink=0.8, pad=0.02)
        bar.set_label("layer")
        bar.locator = MaxNLocator(6, integer=True)
        bar.update_ticks()
    return figure


def _ranks(look: Look) -> Figure:
    """Size and number of directions of every update, by layer and name."""
    maps: list[tuple[str, Callable[[Spectrum], float]]] = [
        ("size of the update, ||s B A||", lambda s: s.norm),
        ("directions that hold 95 % of it", lambda s: s.energy_rank_95),
        ("effective rank", lambda s: s.effective_rank),
    ]
    return _maps(
        f"Updates by layer and module: {look.name} ({look.method}, r = {look.r})",
        [(title, [(s.module, value(s)) for s in look.spectra]) for title, value in maps],
    )


def _amplification(look: Look) -> Figure:
    """The factor by the strongest directions, what says what it means, and the size of the update."""
    few = f"{FEW} strongest directions"
    maps: list[tuple[str, Callable[[Amplification], float | None]]] = [
        (f"amplification by the {few}, ||dW|| / ||U'WV||", lambda a: a.few.factor),
        (f"||U'WV|| beside random directions, {few}", lambda a: a.few.emphasis),
        (f"||U'WV|| beside W's own first, {few}", lambda a: a.few.of_first),
        ("||U'WV|| beside random directions, all directions", lambda a: a.whole.emphasis),
        ("size of the update, ||dW|| / ||W||", lambda a: a.delta_frac),
        ("size of the update beside the error of quantising W", lambda a: a.above_quant_error),
    ]
    shown = [
        (title, [(a.module, found) for a in look.amplifications if (found := value(a)) is not None])
        for title, value in maps
    ]
    return _maps(
        f"Updates against their weights: {look.name} ({look.method}, r = {look.r})",
        [(title, values) for title, values in shown if values],
    )


def _similarity(analysis: Analysis) -> Figure:
    """Rows: kinds of directions, with A's control below it; columns: names of modules. The scale is 0 to 1 in all."""
    first, second = analysis.looks
    names = list(dict.fromkeys(overlap.name for overlap in analysis.overlaps))
    rows: list[tuple[str, dict[str, tuple[Overlap, Phi]]]] = []
    for directions, what in WHAT.items():
        found = [overlap for overlap in analysis.overlaps if overlap.directions == directions]
        rows.append((what, {o.name: (o, o.grid) for o in found}))
        rows.append(("control: A at the start", {o.name: (o, o.control) for o in found if o.control}))
    rows = [row for row in rows if row[1]]
    figure = Figure(figsize=(1.2 + 1.55 * len(names), 1.1 + 1.75 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(names), squeeze=False)
    for row_axes, (what, members) in zip(panels, rows, strict=True):
        for axes, name in zip(row_axes, names, strict=True):
            if name not in members:
                axes.set_visible(False)
                continue
            overlap, grid = members[name]
            _phi(axes, np.asarray(grid))
            num_first, num_second = np.asarray(grid).shape
            chance = overlap.baseline(num_first, num_second)
            axes.set_title(f"{name}\nall {grid[-1][-1]:.2f}, by chance {chance:.2f}", fontsize=7.5)
        row_axes[0].set_ylabel(f"{what}\n\ni, of {first.name}", fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel(f"j, of {second.name}", fontsize=8)
    figure.suptitle("Subspace similarity phi(i, j) of the first i and j directions, mean over layers", fontsize=11)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), _CELLS_MAP), ax=panels, shrink=0.6, pad=0.01)
    bar.set_label("phi: 0 orthogonal, 1 nested")
    return figure


def _phi(axes: Axes, grid: Grid) -> None:
    num_first, num_second = grid.shape
    axes.imshow(
        grid, cmap=_CELLS_MAP, vmin=0, vmax=1, aspect="auto", extent=(0.5, num_second + 0.5, num_first + 0.5, 0.5)
    )
    for axis, size in ((axes.xaxis, num_second), (axes.yaxis, num_first)):
        axis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1) if size > 1 else NullLocator())
    axes.tick_params(labelsize=7)


def _maps(title: str, maps: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> Figure:
    """A heat map by layer and name for each list of (module, value), each with its own scale."""
    names, layers = _places([module for _, values in maps for module, _ in values])
    width = max(4.2, 1.9 + 0.16 * len(layers))
    height = 0.75 + 0.21 * len(names)
    columns = 2 if len(maps) > 3 or (len(maps) > 1 and width < 6) else 1
    num_rows = -(-len(maps) // columns)
    figure = Figure(figsize=(width * columns, 0.5 + height * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, columns, squeeze=False)
    for axes in panels.flat[len(maps) :]:
        axes.set_visible(False)
    for axes, (what, values) in zip(panels.flat, maps, strict=False):
        grid = _grid(values, names, layers)
        if "random" in what:  # 1 is what chance gives: white
            scale: dict[str, Any] = {
                "cmap": _AROUND_ONE_MAP,
                "norm": TwoSlopeNorm(1, 0, max(2.0, float(np.nanmax(grid)))),
            }
        else:
            scale = {"cmap": _CELLS_MAP, "vmin": 0}
        image = axes.imshow(grid, aspect="auto", interpolation="nearest", **scale)
        axes.set_title(what)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        every = -(-len(layers) // 12)
        axes.set_xticks(range(0, len(layers), every), [_layer_text(layer) for layer in layers[::every]], fontsize=8)
        axes.set_xlabel("layer", fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, pad=0.02).ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=11)
    return figure


def _grid(values: Sequence[tuple[str, float]], names: Sequence[str], layers: Sequence[int | None]) -> Grid:
    """The mean value of the modules of a name in a layer (experts are many); NaN where there is none."""
    sums, counts = np.zeros((len(names), len(layers))), np.zeros((len(names), len(layers)))
    for module, value in values:
        place = names.index(name_of(module)), layers.index(layer_of(module))
        sums[place] += value
        counts[place] += 1
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _places(modules: Sequence[str]) -> tuple[list[str], list[int | None]]:
    """Names and layers, in the model's order; what lies in no layer comes last."""
    names = list(dict.fromkeys(map(name_of, modules)))
    layers = sorted({layer_of(module) for module in modules}, key=lambda layer: (layer is None, layer or 0))
    return names, layers


def _layer_text(layer: int | None) -> str:
    return "-" if layer is None else str(layer)


def _by_name(spectra: Sequence[Spectrum]) -> dict[str, list[Spectrum]]:
    groups: dict[str, list[Spectrum]] = {}
    for spectrum in spectra:
        groups.setdefault(name_of(spectrum.module), []).append(spectrum)
    return groups


def _panels(count: int, *, columns: int, sharey: bool) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels of one size."""
    columns = min(columns, count)
    num_rows = -(-count // columns)
    figure = Figure(figsize=(1.3 + _PANEL * columns, 0.9 + _PANEL * 0.85 * num_rows), layout="constrained")
    panels = list(figure.subplots(num_rows, columns, squeeze=False, sharey=sharey).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]
