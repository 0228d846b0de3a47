"""What is wrong with rows, and with the files that hold them."""

from __future__ import annotations

from dataclasses import replace

from qlora_train.errors import DataError, ModelError, Problem, UserError

MAX_LISTED = 20
_SHOWN_PLACES = 4  # of problems of the same words


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
    """Keeps the first `MAX_LISTED` kinds of problem and counts the rest, so that a million bad rows cost no memory.

    Problems of the same words are one kind. `fix` is what to do about all of them; `otherwise`, what may be done
    instead.
    """

    def __init__(self, fix: str, otherwise: str = "") -> None:
        self._fix, self._otherwise = fix, otherwise
        self._places: dict[tuple[str, str], list[str]] = {}  # of each kind the first
        self._counts: dict[tuple[str, str], int] = {}
        self._total = 0
        self._error: type[UserError] = DataError

    def add(self, what: str, fix: str, where: str, error: type[UserError] = DataError) -> None:
        """Note one problem."""
        self._error = self._error if self._total else error
        self._total += 1
        kind = what, fix
        if kind not in self._places and len(self._places) == MAX_LISTED:
            return
        places = self._places.setdefault(kind, [])
        if len(places) < _SHOWN_PLACES:
            places.append(where)
        self._counts[kind] = self._counts.get(kind, 0) + 1

    def raise_if_any(self) -> None:
        """The first problem's error with all kinds and, where there are several, a last one with the total."""
        if not self._total:
            return
        problems = [self._problem(kind) for kind in self._places]
        also = f"; or {self._otherwise}" if self._otherwise else ""
        if len(problems) == 1:
            problems[0] = replace(problems[0], fix=problems[0].fix + also)
        else:
            num_listed = sum(self._counts.values())
            first = "" if self._total == num_listed else f"; the first {len(problems)} kinds are listed above"
            problems.append(Problem(f"{self._total:,} problems in all{first}", self._fix + also))
        raise self._error(problems)

    def _problem(self, kind: tuple[str, str]) -> Problem:
        (what, fix), places = kind, self._places[kind]
        more = self._counts[kind] - 1
        if more:
            what += f" (and so in {more:,} more: {', '.join(places[1:])}{', ...' if more >= _SHOWN_PLACES else ''})"
        return Problem(what, fix, places[0])
