"""The head of a page: what was trained on what and what came of it, in a sentence and a few figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qlora_train.data.page import percent
from qlora_train.recipe.methods import METHODS
from qlora_train.report.facts import RunFacts
from qlora_train.report.shapes import Evaluation, Scores
from qlora_train.report.tables import change, score_change, state
from qlora_train.report.words import duration, loss, plain, short, small_share
from qlora_train.units import size_text


@dataclass(frozen=True)
class Tile:
    """One figure in large letters."""

    figure: str
    label: str
    note: str = ""
    bad: bool = False


def sentence(run: RunFacts) -> str:
    """One run in one or two sentences."""
    model = run.base.source.name if run.base else run.setting("model.path")
    quant = run.setting("quant.quant_type")
    base = f" in {quant.upper()}" if quant not in ("", "none") else ""
    words = f"{plain(model).rpartition('/')[2] or 'A model'}{base}"
    if method := run.setting("adapter.method"):
        words += f" with {'LoRA' if method == 'lora' else plain(method)}"
        if method not in METHODS or "r" in METHODS[method].reads:
            r, alpha = plain(run.setting("adapter.r")), plain(run.setting("adapter.alpha")).removesuffix(".0")
            words += f" (r = {r}, alpha = {alpha})"
    if train := run.data.split("train") if run.data else None:
        words += f", {'trained' if run.summary else 'to be trained'} on {train.num_trained:,} rows"
    so_far = state(run)
    words += f". {so_far[0].upper()}{so_far[1:]}"
    if run.summary:
        words += f" in {duration(run.summary.train_s)}"
    return f"{words}. {_outcome(run)}".rstrip()


def _outcome(run: RunFacts) -> str:
    """What the held-out rows say."""
    evaluation = run.evaluation
    if evaluation is None or evaluation.base is None:
        return "No held-out rows were measured."
    if evaluation.adapter is None and not run.evals:
        return f"The base's held-out loss is {loss(evaluation.base.loss)}; the adapter's is not measured yet."
    before = evaluation.base.loss
    after, when = (evaluation.adapter.loss, "") if evaluation.adapter else _so_far(run)
    went = "fell" if after < before else "rose" if after > before else "stayed"
    return f"The loss on held-out rows {went} from {loss(before)} to {loss(after)} nats per supervised token{when}."


def _so_far(run: RunFacts) -> tuple[float, str]:
    """The newest held-out loss of a run that has not ended, and when it was measured."""
    return run.evals[-1].eval_loss, f" at step {run.evals[-1].step:,}"


def tiles(run: RunFacts) -> list[Tile]:
    """The figures of one run that a reader asks for first."""
    found = [_loss_tile(run), *_score_tiles(run.evaluation), *_training_tiles(run), _merge_tile(run)]
    return [tile for tile in found if tile is not None]


def _loss_tile(run: RunFacts) -> Tile | None:
    base = run.evaluation.base if run.evaluation else None
    if run.evaluation is None or base is None:
        return None
    adapter = run.evaluation.adapter
    after, when = (adapter.loss, "") if adapter else _so_far(run) if run.evals else (None, "")
    note = f"nats per supervised token, on {base.num_rows:,} rows"
    worse = after is not None and after > base.loss
    return Tile(change(base.loss, after, loss) or "", f"held-out loss{when}", note, worse)


def _score_tiles(evaluation: Evaluation | None) -> list[Tile]:
    """Exact match and character similarity, where answers were generated."""
    if evaluation is None or evaluation.base is None or evaluation.base.scores is None or evaluation.adapter is None:
        return []

    def tile(score: Callable[[Scores], float], write: Callable[[float], str], label: str, note: str) -> Tile:
        sides = [side.scores for side in (evaluation.base, evaluation.adapter) if side and side.scores]
        worse = len(sides) == 2 and score(sides[1]) < score(sides[0])
        return Tile(score_change(evaluation, score, write) or "", label, note, worse)

    asked = f"of {evaluation.base.scores.num_answers:,} answers"
    alike = f"{asked}; 1 means identical"
    return [
        tile(lambda scores: scores.exact_match, percent, "exact match", f"{asked}, word for word"),
        tile(lambda scores: scores.char_similarity, "{:.3f}".format, "character similarity", alike),
    ]


def _training_tiles(run: RunFacts) -> list[Tile]:
    if (summary := run.summary) is None:
        planned = f"of {run.num_planned_steps:,}" if run.num_planned_steps else ""
        return [Tile(f"{run.last_step:,}", "steps logged", planned)]
    supervised = f"{summary.num_supervised_tokens:,} of them supervised"
    peak = size_text(summary.peak_memory_bytes)
    steps = f"{summary.num_steps:,} steps, {summary.tokens_per_s:,.0f} tokens/s, {peak} at most"
    return [
        Tile(f"{summary.num_tokens:,}", "tokens trained on", supervised),
        Tile(duration(summary.train_s), "time of the steps", steps),
    ]


def _merge_tile(run: RunFacts) -> Tile | None:
    if (export := run.export) is None:
        if run.adapter is None or not run.adapter.is_published:
            return None
        return Tile("not exported", "merge", "qlora-train export merges and verifies it")
    if export.kl_frac is None:
        return Tile("refused", "merge", "the adapter has no effect", True)
    note = f"KL from the trained model: {small_share(export.kl_frac)} of the adapter's effect"
    if not export.accepted:
        return Tile("refused", "merge", f"{note}, more than {small_share(export.max_kl_frac)}", True)
    if export.merged_onto != "dequantized":
        return Tile("another model", "merge", f"onto the {export.merged_onto} base; {note}")
    if export.kl_frac > export.max_kl_frac:
        return Tile("accepted all the same", "merge", f"{note}, more than {small_share(export.max_kl_frac)}", True)
    return Tile("verified", "merge", note)


def comparability(runs: Sequence[RunFacts]) -> list[str]:
    """Why figures of several runs do not compare; empty where nothing speaks against it."""
    warnings = []
    measured: dict[str, list[str]] = {}
    for run in runs:
        if run.evaluation and run.evaluation.base:
            measured.setdefault(run.evaluation.measured_on.rows or "", []).append(run.name)
    if len(measured) > 1 or ("" in measured and len(measured[""]) > 1):
        groups = [
            f"{', '.join(names)} on {f'rows {short(rows)}' if rows else 'rows that were not recorded'}"
            for rows, names in measured.items()
        ]
        warnings.append(
            f"Held-out figures do not compare: they were not measured on the same rows, or are not known to have been "
            f"({'; '.join(groups)})."
        )
    elif len({(run.evaluation.measured_on.generate_rows, run.evaluation.measured_on.max_new_tokens)
              for run in runs if run.evaluation and run.evaluation.base}) > 1:  # fmt: skip
        warnings.append("Exact match and similarity do not compare: the runs were asked otherwise (eval section).")
    files = {tuple(sorted(file.sha256 for file in run.data.files)) for run in runs if run.data}
    if len(files) > 1:
        warnings.append("Training losses are over different rows: the runs do not read the same files.")
    return warnings
