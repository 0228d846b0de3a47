"""`python -m contenders.worker NAME OPTIONS`: one contender in a process of its own, loads and makes steps on command.

Commands and answers are JSON lines over standard input and output. It waits in a read, so it takes no time of others.
"""

from __future__ import annotations

import os

# The offline hub, and no bars or advice between the lines of a table.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(TRANSFORMERS_VERBOSITY="error", DATASETS_VERBOSITY="error", PYTHONWARNINGS="ignore")

import importlib
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from contenders.counting import HeadClock, Meter, StepCounter
from contenders.job import Options, Rows, load_rows


@dataclass(frozen=True)
class Loaded:
    """A contender that is ready. `train(rows, turns)` makes all steps of a set, from the start adapter."""

    model: Any  # with its adapter
    decoder: Any
    settings: dict[str, str]  # what a reader must know to judge the comparison
    train: Callable[[Rows, Turns], None]
    num_micro_batches: Callable[[Rows], int]  # of a step


class Turns:
    """Hands out the turns: `begin` waits for the command to make a step, `end` answers what it took."""

    def __init__(self, commands: TextIO, answers: TextIO, loaded: Loaded, meter: Meter) -> None:
        self._commands, self._answers = commands, answers
        self._loaded, self._head, self._meter = loaded, HeadClock(meter), meter
        self._head.watch(loaded.decoder)
        self._counter: StepCounter | None = None
        self._started = 0.0
        self._facts: dict[str, Any] | None = None

    def open(self, facts: dict[str, Any]) -> None:
        """A new set: say so when its first step can begin."""
        self._facts = facts

    def begin(self) -> None:
        """Wait; then the clock runs."""
        import torch

        if self._facts is not None:
            self.send(self._facts)
            self._facts = None
        command = self.receive()
        torch.set_num_threads(command["threads"])
        if command["count"]:
            shapes = set(_linear_shapes(self._loaded.decoder))
            self._counter = StepCounter(self._loaded.model, self._loaded.decoder, shapes)
            self._counter.start()
        if command["settle"]:
            self._meter.settle()
        self._meter.reset()
        self._head.seconds = 0.0
        self._started = self._meter.now()

    def end(self, loss: float | None) -> None:
        """Answer with the step's loss in nats per supervised token, None where there is none."""
        seconds = self._meter.now() - self._started
        peak_bytes = self._meter.peak()
        counts = None
        if self._counter is not None:
            counts, self._counter = asdict(self._counter.stop()), None
        head_s = self._head.seconds
        self.send({"loss": loss, "seconds": seconds, "head_s": head_s, "peak_bytes": peak_bytes, "counts": counts})

    def receive(self) -> dict[str, Any]:
        """The next command; leaves the process when there is none."""
        line = self._commands.readline()
        if not line:
            raise SystemExit(0)
        command: dict[str, Any] = json.loads(line)
        return command

    def send(self, answer: dict[str, Any]) -> None:
        """One line."""
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()


def _linear_shapes(module: Any) -> list[tuple[int, int]]:
    """(out, in) of the linear layers below a module, adapters apart."""
    linears = (m for name, m in module.named_modules() if name.endswith("_proj"))
    return [(linear.out_features, linear.in_features) for linear in linears]


def serve(name: str, options: Options, commands: TextIO, answers: TextIO) -> None:
    """Load a contender, say so, and train the sets that are named, step by step."""
    module, _, variant = name.partition(":")
    loaded: Loaded = importlib.import_module(f"contenders.{module}").load(options, variant)
    for parameter in loaded.model.parameters():
        parameter.detach().clone()  # every page of the weights is resident from now on
    meter = Meter(options.device)
    meter.settle()
    turns = Turns(commands, answers, loaded, meter)
    turns.send(
        {
            "settings": loaded.settings,
            "loaded_bytes": meter.in_use(),
            "num_quantised": sum(hasattr(parameter, "quant_state") for parameter in loaded.model.parameters()),
            "num_layers": len(loaded.decoder.layers),
            "layer_shapes": _linear_shapes(loaded.decoder.layers[0]),
        }
    )
    while True:
        command = turns.receive()
        rows = load_rows(command["set"], options, command["num_steps"])
        turns.open(
            {
                "num_tokens": [int(rows.table.lengths[list(step)].sum()) for step in rows.steps],
                "num_supervised": [int(rows.table.num_supervised[list(step)].sum()) for step in rows.steps],
                "num_rows": len(rows.steps[0]),
                "num_micro_batches": loaded.num_micro_batches(rows),
            }
        )
        loaded.train(rows, turns)
        meter.settle()
        turns.send({"finished": True})


def main() -> None:
    """Keep the answers' pipe to ourselves: whatever a library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        os.chdir(folder)
        serve(sys.argv[1], Options(**json.loads(sys.argv[2])), sys.stdin, answers)


if __name__ == "__main__":
    main()
