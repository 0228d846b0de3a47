"""One side of "base against adapter": held-out loss and scored answers, stored so that they can be read again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from qlora_train.data.encode import Encoder
from qlora_train.data.loader import eval_batches
from qlora_train.data.problems import RowFault
from qlora_train.data.split import Split
from qlora_train.data.template import Renderer, last_question
from qlora_train.evaluate.tasks import Question, TaskScores, answer, mean_scores
from qlora_train.evaluate.validation import TRAINED_FIX, Validation, validate
from qlora_train.model.causal import CausalModel
from qlora_train.recipe.schema import EvalSection

_ROWS_AT_A_TIME = 256


@dataclass(frozen=True)
class StoredAnswer:
    """One generated answer beside its reference."""

    where: str
    asked: str
    reference: str
    text: str
    exact_match: float
    char_similarity: float


@dataclass(frozen=True)
class SideScores:
    """A model on the held-out rows. `scores` is None where nothing was generated."""

    loss: float  # nats per supervised token
    perplexity: float
    num_rows: int
    num_supervised_tokens: int
    scores: TaskScores | None
    answers: tuple[StoredAnswer, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SideScores:
        """The inverse of `as_dict`."""
        scores = TaskScores(**data["scores"]) if data["scores"] else None
        answers = tuple(StoredAnswer(**entry) for entry in data["answers"])
        return cls(**{**data, "scores": scores, "answers": answers})


def questions_of(split: Split, tokenizer: Any, limit: int) -> list[Question]:
    """What the first rows of a split ask, of those that the loss is measured on.

    Rows of plain text ask nothing, and are not read: a long one stands in the table once for each of its pieces.
    Others have no answer to compare with, as one whose last answer is not trained.
    """
    questions: list[Question] = []
    encoder = Encoder(tokenizer)
    asking = [index for index, source in enumerate(split.sources) if source.facts.row_format != "text"]
    indices = np.flatnonzero(np.isin(split.table.column("source"), asking)).tolist()
    with Renderer(tokenizer, "completion") as renderer:
        for start in range(0, len(indices), _ROWS_AT_A_TIME):
            for row in split.read(indices[start : start + _ROWS_AT_A_TIME]):
                if len(questions) == limit:
                    return questions
                with suppress(RowFault):
                    if found := renderer.question(row):
                        prompt, reference = found
                        ids = tuple(encoder.ids(prompt))
                        questions.append(Question(row.where, last_question(row), ids, reference))
    return questions


def score_side(
    causal: CausalModel,
    tokenizer: Any,
    split: Split,
    section: EvalSection,
    *,
    validation: Validation | None = None,
    questions: Sequence[Question] | None = None,
    fix: str = TRAINED_FIX,
) -> SideScores:
    """Measure the model as it is now. `validation` and `questions` save the work where they are known already.

    NumericsError with `fix` where the loss is not finite.
    """
    device: torch.device = causal.head.weight_VH.device
    if validation is None:
        batches = eval_batches(split.table, section.batch_size, tokenizer.pad_token_id)
        validation = validate(causal, batches, device, fix=fix)
    if questions is None:
        questions = questions_of(split, tokenizer, section.generate_rows)
    answers = answer(
        causal.model, tokenizer, questions, max_new_tokens=section.max_new_tokens, batch_size=section.batch_size
    )
    return SideScores(
        loss=validation.loss,
        perplexity=validation.perplexity,
        num_rows=validation.num_rows,
        num_supervised_tokens=validation.num_supervised_tokens,
        scores=mean_scores(answers) if answers else None,
        answers=tuple(
            StoredAnswer(
                a.question.where, a.question.asked, a.question.reference, a.text, a.exact_match, a.char_similarity
            )
            for a in answers
        ),
    )
