"""Base and adapter on the held-out rows, kept in `eval.json`; and which checkpoint is the best by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlora_train.adapters.inits.residual import untrained
from qlora_train.adapters.state import restore_adapter
from qlora_train.artifacts.files import read_json, write_json
from qlora_train.artifacts.layout import RunDir
from qlora_train.errors import ResumeError
from qlora_train.evaluate.sides import SideScores, questions_of, score_side
from qlora_train.evaluate.tasks import Question
from qlora_train.evaluate.validation import BASE_FIX, TRAINED_FIX, Validation
from qlora_train.train.checkpoint import find_checkpoint
from qlora_train.train.loop import evaluate_now
from qlora_train.train.memory import MemoryLog
from qlora_train.train.metrics import Reporter
from qlora_train.train.setup import Prepared
from qlora_train.train.state import TrainState


class Scorer:
    """Measures one side at a time on the held-out rows; the questions are rendered once for both."""

    def __init__(self, prepared: Prepared, memory: MemoryLog) -> None:
        self._prepared, self._memory = prepared, memory
        self._job, self._split = prepared.job, prepared.inputs.eval
        self.questions: Sequence[Question] = ()
        if self._split is not None:
            limit = self._job.recipe.eval.generate_rows
            self.questions = questions_of(self._split, prepared.inputs.tokenizer, limit)

    def base(self, *, resumed: bool) -> SideScores | None:
        """The base without the adapter; measured once per run, whatever is resumed. Nothing is written."""
        if self._split is None:
            return None
        if resumed and (stored := self._stored())["measured_on"] == self._measured_on():
            return SideScores.from_dict(stored["base"])
        with untrained(self._job.model):
            scores = self._score(None, "of the base", BASE_FIX)
        self._job.reporter.evaluation(0, scores.loss)
        return scores

    def keep_base(self, scores: SideScores | None) -> None:
        """Write what `base` found to `eval.json`, in which no adapter is measured then."""
        if scores is not None:
            content = {"measured_on": self._measured_on(), "base": scores.as_dict(), "adapter": None}
            write_json(self._job.run_dir.evaluation, content)

    def adapter(self, state: TrainState, validation: Validation | None) -> SideScores | None:
        """Put the best adapter in place and measure it; `eval.json` then holds both sides."""
        job = self._job
        if state.best_step is not None and state.best_step != state.step:
            restore_adapter(job.model, find_checkpoint(job.run_dir, state.best_step)[0].folder)
            validation = None
        if self._split is None:
            return None
        scores = self._score(validation, "of the adapter", TRAINED_FIX)
        write_json(job.run_dir.evaluation, {**read_json(job.run_dir.evaluation), "adapter": scores.as_dict()})
        return scores

    def forget_other_best(self, state: TrainState) -> None:
        """A held-out loss says which checkpoint is best only among those measured on the same rows."""
        if state.best_step is None:
            return
        measured_on = state.best_rows or self._stored()["measured_on"].get("rows")
        if measured_on != self._measured_on()["rows"]:
            self._job.reporter.warning(
                "the held-out rows have changed: which checkpoint is best is judged from here on"
            )
            state.best_step = state.best_eval_loss = None

    def _score(self, validation: Validation | None, whose: str, fix: str) -> SideScores:
        job, split = self._job, self._split
        assert split is not None
        if validation is None:
            with self._memory.during("evaluation", f"in the evaluation {whose}"):
                validation = evaluate_now(job, split.table, fix=fix)
        with self._memory.during("generation", f"while the answers {whose} were generated"):
            return score_side(
                job.causal,
                self._prepared.inputs.tokenizer,
                split,
                job.recipe.eval,
                validation=validation,
                questions=self.questions,
            )

    def _measured_on(self) -> dict[str, Any]:
        """What figures of base and adapter depend on besides the model: they compare only where it is the same."""
        section = self._job.recipe.eval
        rows = self._split.table.fingerprint() if self._split else None
        return {"rows": rows, "generate_rows": section.generate_rows, "max_new_tokens": section.max_new_tokens}

    def _stored(self) -> dict[str, Any]:
        """What `eval.json` holds of an earlier part of this run."""
        path = self._job.run_dir.evaluation
        return dict(read_json(path)) if path.is_file() else {"measured_on": {}}


def forget_lost_best(run_dir: RunDir, state: TrainState, reporter: Reporter) -> None:
    """The best adapter so far must still be there to be published in the end."""
    if state.best_step is None:
        return
    try:
        find_checkpoint(run_dir, state.best_step)
    except ResumeError as error:
        reporter.warning(f"the best checkpoint so far is lost: {error}")
        state.best_step = state.best_eval_loss = None
