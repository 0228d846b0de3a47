"""The few kinds of user error, each with its exit code. Anything else is our bug and keeps its traceback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what (with the value seen), where (`path:line[:column]`), and what to do about it."""

    what: str
    fix: str
    where: str | None = None

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.what.rstrip('.')}. Fix: {self.fix}"


class UserError(Exception):
    """Something the user can mend. Shown without a traceback; the process ends with `exit_code`."""

    kind: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, what: str | Sequence[Problem], *, fix: str = "", where: str | None = None) -> None:
        self.problems: tuple[Problem, ...] = (Problem(what, fix, where),) if isinstance(what, str) else tuple(what)
        super().__init__("\n".join(f"error[{self.kind}] {problem}" for problem in self.problems))


class RecipeError(UserError):
    """The recipe or the command line is wrong."""

    kind, exit_code = "recipe", 2


class DataError(UserError):
    """A data set cannot be trained on as it stands."""

    kind, exit_code = "data", 3


class ModelError(UserError):
    """A base, an adapter, a tokenizer or an export is not what it must be."""

    kind, exit_code = "model", 4


class ResumeError(UserError):
    """A checkpoint is missing, damaged, or belongs to another run."""

    kind, exit_code = "resume", 5


class MachineError(UserError):
    """Disk, permissions, a lock, memory or a device stands in the way."""

    kind, exit_code = "machine", 6


class NumericsError(UserError):
    """The training produced a number that is not finite."""

    kind, exit_code = "numerics", 7


class SecurityError(UserError):
    """Something untrusted asked for more than it may have."""

    kind, exit_code = "security", 8


class Interrupted(Exception):
    """A signal ended the run after its state was saved; the process ends with 128 + the signal's number."""

    def __init__(self, signal_number: int, saved: str) -> None:
        self.exit_code = 128 + signal_number
        super().__init__(saved)
