"""The tables of a page: a row for each figure, a column for each run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from qlora_train.data.audit import MEANINGS
from qlora_train.data.page import percent
from qlora_train.report.facts import RunFacts
from qlora_train.report.happened import how_it_ended
from qlora_train.report.shapes import Base, Data, Distance, Environment, Evaluation, Export, Scores, Split, Summary
from qlora_train.report.words import duration, loss, plain, short, small_share
from qlora_train.units import size_text

ABSENT = "-"
INDENT = "\N{EM SPACE}"
ARROW = " \N{RIGHTWARDS ARROW} "
_P = TypeVar("_P")


@dataclass(frozen=True)
class Row:
    """One figure of all runs."""

    label: str
    cells: tuple[str, ...]

    @property
    def differs(self) -> bool:
        """Whether the runs do not agree."""
        return len(set(self.cells)) > 1


Cell = Callable[[RunFacts], str | None]


def table(runs: Sequence[RunFacts], entries: Iterable[tuple[str, Cell]]) -> list[Row]:
    """The rows that at least one run has a figure for."""
    rows = []
    for label, cell in entries:
        cells = [cell(run) for run in runs]
        if any(found is not None for found in cells):
            rows.append(Row(plain(label), tuple(plain(found) if found is not None else ABSENT for found in cells)))
    return rows


def given(part: Callable[[RunFacts], _P | None], write: Callable[[_P], str | None]) -> Cell:
    """A cell that is written from a part of a run, where there is that part."""

    def cell(run: RunFacts) -> str | None:
        found = part(run)
        return write(found) if found is not None else None

    return cell


def state(run: RunFacts) -> str:
    """How far the run came, in words."""
    if run.summary:
        return f"complete: {run.summary.num_steps:,} steps"
    planned = f" of {run.num_planned_steps:,}" if run.num_planned_steps else ""
    ran_out = "out of memory" if run.memory and run.memory.out_of_memory else ""
    ended = how_it_ended(run) or ran_out or "unfinished"
    return f"{ended}: step {run.last_step:,}{planned}" if run.steps else f"{ended}: no step logged"


def change(before: float | None, after: float | None, write: Callable[[float], str]) -> str | None:
    """Two figures with an arrow; ABSENT stands for one that is not there."""
    if before is None and after is None:
        return None
    return ARROW.join(ABSENT if value is None else write(value) for value in (before, after))


def loss_change(evaluation: Evaluation) -> str | None:
    """Held-out loss of base and adapter."""
    base, adapter = evaluation.base, evaluation.adapter
    return change(base.loss if base else None, adapter.loss if adapter else None, loss)


def score_change(evaluation: Evaluation, score: Callable[[Scores], float], write: Callable[[float], str]) -> str | None:
    """A score of the generated answers of base and adapter."""
    sides = (evaluation.base, evaluation.adapter)
    before, after = (score(side.scores) if side and side.scores else None for side in sides)
    return change(before, after, write)


def verdict(run: RunFacts) -> str | None:
    """What became of the newest export of the run's adapter."""
    if (export := run.export) is None:
        return "not exported" if run.adapter and run.adapter.is_published else None
    of_effect = small_share(export.kl_frac) if export.kl_frac is not None else "more than all"
    return f"{'accepted' if export.accepted else 'refused'}: KL is {of_effect} of the adapter's effect"


