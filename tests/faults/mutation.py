"""Seeded damage to bytes and to JSON, and the limits that whoever reads them must keep."""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_train.errors import UserError

MAX_SECONDS, MAX_BYTES = 2.0, 500 * 2**20
LONG_S = 60.0  # of the long form of a target
# Pieces of the formats, and what their readers stumble over.
PIECES = (
    *(b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\", b"\n", b"\r", b"\t", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"'"),
    *(
        b"&a ",
        b"*a",
        b"<<: ",
        b"!!python/object/apply:os.system ",
        b"---\n",
        b"%YAML 9.9\n",
        b"# ",
        b"| ",
        b"? ",
        b"- ",
    ),
    *(b"NaN", b"-Infinity", b"1e999", b"-1", b"0", b"null", b"true", b"18446744073709551616", b"9" * 5000, b"\\ud800"),
    *(b"[" * 3000, b'{"a":' * 3000, b"../", b"/dev/zero", b"\x1b[2J", b"\xe2\x80\xae", b"x" * 5000),
)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "x"),
    *("../x", "/etc/passwd", "\0", "\x1b[2J", "\ud800", "x" * 10_000, [], {}, [[]], [None], {"": ""}, ["a"] * 1000),
    *({"a": {"b": {"c": [1, 2, {"d": "e"}]}}}, [[[[[[[[]]]]]]]], {"__class__": "os.system"}, "all-linear", "(a+)+$"),
)


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """One to four changes: bits, pieces put in, stretches cut, doubled or moved, the end cut off."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        length = min(int(rng.paretovariate(0.7)), len(data) - at)
        match rng.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at:at] = rng.choice(PIECES)
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length]
            case 4:
                other = rng.randrange(len(data) + 1)
                data[at : at + length] = data[other : other + length]
            case 5 if rng.random() < 0.3:
                del data[at:]
    return bytes(data)


def damaged_json(value: Any, rng: random.Random) -> Any:
    """One to four changes: values for odd ones, keys dropped, renamed or added."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 4)):
        parent, key = _place(value, rng)
        if parent is None:
            return rng.choice(ODD_VALUES)
        match rng.randrange(4):
            case 0 | 1:
                parent[key] = copy.deepcopy(rng.choice(ODD_VALUES))
            case 2:
                del parent[key]
            case 3 if isinstance(parent, dict):
                parent[key + rng.choice(("x", " ", "\x1b", "_A"))] = parent.pop(key)
    return value


def _place(value: Any, rng: random.Random) -> tuple[Any, Any]:
    """A container at any depth and a key of it; (None, None) where the value holds nothing."""
    places = []
    stack = [value]
    while stack:
        here = stack.pop()
        if isinstance(here, dict | list) and here:
            keys = list(here) if isinstance(here, dict) else list(range(len(here)))
            places += [(here, key) for key in keys]
            stack += [here[key] for key in keys]
    return rng.choice(places) if places else (None, None)


def dumps(value: Any) -> bytes:
    """JSON as an attacker writes it: lone surrogates and all."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def hold(read: Callable[[random.Random], object], *, count: int | None, seed: int = 0) -> int:
    """Let `read` damage and read with `count` seeds, or for LONG_S; how many it read without an error.

    Any other error than ours, a read of more than MAX_SECONDS, or memory above MAX_BYTES fails with the seed.
    """
    sound, number, started = 0, 0, time.monotonic()
    before = _reset_peak()
    while number < count if count is not None else time.monotonic() - started < LONG_S:
        began = time.process_time()
        try:
            read(random.Random(f"{seed} {number}"))
            sound += 1
        except UserError as error:
            assert all(problem.what and problem.fix for problem in error.problems), f"seed {number}: {error}"
        except BaseException as error:
            raise AssertionError(f"seed {number}: {type(error).__name__}: {error}") from error
        seconds = time.process_time() - began
        assert seconds < MAX_SECONDS, f"seed {number} took {seconds:.1f} s"
        number += 1
    if before is not None:
        grown = _status_bytes("VmHWM") - before
        assert grown < MAX_BYTES, f"memory grew by {grown / 2**20:,.0f} MiB in one of {number} seeds"
    return sound


def _reset_peak() -> int | None:
    """Let the kernel measure this process's peak anew; what it holds now. None where the kernel does not."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
