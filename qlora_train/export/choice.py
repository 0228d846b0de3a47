"""Which weights to merge onto, measured: the dequantised base, the original weights, and what re-quantising leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from qlora_train.artifacts.files import read_json
from qlora_train.evaluate.compare import Distance, Observed, distance, observe
from qlora_train.evaluate.tasks import Answer, Question, answer, mean_scores
from qlora_train.export.clock import Clock
from qlora_train.export.layers import CandidateWeights, fill_whole, observe_in_layers
from qlora_train.export.tensors import MergedTensors, Onto
from qlora_train.export.verify import Reference, room_for
from qlora_train.model.causal import CausalModel
from qlora_train.model.hollow import build_hollow
from qlora_train.model.load import add_end_tokens
from qlora_train.model.source import Source
from qlora_train.model.trained import FinishedRun

CANDIDATES: tuple[Onto, ...] = ("dequantized", "original", "requantized")
# A difference of less than this many standard errors is taken for chance.
SURE = 2.0


@dataclass(frozen=True)
class Candidate:
    """One way to merge, as it would be stored, against the trained model."""

    onto: Onto
    distance: Distance
    exact_match: float | None  # share of the questions answered word for word; None where none was asked

    @property
    def loss_rise(self) -> float:
        """Nats per supervised token above the trained model's loss."""
        return self.distance.candidate_nll - self.distance.reference_nll

    @property
    def is_better(self) -> bool:
        """Whether its loss is lower than the trained model's by more than chance."""
        return self._rise_in_errors < -SURE

    @property
    def is_worse(self) -> bool:
        """Whether its loss is higher than the trained model's by more than chance."""
        return self._rise_in_errors > SURE

    @property
    def _rise_in_errors(self) -> float:
        error = self.distance.nll_rise_se
        return self.loss_rise / error if error else 0.0


@dataclass(frozen=True)
class Choice:
    """What was measured, and what is published for it."""

    candidates: tuple[Candidate, ...]
    effect_kl: float  # KL of the model with the adapter off from the trained one: all that training did
    trained_exact_match: float | None
    num_answers: int
    split: str
    num_rows: int

    def of(self, onto: Onto) -> Candidate:
        """A candidate by name."""
        return next(candidate for candidate in self.candidates if candidate.onto == onto)

    @property
    def onto(self) -> Onto:
        """The original weights only where their loss is lower by more than chance, and no fewer answers are right."""
        original, trained = self.of("original"), self.trained_exact_match
        fewer_right = trained is not None and original.exact_match is not None and original.exact_match < trained
        return "original" if original.is_better and not fewer_right else "dequantized"

    @property
    def sentence(self) -> str:
        """Which serves better for what."""
        same, original, again = (self.of(onto) for onto in CANDIDATES)
        kept = 1 - again.distance.mean_kl / self.effect_kl if self.effect_kl > 0 else 0.0
        words = (
            f"{_signed(original.loss_rise)} nats per token ({_error(original.distance)}), "
            f"{original.distance.top1_agreement:.1%} the same next token"
        )
        ours = "the dequantised base is published"
        if self.onto == "original":
            verdict = f"Onto the original weights the task is answered better: {words}; that is published"
        elif original.is_better:
            verdict = f"Onto the original weights the loss is lower, but fewer answers are right: {words}; {ours}"
        elif original.is_worse:
            verdict = f"Onto the original weights the task is answered worse: {words}; {ours}"
        else:
            verdict = f"Onto the original weights the loss differs by no more than chance: {words}; {ours}"
        trained = "the model that was trained" if same.distance.mean_kl < 0.01 * self.effect_kl else "the nearest"
        return (
            f"{verdict}. The dequantised base gives {trained}, for whoever must deploy what was evaluated. Quantised "
            f"again to 4 bit, {max(kept, 0.0):.0%} of the training's effect would be left."
        )


def measure_bases(run: FinishedRun, source: Source, reference: Reference, tokenizer: Any, clock: Clock) -> Choice:
    """Measure every candidate on the reference's rows, and on the questions that the trained model was asked.

    Nothing is written. Time: the base is quantised once for each candidate. Memory: as `verify`.
    """
    questions = [given.question for given in reference.answers]
    candidates = []
    for onto in CANDIDATES:
        clock.say(f"measuring the merge: {onto}")
        with clock.of(f"measure {onto}"):
            seen, answers = _observe(run, source, reference, onto, tokenizer, questions)
            candidates.append(Candidate(onto, distance(reference.trained, seen), _exact_match(answers)))
    return Choice(
        candidates=tuple(candidates),
        effect_kl=distance(reference.trained, reference.off).mean_kl,
        trained_exact_match=_exact_match(reference.answers),
        num_answers=len(reference.answers),
        split=reference.split,
        num_rows=reference.num_rows,
    )


def _observe(
    run: FinishedRun, source: Source, reference: Reference, onto: Onto, tokenizer: Any, questions: list[Question]
) -> tuple[Observed, list[Answer]]:
    device = reference.device if reference.how == "layers" else room_for(run, reference.device)
    dtype: torch.dtype = getattr(torch, run.recipe.export.export_dtype)
    weights = CandidateWeights(MergedTensors(run, source, onto), dtype)
    model = build_hollow(run.config(source), device)
    if reference.how == "layers":
        return observe_in_layers(model, weights, reference.batches, device)[0], []
    fill_whole(model, weights)
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(source.folder))
    add_end_tokens(model, read_json(run.run_dir.data)["end_token_ids"])
    section = run.recipe.eval
    answers = answer(model, tokenizer, questions, max_new_tokens=section.max_new_tokens, batch_size=section.batch_size)
    return observe(CausalModel(model), reference.batches, device), answers


def _exact_match(answers: Any) -> float | None:
    return mean_scores(answers).exact_match if answers else None


def _signed(number: float) -> str:
    return f"{number:+.4f}"


def _error(found: Distance) -> str:
    return "one row" if found.nll_rise_se is None else f"standard error {found.nll_rise_se:.4f}"
