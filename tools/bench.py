"""`make bench`: training speed and memory beside TRL, PEFT and the machine's limit, in one run, taking turns.

Contenders train the same rows from the same adapter, each in a process of its own (tools/contenders/). Ratios are of
the best repeats. `--scaling` shows how our own figures grow instead.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

from contenders.job import LEAST_FILL, SETS, Options
from contenders.measure import DEFAULT, EXTRA_REPEATS, Measured, measure
from contenders.results import CONTENDERS, LOSS_TOLERANCE, Result
from contenders.scaling import Point, measure_point, sizes
from rich.console import Console
from rich.table import Table

from qlora_train.environment import environment

MIB = 2**20


@dataclass(frozen=True)
class Column:
    """A heading, and a note under the table where the heading does not say all."""

    heading: str
    note: str = ""


SPEED = (
    Column("contender"),
    Column("tokens/s", f"without padding, the best repeat; ours and the ceiling make {EXTRA_REPEATS} more"),
    Column("supervised/s"),
    Column(
        "ours ÷ it",
        f"the best of equally many repeats; in brackets where losses differ by more than {LOSS_TOLERANCE} nats: "
        "it counts for nothing",
    ),
    Column("w/o head", "tokens/s without the time of output head and loss"),
    Column("ours ÷ it"),
    Column("of matmul rate", "counted FLOPs per second, of what bare bf16 matmuls reach in this run"),
    Column("peak MiB", "resident (on a card: allocated) above the loaded model, in the second step"),
    Column("it ÷ ours"),
    Column("loss gap", "largest difference from our loss at the same step, nats"),
)
COST = (
    Column("contender"),
    Column("base"),
    Column("adapter"),
    Column("attention"),
    Column("head"),
    Column("head/sup.", "of the head, per supervised token; the others are MFLOP per token"),
    Column("dequant.", "dequantisations per 4-bit weight and micro-step"),
    Column("saved", "bytes saved for backward per position and layer, as it is trained"),
    Column("one layer", "bytes per position that a layer saves when nothing is recomputed"),
)


def show(measured: Measured, console: Console) -> None:
    """All tables."""
    threads = sorted(measured.machine_flops_per_s)
    for set_name, step in measured.steps.items():
        tokens, supervised = step["num_tokens"], step["num_supervised"]
        about = f"{set_name}: {step['num_rows']} rows a step, {min(tokens)} to {max(tokens)} tokens"
        for count in threads:
            results = [r for r in measured.results if (r.set_name, r.threads) == (set_name, count)]
            speed = measured.machine_flops_per_s[count] / 1e12
            title = f"{about}, of which {min(supervised)} to {max(supervised)} supervised; {_threads(count)}"
            _print(console, f"{title}; bf16 matmuls {speed:.2f} TFLOP/s", SPEED, [_speed(r, results) for r in results])
        counted = [r for r in measured.results if (r.set_name, r.threads) == (set_name, threads[0])]
        _print(console, f"{set_name}: counted, MFLOP per token and bytes", COST, [_cost(r) for r in counted])
        rows = [[CONTENDERS[r.contender].title, *(f"{loss:.4f}" for loss in r.losses)] for r in counted if r.losses]
        headings = [Column("contender"), *(Column(str(step)) for step in range(1, len(rows[0])))] if rows else []
        _print(console, f"{set_name}: loss of each step, nats per supervised token", headings, rows)
    keys = list(dict.fromkeys(key for settings in measured.settings.values() for key in settings))
    rows = [[CONTENDERS[n].title, *(s.get(key, "") for key in keys)] for n, s in measured.settings.items()]
    _print(console, "settings", [Column("contender"), *(Column(key) for key in keys)], rows)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _speed(result: Result, results: Sequence[Result]) -> list[str]:
    ours = next((r for r in results if r.contender == "ours"), None)
    ratio = body = memory = ""
    if ours is not None and result is not ours:
        ratios = (ours.ratio(result), ours.ratio(result, head=False))
        ratio, body = (f"{times:.2f}" if result.agrees else f"({times:.2f})" for times in ratios)
        memory = f"{result.peak_bytes / ours.peak_bytes:.2f}"
    return [
        CONTENDERS[result.contender].title,
        f"{result.tokens_per_s:.0f}",
        f"{result.supervised_per_s:.0f}" if result.losses else "",
        ratio,
        f"{result.body_tokens_per_s:.0f}",
        body,
        f"{result.matmul_frac:.0%}",
        f"{result.peak_bytes / MIB:.0f}",
        memory,
        "" if result.loss_gap is None or result is ours else f"{result.loss_gap:.4f}",
    ]


def _cost(result: Result) -> list[str]:
    return [
        CONTENDERS[result.contender].title,
        *(f"{flops / 1e6:.1f}" for flops in result.flops_per_token.values()),
        f"{result.head_flops_per_supervised / 1e6:.1f}",
        f"{result.dequantisations:.2f}",
        f"{result.saved_bytes:,.0f}",
        f"{result.layer_saved_bytes:,.0f}",
    ]


def _print(console: Console, title: str, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    console.print(title, style="bold", highlight=False, soft_wrap=True)
    table = Table()
    for place, column in enumerate(columns):
        table.add_column(column.heading, justify="right" if place and len(columns) > 8 else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for column in columns:
        if column.note:
            console.print(f"  {column.heading}: {column.note}", style="dim", highlight=False)
    console.print()


def show_scaling(points: Sequence[Point], threads: int, console: Console) -> None:
    """Speed and memory against the size."""
    columns = [Column(name) for name in ("row tokens", "r", "vocabulary", "tokens/s", "peak MiB", "predicted")]
    columns.append(Column("measured ÷ predicted", "prediction: tools/contenders/scaling.py"))
    rows = [
        [
            *(f"{size:,}" for size in (point.row_tokens, point.r, point.vocabulary)),
            f"{point.tokens_per_s:.0f}",
            f"{point.peak_bytes / MIB:.0f}",
            f"{point.predicted_bytes / MIB:.0f}",
            f"{point.ratio:.2f}",
        ]
        for point in points
    ]
    _print(console, f"ours, one row a step, full checkpointing, {_threads(threads)}", columns, rows)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", type=Path, help="a folder in place of the quickstart's model: tools/make_model.py")
    parser.add_argument("--threads", help="numbers of threads, separated by commas; default: 1,2 on a CPU")
    parser.add_argument("--sets", default=",".join(SETS), help=f"of {', '.join(SETS)}")
    parser.add_argument("--contenders", default=",".join(DEFAULT), help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument(
        "--seq-len", type=int, default=Options.seq_len, help=f"tokens of a pack, filled to {LEAST_FILL:.0%}% or more"
    )
    parser.add_argument("--rows", type=int, help="rows of a step, a multiple of 8; default: as fill a pack")
    parser.add_argument("--repeats", type=int, default=2, help="timed steps of each number of threads")
    parser.add_argument("--scaling", action="store_true", help="grow rows, rank and vocabulary, ours only")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parsed = parser.parse_args(arguments)
    for key, known in (("sets", SETS), ("contenders", tuple(CONTENDERS))):
        setattr(parsed, key, tuple(getattr(parsed, key).split(",")))
        if unknown := [name for name in getattr(parsed, key) if name not in known]:
            parser.error(f"--{key}: {unknown[0]!r} is none of {', '.join(known)}")
    try:
        said = parsed.threads or ("1,2" if parsed.device == "cpu" else "1")
        parsed.threads = tuple(int(text) for text in said.split(","))
    except ValueError:
        parser.error(f"--threads: {parsed.threads!r} is no list of numbers")
    if min(parsed.threads) < 1 or parsed.repeats < 1 or parsed.seq_len < 64:
        parser.error("--threads and --repeats begin at 1, --seq-len at 64")
    if parsed.scaling and (parsed.device != "cpu" or parsed.model):
        parser.error("--scaling is for the quickstart's model on a CPU")
    return parsed


def main() -> int:
    """0 when all was measured."""
    arguments = parse(sys.argv[1:])
    console = Console(width=None if sys.stdout.isatty() else 160)
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:5.0f} s  {text}", file=sys.stderr, flush=True)

    if arguments.scaling:
        points = []
        for row_tokens, r, vocabulary in sizes():
            say(f"rows of {row_tokens} tokens, r {r}, vocabulary {vocabulary}")
            points.append(measure_point(row_tokens, r, vocabulary, arguments.threads[0]))
        show_scaling(points, arguments.threads[0], console)
        figures: object = [asdict(point) for point in points]
    else:
        measured = measure(
            Options(
                seq_len=arguments.seq_len,
                rows=arguments.rows,
                device=arguments.device,
                model=str(arguments.model.resolve()) if arguments.model else None,
            ),
            contenders=arguments.contenders,
            sets=arguments.sets,
            threads=arguments.threads,
            repeats=arguments.repeats,
            say=say,
        )
        show(measured, console)
        figures = {
            "command": shlex.join(["tools/bench.py", *sys.argv[1:]]),
            "machine": environment(),
            **asdict(measured),
        }
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, ValueError) as error:  # a contender died, or rows that cannot be had; both say what and why
        sys.exit(f"bench: {error}")
