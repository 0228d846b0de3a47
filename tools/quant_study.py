"""What 4 bits cost, in the form of the QLoRA paper's study: perplexity by code, and NF4 against bf16 after LoRA.

Without training the real model's linear layers are rounded by each code and measured on held-out rows; then LoRA is
trained on NF4 and on bf16 with two seeds each (runs of the comparison's ledger, made where they are missing).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from rich.console import Console
from rich.table import Table

from qlora_train.errors import Interrupted

FIGURES = Path(__file__).resolve().parent / "figures" / "quant.json"
# (better, worse) by the paper: NF4, FP4, INT4 in this order; double quantisation at no loss.
PAIRS = (("nf4", "fp4"), ("fp4", "int4"), ("nf4", "int4"), ("nf4", "nf4_dq"))
SAMPLE_ROWS = 8
ABOUT_THE_MODEL = (
    "The only real model here came from a Q4_1 file: 16 even steps between the least and the greatest of 32 weights. "
    "On that grid an affine INT4 code with groups of 32 is lossless by construction, but for bfloat16's rounding; its "
    "row says nothing of other models. The errors on Gaussian and heavy-tailed weights stand beside it for that."
)


@dataclass(frozen=True)
class Study:
    """All figures, as plain data."""

    sets: dict[str, dict[str, Any]]  # set -> code -> loss, perplexity, above_bf16, standard_error
    pairs: list[dict[str, Any]]  # of the paper's order on a set: difference of loss and standard error
    errors: dict[str, dict[str, float]]  # weights -> code -> relative error
    loader_gap: float  # between the rounded dense model and the 4-bit layers, nats
    trained: dict[str, list[float]]  # base -> held-out loss of each seed


def measure_codes(max_rows: int | None, shared: Iterable[str] = (), say: Any = print) -> dict[str, Any]:
    """Losses by set and code, the paired differences, relative errors of weights, and the gap to the 4-bit layers."""
    from comparing.codes import CODES, relative_error, synthetic_weights
    from comparing.pages import TITLES
    from comparing.perplexity import load_held_out, quantised_loss, round_by_code

    held_out = load_held_out(max_rows, shared)
    found: dict[str, dict[str, Any]] = {name: {} for name in held_out.batches}
    model_errors = {}
    for rounded in round_by_code(held_out):
        model_errors[rounded.code] = rounded.error
        for name, losses in rounded.losses.items():
            found[name][rounded.code] = losses
            say(f"{TITLES[rounded.code]}, {name}: perplexity {losses.perplexity:.3f}")
    sets: dict[str, dict[str, Any]] = {}
    pairs: list[dict[str, Any]] = []
    for name, by_code in found.items():
        sets[name] = {}
        for code, losses in by_code.items():
            above, error = losses.above(by_code["bf16"])
            sets[name][code] = {
                "loss": losses.loss,
                "perplexity": losses.perplexity,
                "above_bf16": above,
                "standard_error": error,
            }
        for better, worse in PAIRS:
            difference, error = by_code[worse].above(by_code[better])
            pairs.append(
                {"set": name, "better": better, "worse": worse, "difference": difference, "standard_error": error}
            )
    codes = [code for code in CODES if code != "bf16"]
    errors = {
        name: {code: relative_error(weight, code) for code in codes} for name, weight in synthetic_weights().items()
    }
    errors["the model's"] = {code: model_errors[code] for code in codes}
    name = next(iter(found))
    gap = abs(quantised_loss(held_out, name, "nf4", double_quant=True) - found[name]["nf4_dq"].loss)
    return {"sets": sets, "pairs": pairs, "errors": errors, "loader_gap": gap}


def measure_training(sample: bool, *, threads: int, shared: Iterable[str] = (), say: Any = print) -> dict[str, Any]:
    """Held-out losses after LoRA on NF4 and on bf16, both seeds, at the recipe's rate."""
    from dataclasses import replace

    from comparing.entrants import BF16, REFERENCE, entrants
    from comparing.ledger import KEPT, Ledger
    from comparing.sweep import Sweep
    from comparing.trial import FULL, SAMPLE, WORK

    scale = replace(SAMPLE, seeds=FULL.seeds) if sample else FULL
    ledger = Ledger(WORK / "ledger.jsonl", kept=KEPT)
    sweep = Sweep(ledger, scale, threads=threads, limit_s=600, say=say, shared=tuple(shared))
    trained: dict[str, list[float]] = {}
    for base, name in (("nf4", REFERENCE), ("bf16", BF16)):
        entrant = entrants()[name]
        for seed in scale.seeds:
            entry = sweep.run(sweep.trial("final", entrant, entrant.first_rate, seed))
            if entry is None or entry.result is None:
                sys.exit(f"quant_study: LoRA on {base} with seed {seed}: {entry.failed if entry else 'not made'}")
            trained.setdefault(base, []).append(float(entry.result["loss"]))
    return {"trained": trained}


