"""What is wrong with a data set, collected: the first faults in full, and how many there are in all."""

from __future__ import annotations

from qlora_train.errors import DataError, Problem

MAX_LISTED = 20


class RowFault(Exception):
    """A row is not what its format asks for; the whole data set is refused, with this among the reasons."""

    def __init__(self, what: str, fix: str) -> None:
        self.what, self.fix = what, fix
        super().__init__(what)


class Rejection(Exception):
    """A well-formed row cannot be trained on with this tokenizer; the row is left out and listed with the reason."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class ProblemList:
    """Keeps the first `MAX_LISTED` problems and counts the rest, so that a million bad rows cost no memory."""

    def __init__(self) -> None:
        self.listed: list[Problem] = []
        self.total = 0

    def add(self, what: str, fix: str, where: str) -> None:
        """Note one problem."""
        self.total += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append(Problem(what, fix, where))

    def raise_if_any(self) -> None:
        """DataError with the listed problems and, where there are several, a last one that gives the total."""
        if not self.total:
            return
        problems = list(self.listed)
        if self.total > 1:
            first = "" if self.total == len(problems) else f"; the first {len(problems)} are listed above"
            problems.append(Problem(f"{self.total:,} problems in all{first}", "mend them and start again"))
        raise DataError(problems)
