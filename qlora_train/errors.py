"""The few kinds of user error, each with its exit code. Anything else is our bug and keeps its traceback."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

# What torch 2.15 (CUDA, CPU, cuBLAS) and the C++ library say when memory is short.
_NO_MEMORY = re.compile(
    r"out of memory|not enough memory|can(no|')t allocate memory|bad_alloc|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
_REQUEST = re.compile(r"(?:tried to|unable to) allocate ([\d.]+) (bytes|[KMGT]iB)|malloc of size ([\d.]+) failed", re.I)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


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


class OutOfMemory(MachineError):
    """A plan does not fit into the memory there is, or the memory ran out: other settings may do."""

    kind, exit_code = "memory", 9


class NumericsError(UserError):
    """The training produced a number that is not finite."""

    kind, exit_code = "numerics", 7


class SecurityError(UserError):
    """Something untrusted asked for more than it may have."""

    kind, exit_code = "security", 8


class Collected:
    """Errors of checks that do not depend on each other, raised as one. Each check runs in a block of its own.

    >>> collected = Collected()
    >>> with collected:
    ...     raise DataError("no rows", fix="add some")
    >>> with collected:
    ...     raise ModelError("no model", fix="name one")
    >>> collected.raise_if_any()
    Traceback (most recent call last):
    qlora_train.errors.DataError: error[data] no rows. Fix: add some
    error[data] no model. Fix: name one
    """

    def __init__(self) -> None:
        self._errors: list[UserError] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if isinstance(error, UserError):
            self._errors.append(error)
            return True
        return False

    def raise_if_any(self) -> None:
        """The first error, with the problems of all; its kind decides the exit code."""
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            raise type(self._errors[0])([problem for error in self._errors for problem in error.problems])


class Interrupted(BaseException):
    """A signal ended the run after its state was saved; the process ends with 128 + the signal's number.

    No Exception, as KeyboardInterrupt is none: no library that catches all errors may swallow it.
    """

    def __init__(self, signal_number: int, saved: str) -> None:
        self.exit_code = 128 + signal_number
        super().__init__(saved)


def first_line(error: BaseException) -> str:
    """What an error says, in one line, or its kind where it says nothing.

    >>> first_line(ValueError("no such file\\nand more")), first_line(ValueError())
    ('no such file', 'ValueError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch, numpy, Arrow or the system says that memory, of a card or the host, ran out.

    >>> is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."))
    True
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        # torch.OutOfMemoryError is a RuntimeError; torch is not imported here.
        named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
        return named or _NO_MEMORY.search(str(error)) is not None
    return isinstance(error, MemoryError)


def requested_bytes(message: str) -> int | None:
    """The size of the request that failed, where the message of an out-of-memory error tells it.

    >>> requested_bytes("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 23.6 GiB ...")
    1610612736
    >>> requested_bytes("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.")
    4096
    """
    found = _REQUEST.search(message)
    if found is None:
        return None
    number, unit = found.group(1) or found.group(3), (found.group(2) or "bytes").lower()
    return int(float(number) * _UNITS[unit])
