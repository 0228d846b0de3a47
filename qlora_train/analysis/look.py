"""A whole look into one adapter or two: spectra, ranks, what is left of the start, overlap, amplification, advice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from torch import Tensor

from qlora_train.adapters.arithmetic import FactoredSvd, delta_svd
from qlora_train.adapters.fold import Delta
from qlora_train.adapters.module_names import name_of
from qlora_train.analysis.amplification import Amplification, amplification
from qlora_train.analysis.overlap import Overlap, baseline, overlaps, row_directions, similarity
from qlora_train.analysis.recommend import Recommendation, recommend, shared_ranks
from qlora_train.analysis.spectrum import Spectrum, in_model_order, spectra

# The weight that a module computes with (out, in) in float32, and ||original - it|| where it is quantised.
ReadWeight = Callable[[str], tuple[Tensor, float | None]]


@dataclass(frozen=True)
class Subject:
    """An adapter to look into, and what is known of where it comes from."""

    name: str
    method: str
    r: int
    deltas: Mapping[str, Delta]
    start: Mapping[str, Tensor] | None = None  # lora_A before the first step, by module
    read_weight: ReadWeight | None = None  # of the base; None: no amplification


@dataclass(frozen=True)
class StartOverlap:
    """How much of the random start is left in A: phi of all its directions, the mean over the modules of one name."""

    name: str
    num_modules: int
    r: int
    phi: float  # 1: A spans what it spanned before training
    by_chance: float


@dataclass(frozen=True)
class Look:
    """What was found in one adapter."""

    name: str
    method: str
    r: int
    spectra: tuple[Spectrum, ...]
    start_overlaps: tuple[StartOverlap, ...]  # empty where the start is not known
    amplifications: tuple[Amplification, ...]  # empty where the base was not read
    recommendation: Recommendation


@dataclass(frozen=True)
class Analysis:
    """What was found in one adapter, or in two and between them."""

    looks: tuple[Look, ...]
    overlaps: tuple[Overlap, ...]  # of two adapters
    notices: tuple[str, ...]


def look_into(subjects: Sequence[Subject], notices: Sequence[str] = ()) -> Analysis:
    """Look into one adapter or two. Reads each weight of the base once.

    Memory: the singular vectors of all updates in float64, twice the adapters in float32, and one weight of the base.
    """
    assert 1 <= len(subjects) <= 2
    svds = [{module: delta_svd(delta) for module, delta in subject.deltas.items()} for subject in subjects]
    shared = shared_ranks(*svds) if len(svds) == 2 else None
    looks = [_look(subject, svd, shared) for subject, svd in zip(subjects, svds, strict=True)]
    between: list[Overlap] = []
    if len(subjects) == 2:
        first, second = (
            {module: (delta, svd[module]) for module, delta in subject.deltas.items()}
            for subject, svd in zip(subjects, svds, strict=True)
        )
        starts = [subject.start for subject in subjects]
        known = (starts[0], starts[1]) if starts[0] is not None and starts[1] is not None else None
        between = overlaps(first, second, known)
    return Analysis(tuple(looks), tuple(between), tuple(notices))


def _look(subject: Subject, svds: Mapping[str, FactoredSvd], shared: Sequence[int] | None) -> Look:
    found = spectra(svds)
    amplified = []
    if subject.read_weight is not None:
        for module in in_model_order(svds):
            weight, quant_error_norm = subject.read_weight(module)
            amplified.append(amplification(module, svds[module], weight, quant_error_norm))
    return Look(
        subject.name,
        subject.method,
        subject.r,
        spectra=found,
        start_overlaps=_start_overlaps(subject),
        amplifications=tuple(amplified),
        recommendation=recommend(found, subject.r, shared),
    )


def _start_overlaps(subject: Subject) -> tuple[StartOverlap, ...]:
    if subject.start is None:
        return ()
    found = []
    for name in dict.fromkeys(map(name_of, in_model_order(subject.deltas))):
        # An embedding's A starts at zero.
        modules = [module for module in subject.deltas if name_of(module) == name and module in subject.start]
        if not modules:
            continue
        phis = []
        for module in modules:
            before, after = subject.start[module], subject.deltas[module].lora_A
            phis.append(float(similarity(row_directions(after), row_directions(before))[-1, -1]))
        r, dim = subject.deltas[modules[0]].lora_A.shape
        found.append(StartOverlap(name, len(modules), r, mean(phis), baseline(r, r, dim)))
    return tuple(found)