def figures(runs: Sequence[RunFacts]) -> list[Row]:
    """What came of each run."""

    def held_out(evaluation: Evaluation) -> str | None:
        base = evaluation.base
        return f"{base.num_rows:,} rows, {base.num_supervised_tokens:,} supervised tokens" if base else None

    def rows_print(evaluation: Evaluation) -> str | None:
        return short(evaluation.measured_on.rows) if evaluation.measured_on.rows else None

    def trainable(summary: Summary) -> str:
        return f"{summary.num_trainable:,} ({percent(summary.trainable_frac)} of all)"

    def wall_time(summary: Summary) -> str:
        # The clock starts anew when a run is resumed, the sum over its steps does not.
        resumed = " since the run was last resumed" if summary.wall_s < summary.train_s else ""
        return f"{duration(summary.wall_s)}{resumed}"

    return table(
        runs,
        [
            ("State", state),
            (f"Held-out loss, base{ARROW}adapter", given(_evaluation, loss_change)),
            (
                "Exact match",
                given(_evaluation, lambda found: score_change(found, lambda scores: scores.exact_match, percent)),
            ),
            (
                "First word right",
                given(_evaluation, lambda found: score_change(found, lambda scores: scores.first_word, percent)),
            ),
            (
                "Character similarity",
                given(
                    _evaluation,
                    lambda found: score_change(found, lambda scores: scores.char_similarity, "{:.3f}".format),
                ),
            ),
            ("Measured on", given(_evaluation, held_out)),
            ("Fingerprint of these rows", given(_evaluation, rows_print)),
            ("Adapter is that of", given(lambda run: run.adapter, lambda adapter: f"step {adapter.step:,}")),
            ("Supervised tokens trained", given(_summary, lambda summary: f"{summary.num_supervised_tokens:,}")),
            ("All tokens trained", given(_summary, lambda summary: f"{summary.num_tokens:,}")),
            ("Time of the steps", given(_summary, lambda summary: duration(summary.train_s))),
            ("Time in all, with loading and evaluation", given(_summary, wall_time)),
            ("Speed", given(_summary, lambda summary: f"{summary.tokens_per_s:,.1f} tokens/s")),
            ("Peak memory", given(_summary, lambda summary: size_text(summary.peak_memory_bytes))),
            ("Trainable parameters", given(_summary, trainable)),
            ("Merge", verdict),
        ],
    )


def split_rows(runs: Sequence[RunFacts], name: str) -> list[Row]:
    """The account of one split; fates that befell no row of any run are left out."""

    def of_split(write: Callable[[Split], str | None]) -> Cell:
        return given(lambda run: run.data.split(name) if run.data else None, write)

    def fate(key: str) -> Callable[[Split], str]:
        return lambda split: f"{split.counts.get(key, 0):,}"

    def pieces(split: Split) -> str | None:
        return f"{split.num_pieces:,}" if split.num_pieces not in (None, split.num_trained) else None

    def packing(split: Split) -> str | None:
        if (batching := split.batching) is None:
            return None
        lines = "packs" if batching.kind == "packed" else "rows"
        return f"{batching.kind}: {batching.num_lines:,} {lines} an epoch, {percent(batching.padding_frac)} padding"

    splits = [split for run in runs if run.data and (split := run.data.split(name))]
    befell = [key for key in MEANINGS if any(split.counts.get(key) for split in splits)]
    return table(
        runs,
        [
            ("Rows in the sources", of_split(lambda split: f"{split.num_rows:,}")),
            *((f"{INDENT}{key.replace('_', ' ')}", of_split(fate(key))) for key in befell),
            ("Pieces of split rows", of_split(pieces)),
            ("Tokens", of_split(lambda split: f"{split.num_tokens:,}")),
            (f"{INDENT}supervised", of_split(lambda split: f"{split.num_supervised_tokens:,}")),
            (
                "Tokens lost",
                of_split(lambda split: f"{split.num_lost_tokens:,} ({percent(split.lost_token_frac)})"),
            ),
            (
                "Rows that repeat an earlier one",
                of_split(lambda split: f"{split.duplicates.num_duplicates:,}" if split.duplicates else None),
            ),
            (
                "Rows much like an earlier one",
                of_split(lambda split: f"{split.near_duplicates.num_near:,}" if split.near_duplicates else None),
            ),
            ("Batches", of_split(packing)),
        ],
    )


def overlap_rows(runs: Sequence[RunFacts]) -> list[Row]:
    """Held-out rows that measure memory and not skill."""

    def shared(data: Data) -> str | None:
        found = data.overlap
        return f"{found.num_rows:,} of {found.num_eval_rows:,} rows" if found else None

    def prompts(data: Data) -> str | None:
        found = data.overlap
        return f"{found.num_prompts:,} of {found.num_eval_rows:,} rows" if found else None

    entries = [("Held-out rows that are trained on", shared), (f"{INDENT}whose prompt is asked in training", prompts)]
    return table(runs, [(label, given(lambda run: run.data, write)) for label, write in entries])


