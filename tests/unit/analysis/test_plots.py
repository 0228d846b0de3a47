"""The plots of an analysis of made-up adapters: every figure is there, named, and in both formats."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from qlora_train.adapters.fold import Delta
from qlora_train.analysis.files import ANALYSIS, write_analysis
from qlora_train.analysis.look import Analysis, Subject, look_into
from qlora_train.analysis.plots import plot_style, plots
from qlora_train.errors import RecipeError

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "lm_head")


def subject(name: str, r: int, seed: int, *, with_base: bool = True) -> Subject:
    generator = torch.Generator().manual_seed(seed)
    deltas = {
        module: Delta(torch.randn(r, 12, generator=generator), torch.randn(10, r, generator=generator), 0.5)
        for module in MODULES
    }
    weight = torch.randn(10, 12, generator=generator)
    start = {module: delta.lora_A for module, delta in deltas.items()}
    return Subject(name, "lora", r, deltas, start, (lambda module: (weight, 0.25)) if with_base else None)


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return look_into([subject("wide $x$", 4, 0), subject("narrow", 1, 1, with_base=False)], ["a notice"])


def test_every_figure_of_two_adapters(analysis: Analysis) -> None:
    with plot_style():
        found = plots(analysis)
    assert set(found) == {"spectra-1", "ranks-1", "amplification-1", "spectra-2", "ranks-2", "similarity"}
    titles = [axes.get_title() for axes in found["amplification-1"].axes]
    assert any("beside random directions" in title for title in titles)
    panels = [axes for axes in found["similarity"].axes if axes.get_visible() and axes.images]
    assert len(panels) == 4 * 2, "three kinds of directions and the control, of two names"
    assert panels[0].images[0].get_array().shape == (4, 1)


def test_a_single_adapter_has_plain_names() -> None:
    with plot_style():
        assert set(plots(look_into([subject("a", 2, 0, with_base=False)]))) == {"spectra", "ranks"}


def test_a_name_with_dollars_is_no_formula_and_the_svg_is_one(tmp_path: Path) -> None:
    analysis = look_into([subject("wide $x$", 2, 0)], ["a notice"])
    assert len(write_analysis(analysis, tmp_path / "out")) == 1 + 2 * 3
    for path in (tmp_path / "out").glob("*.svg"):
        ElementTree.parse(path)
    assert "wide $x$" in (tmp_path / "out" / "spectra.svg").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "spectra.png").read_bytes().startswith(b"\x89PNG")
    stored = json.loads((tmp_path / "out" / ANALYSIS).read_text())
    assert stored["notices"] == ["a notice"] and stored["looks"][0]["spectra"][0]["norm"] > 0
    with pytest.raises(RecipeError, match="exists already"):
        write_analysis(analysis, tmp_path / "out")


def test_a_module_that_is_in_one_adapter_only_is_not_compared() -> None:
    first, second = subject("a", 2, 0), subject("b", 2, 1)
    lone = Subject("b", "lora", 2, {MODULES[0]: second.deltas[MODULES[0]]})
    assert {overlap.name for overlap in look_into([first, lone]).overlaps} == {"q_proj"}
