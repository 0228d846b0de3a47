"""What is wrong with rows, and with the files that hold them."""

from __future__ import annotations

from qlora_train.errors import DataError, ModelError, Problem, UserError

MAX_LISTED = 20


class RowFault(Exception):
    """One row cannot be trained on. `data.bad_rows` says whether that ends the run or only leaves the row out."""

    error: type[UserError] = DataError  # what it becomes where it ends the run

    def __init__(self, what: str, fix: str) -> None:
        self.what, self.fix = what, fix
        super().__init__(what)


class TemplateFault(RowFault):
    """The chat template fails on a row."""

    error = ModelError


class SourceFault(Exception):
    """A whole file or folder cannot be read as rows, whatever `data.bad_rows` says."""

    def __init__(self, what: str, fix: str) -> None:
        self.what, self.fix = what, fix
        super().__init__(what)


class ProblemList:
    """Keeps the first `MAX_LISTED` problems and counts the rest, so that a million bad rows cost no memory.

    `fix` is what to do about all of them.
    """

    def __init__(self, fix: str) -> None:
        self._fix = fix
        self.listed: list[Problem] = []
        self.total = 0
        self._error: type[UserError] = DataError

    def add(self, what: str, fix: str, where: str, error: type[UserError] = DataError) -> None:
        """Note one problem."""
        self._error = self._error if self.total else error
        self.total += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append(Problem(what, fix, where))

    def raise_if_any(self) -> None:
        """The first problem's error with all listed ones and, where there are several, a last one with the total."""
        if not self.total:
            return
        problems = list(self.listed)
        if self.total > 1:
            first = "" if self.total == len(problems) else f"; the first {len(problems)} are listed above"
            problems.append(Problem(f"{self.total:,} problems in all{first}", self._fix))
        raise self._error(problems)