def merge_rows(runs: Sequence[RunFacts]) -> list[Row]:
    """The newest export of each run's adapter and what its verification found."""

    def of_export(write: Callable[[Export], str | None]) -> Cell:
        return given(lambda run: run.export, write)

    def both(write: Callable[[Distance], str]) -> Cell:
        return of_export(lambda export: f"{write(export.merged)}; adapter off: {write(export.adapter_off)}")

    def limit(export: Export) -> str:
        found = small_share(export.kl_frac) if export.kl_frac is not None else "more than all"
        return f"{found} (at most {small_share(export.max_kl_frac)})"

    def rows(export: Export) -> str:
        held_out = "held-out" if export.split == "eval" else "training"
        return f"{export.num_rows:,} {held_out} rows, {export.merged.num_tokens:,} tokens"

    return table(
        runs,
        [
            ("Verdict", of_export(lambda export: "accepted" if export.accepted else "refused: nothing was published")),
            ("Folder", of_export(lambda export: export.folder)),
            ("Weights", of_export(lambda export: export.export_dtype)),
            ("Merged onto", of_export(lambda export: f"the {export.merged_onto} base")),
            ("KL from the trained model (nats per token)", both(lambda distance: f"{distance.mean_kl:.3g}")),
            ("KL as a share of the adapter's effect", of_export(limit)),
            ("Same most likely token", both(lambda distance: percent(distance.top1_agreement))),
            ("Loss of the trained model", of_export(lambda export: loss(export.merged.reference_nll))),
            ("Loss", both(lambda distance: loss(distance.candidate_nll))),
            ("Compared on", of_export(rows)),
        ],
    )


def differing_settings(runs: Sequence[RunFacts]) -> list[Row]:
    """Recipe keys whose values are not the same in all runs, but for the folder, which never is."""
    keys = dict.fromkeys(setting.key for run in runs for setting in run.settings)
    values = [{setting.key: setting.value for setting in run.settings} for run in runs]
    rows = [Row(plain(key), tuple(plain(own.get(key, ABSENT)) for own in values)) for key in keys if key != "run.dir"]
    return [row for row in rows if row.differs]


def version_rows(runs: Sequence[RunFacts]) -> list[Row]:
    """Machine and libraries."""

    def of_environment(write: Callable[[Environment], str | None]) -> Cell:
        return given(lambda run: run.environment, write)

    def device(environment: Environment) -> str:
        if environment.cuda_devices:
            return f"{', '.join(environment.cuda_devices)}, CUDA {environment.cuda}"
        return f"{environment.cpu_count} CPU cores ({environment.cpu_capability}), {environment.threads} threads"

    packages = dict.fromkeys(name for run in runs if run.environment for name in run.environment.versions)

    def version(package: str) -> Callable[[Environment], str | None]:
        return lambda environment: environment.versions.get(package)

    return table(
        runs,
        [
            ("Device", of_environment(device)),
            ("System", of_environment(lambda environment: environment.system)),
            ("Python", of_environment(lambda environment: environment.python)),
            *((package, of_environment(version(package))) for package in packages),
            ("Code of qlora_train", of_environment(lambda environment: short(environment.code_sha256))),
        ],
    )


def fingerprint_rows(runs: Sequence[RunFacts]) -> list[Row]:
    """What exactly was trained on what: SHA-256 of contents, the first 16 characters."""

    def of_base(write: Callable[[Base], str | None]) -> Cell:
        return given(lambda run: run.base, write)

    def quant(base: Base) -> str | None:
        return ", ".join(f"{key}: {value}" for key, value in base.quant.items()) if base.quant else "not quantised"

    def held(base: Base) -> str | None:
        counts: Counter[str] = Counter()
        for tensor in base.tensors.values():
            counts[tensor.dtype] += tensor.num_bytes
        return ", ".join(f"{size_text(num_bytes)} in {dtype}" for dtype, num_bytes in counts.most_common()) or None

    def data_file(name: str) -> Callable[[Data], str | None]:
        return lambda data: next((short(file.sha256) for file in data.files if file.name == name), None)

    files = dict.fromkeys(file.name for run in runs if run.data for file in run.data.files)
    return table(
        runs,
        [
            ("Base", of_base(lambda base: base.source.name)),
            ("Base: commit", of_base(lambda base: base.source.commit)),
            ("Base: file", of_base(lambda base: short(base.source.file_sha256) if base.source.file_sha256 else None)),
            ("Base: all tensors as held", of_base(lambda base: short(base.digest))),
            ("Base: quantisation", of_base(quant)),
            ("Base: size", of_base(held)),
            ("Adapter", given(lambda run: run.adapter, lambda adapter: short(adapter.sha256))),
            *((name, given(lambda run: run.data, data_file(name))) for name in files),
        ],
    )


def _evaluation(run: RunFacts) -> Evaluation | None:
    return run.evaluation


def _summary(run: RunFacts) -> Summary | None:
    return run.summary