def show(study: Study, console: Console) -> None:
    """The tables, each with what it says."""
    from comparing.pages import TITLES, gap_and_spread

    table = Table(title="Held-out perplexity without training; in brackets nats above bf16 ± standard error by rows")
    for heading in ("code", *study.sets):
        table.add_column(heading)
    for code in TITLES:
        cells = []
        for by_code in study.sets.values():
            figure = by_code[code]
            above = f" (+{figure['above_bf16']:.4f} ± {figure['standard_error']:.4f})" if code != "bf16" else ""
            cells.append(f"{figure['perplexity']:.3f}{above}".replace("+-", "-"))
        table.add_row(TITLES[code], *cells)
    console.print(table)
    for pair in study.pairs:
        console.print(f"  {pair_text(pair)}", highlight=False)
    errors = Table(title="Relative error of weights, ||W - W'|| / ||W||")
    errors.add_column("weights")
    for code in TITLES:
        if code != "bf16":
            errors.add_column(TITLES[code])
    for name, by_code in study.errors.items():
        errors.add_row(name, *(f"{value:.4f}" for value in by_code.values()))
    console.print(errors)
    console.print(f"  {ABOUT_THE_MODEL}", highlight=False)
    console.print(f"  NF4's 4-bit layers differ from the rounded model by {study.loader_gap:.1e} nats", highlight=False)
    if study.trained:
        for base, losses in study.trained.items():
            console.print(f"LoRA on {base}: held-out loss {', '.join(f'{loss:.4f}' for loss in losses)}")
        gap, spread = gap_and_spread(study.trained)
        console.print(f"  NF4 above bf16: {gap:+.4f} nats; between seeds: {spread:.4f}", highlight=False)


def pair_text(pair: dict[str, Any]) -> str:
    """A difference in words: told apart from noise by two standard errors, or not."""
    from comparing.pages import TITLES, told_apart

    worse, better = TITLES[pair["worse"]], TITLES[pair["better"]]
    verdict = "" if told_apart(pair) else ": not told apart"
    return f"{pair['set']}: {worse} is {pair['difference']:+.4f} ± {pair['standard_error']:.4f} above {better}{verdict}"


def _is_part(arguments: argparse.Namespace) -> bool:
    """Whether this is less than the whole study, which alone writes the figures of the pages."""
    return bool(arguments.sample or arguments.shared or arguments.no_training or arguments.rows)


def main() -> int:
    """0 when all was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", action="store_true", help=f"minutes: {SAMPLE_ROWS} rows of each set, few steps")
    parser.add_argument("--rows", type=int, help="held-out rows of each set for the codes; default: all")
    parser.add_argument("--no-training", action="store_true", help="the codes alone")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help=f"where the figures go; of the whole: tools/figures/{FIGURES.name}")
    parser.add_argument("shared", nargs="*", metavar="KEY=VALUE", help="recipe keys for every run, e.g. model.path=...")
    arguments = parser.parse_intermixed_args()
    import torch

    torch.set_num_threads(arguments.threads)
    console = Console(width=None if sys.stdout.isatty() else 160)
    found = measure_codes(arguments.rows or (SAMPLE_ROWS if arguments.sample else None), arguments.shared)
    trained: dict[str, Any] = {"trained": {}}
    if not arguments.no_training:
        trained = measure_training(arguments.sample, threads=arguments.threads, shared=arguments.shared)
    study = Study(**found, **trained)
    show(study, console)
    target = arguments.json or (None if _is_part(arguments) else FIGURES)
    if target is not None:
        from qlora_train.environment import environment

        report = {**study.__dict__, "sample": arguments.sample, "machine": environment()}
        target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, Interrupted):
        sys.exit("stopped; the runs that were finished are kept: start it again to go on")
