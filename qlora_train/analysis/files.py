"""What an analysis leaves in a folder: every figure as JSON, and the plots as SVG and PNG."""

from __future__ import annotations

import io
from pathlib import Path

from qlora_train.analysis.folder import refuse_existing
from qlora_train.analysis.look import Analysis
from qlora_train.analysis.plots import plot_style, plots
from qlora_train.artifacts.files import write_file, write_json
from qlora_train.artifacts.folders import publishing
from qlora_train.plain import to_plain

ANALYSIS = "analysis.json"
_PNG_DPI = 160


def write_analysis(analysis: Analysis, target: Path) -> tuple[str, ...]:
    """Write the folder `target` whole or not at all; the names of its files. RecipeError where it exists."""
    refuse_existing(target)
    with publishing(target, manifest={"looks": [look.name for look in analysis.looks]}) as folder:
        write_json(folder / ANALYSIS, to_plain(analysis))
        with plot_style():
            for name, figure in plots(analysis).items():
                for kind in ("svg", "png"):
                    file = io.BytesIO()
                    date = {"Date": None} if kind == "svg" else {}
                    figure.savefig(file, format=kind, dpi=_PNG_DPI, metadata=date)
                    write_file(folder / f"{name}.{kind}", file.getvalue())
                    figure.set_layout_engine("none")  # computed once; it takes longer than drawing
        return tuple(sorted(path.name for path in folder.iterdir()))
