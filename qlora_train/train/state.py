"""What survives a restart, and nothing else: position, best evaluation, and what the run is bound to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from qlora_train.errors import ResumeError

_MAY_LACK = frozenset({"best_rows", "evaluation_due", "recent_losses"})


@dataclass
class TrainState:
    """Counters at the end of a step. Randomness and data order follow from `step` and the seed.

    `num_rows` says where in the data that is, each pass over a row counting, and `plan_sha256` in which order: that of
    the epoch of the next step, taken when a checkpoint is made. A resume checks both against its own.
    """

    step: int = 0
    num_rows: int = 0
    plan_sha256: str = ""
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    train_s: float = 0.0
    best_step: int | None = None
    best_eval_loss: float | None = None
    best_rows: str = ""  # fingerprint of the held-out rows that it was measured on
    evaluation_due: bool = False  # of this step: memory ran out in it
    recent_losses: list[float] = field(default_factory=list)  # of the last steps: what a spike is told by

    def count(self, num_rows: int, num_tokens: int, num_supervised_tokens: int, seconds: float) -> None:
        """A step was made."""
        self.step += 1
        self.num_rows += num_rows
        self.num_tokens += num_tokens
        self.num_supervised_tokens += num_supervised_tokens
        self.train_s += seconds

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrainState:
        """The inverse of `as_dict`; ResumeError when a key is missing, but for those of _MAY_LACK, or unknown."""
        names = {field.name for field in fields(cls)}
        if set(data) | _MAY_LACK != names:
            raise ResumeError(
                f"state.json has the keys {sorted(data)}, expected {sorted(names)}", fix="use another step"
            )
        return cls(**data)


@dataclass(frozen=True)
class Binding:
    """Fingerprints that a checkpoint belongs to; a resume with others is refused."""

    base: str
    data: str
    template: str
    recipe: dict[str, Any]
    tokenizer: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
