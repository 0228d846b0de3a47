"""Speed and memory beside TRL, PEFT and the machine's limit, in one run; and that the fast paths compute the same.

Ratios count where the losses of both sides agree at every step; else they are NaN, which meets no bar. The ceiling has
no output head: where every token is supervised (text_jargon), the head's matmuls alone are a quarter of the ceiling's,
and the bar holds without them.
"""

from __future__ import annotations

from pathlib import Path

from contenders.job import SETS, Options
from contenders.measure import Measured
from contenders.measure import measure as run_contenders
from contenders.results import Result

from proofs.common import ROOT, Bar, tests_pass

SEQ_LEN, LOSS_STEPS, LOSS_TOKENS = 1024, 50, 96
# (contender, bar, aim): how many times as fast as it ours must be, and is meant to become.
PEERS = (("trl_padded", 3.0, 5.0), ("trl_packed", 2.0, 3.0), ("peft_loop", 1.5, 2.0), ("ours_bf16", 0.9, None))
LOSS_BAR = 1e-5  # in float32, relative, at any of the steps
TESTS = {
    "fused and plain paths, checkpointing and compiled layers": [
        f"tests/numerics/test_{name}.py" for name in ("fused_linear", "loss", "gradients", "checkpointing", "compiling")
    ]
}


def measure(full: bool) -> list[Bar]:
    """All bars of speed and memory. The long form: one thread besides two, and more repeats."""
    contenders = ["ours", *(name for name, _, _ in PEERS), "ours_none", "ceiling", *(["ours_eager"] if full else [])]
    measured = run_contenders(
        Options(seq_len=SEQ_LEN),
        contenders=contenders,
        threads=(2, 1) if full else (2,),
        repeats=3 if full else 2,
        say=lambda text: print(text, flush=True),
    )
    bars = []
    for threads in measured.machine_flops_per_s:
        for set_name in SETS:
            bars += _speed(measured, set_name, threads)
    for set_name in SETS:
        bars += [*_memory(measured, set_name), *_counted(measured, set_name)]
    return [*bars, *_losses(), *tests_pass(TESTS)]


def _speed(measured: Measured, set_name: str, threads: int) -> list[Bar]:
    ours = measured.of("ours", set_name, threads)
    where = f"{set_name}, {threads} thread{'s' if threads > 1 else ''}"
    bars = [
        Bar(f"{where}: ours", ours.tokens_per_s, "tokens/s"),
        Bar(f"{where}: ours, of the machine's rate of bf16 matmuls", ours.matmul_frac, note="aim 0.5"),
    ]
    for name, bar, aim in PEERS:
        peer = measured.of(name, set_name, threads)
        note = f"without the head {_ratio(ours, peer, head=False):.2f}" + (f"; aim {aim:g}" if aim else "")
        bars.append(Bar(f"{where}: ours to {name}", _ratio(ours, peer), "times", at_least=bar, note=note))
    none, ceiling = measured.of("ours_none", set_name, threads), measured.of("ceiling", set_name, threads)
    what, note = f"{where}: without checkpointing, to the ceiling", "the ceiling has no head"
    bars += [
        Bar(what, _ratio(none, ceiling), "times", at_least=0.8 if set_name == "shell" else None, note=note),
        Bar(f"{what}, without the head", _ratio(none, ceiling, head=False), "times", at_least=0.8),
    ]
    if any(result.contender == "ours_eager" for result in measured.results):
        eager = measured.of("ours_eager", set_name, threads)
        bars.append(Bar(f"{where}: ours to itself not compiled", _ratio(ours, eager), "times"))
    return bars


def _ratio(one: Result, other: Result, *, head: bool = True) -> float:
    if not (one.agrees and other.agrees):
        return float("nan")
    return one.ratio(other, head=head)


def _memory(measured: Measured, set_name: str) -> list[Bar]:
    """Resident above the loaded model. TRL's packed mode has our tokens in a micro-step; its padded mode has more."""
    threads = next(iter(measured.machine_flops_per_s))
    ours, packed, padded = (measured.of(name, set_name, threads) for name in ("ours", "trl_packed", "trl_padded"))
    return [
        Bar(f"{set_name}: ours, memory above the model", ours.peak_bytes / 2**20, "MiB"),
        Bar(
            f"{set_name}: our memory to TRL's at equal tokens",
            ours.peak_bytes / packed.peak_bytes,
            "times",
            at_most=1 / 3,
            note=f"to its padded mode {ours.peak_bytes / padded.peak_bytes:.2f}",
        ),
    ]


def _counted(measured: Measured, set_name: str) -> list[Bar]:
    """What no machine's noise touches."""
    ours = measured.of("ours", set_name, next(iter(measured.machine_flops_per_s)))
    sizes = [num_out * num_in for num_out, num_in in measured.layer_shapes]
    down = sizes[-1] / sum(sizes)  # the last projection of a block
    base = (6 - 2 * down) * sum(sizes) * measured.num_layers
    hidden = measured.layer_shapes[0][1]
    # The last layer keeps its activations: what the others save is what remains.
    recomputed = (ours.saved_bytes * measured.num_layers - ours.layer_saved_bytes) / (measured.num_layers - 1)
    skinny = 2 * Options().r * len(sizes)
    head = 4 * _head_size()
    return [
        Bar(f"{set_name}: dequantisations per weight and step", ours.dequantisations, at_most=2),
        Bar(f"{set_name}: base matmuls", ours.flops_per_token["base"] / 1e6, "MFLOP/token", at_most=base / 1e6),
        Bar(
            f"{set_name}: output head",
            ours.head_flops_per_supervised / 1e6,
            "MFLOP/supervised token",
            at_most=head / 1e6 * 1.001,
        ),
        Bar(f"{set_name}: saved by a recomputed layer", recomputed, "bytes/token", at_most=2 * hidden + skinny),
    ]


def _head_size() -> int:
    """V H of the quickstart's model."""
    from qlora_train.model.skeleton import load_config
    from qlora_train.model.source import resolve_source
    from qlora_train.recipe.load import load_recipe

    config = load_config(resolve_source(load_recipe(ROOT / "recipes" / "quickstart.yaml", ()).recipe.model))
    return int(config.vocab_size * config.hidden_size)


def _losses() -> list[Bar]:
    """Trainings of the real model on the same rows, fused and plain. In bfloat16 the fused path may be as far from the
    plain one as that is from float32."""
    exact, exact_fused = (_train("float32", fused=fused) for fused in (False, True))
    rounded, rounded_fused = (_train("bfloat16", fused=fused) for fused in (False, True))
    what = f"{LOSS_STEPS} steps: loss of the fused path to the plain one"
    note = f"{exact[0]:.3f} to {exact[-1]:.3f} nats"
    return [
        Bar(f"{what}, float32", _gap(exact_fused, exact), "relative", at_most=LOSS_BAR, note=note),
        Bar(f"{what}, bfloat16", _gap(rounded_fused, rounded), "relative", at_most=_gap(rounded, exact)),
    ]


def _gap(losses: list[float], others: list[float]) -> float:
    return max(abs(one - other) / other for one, other in zip(losses, others, strict=True))


def _train(dtype: str, *, fused: bool) -> list[float]:
    from qlora_train.artifacts.layout import RunDir
    from qlora_train.recipe.load import load_recipe
    from qlora_train.train.metrics import Silent
    from qlora_train.train.setup import prepare
    from qlora_train.train.step import train_step

    said = {
        "model.compute_dtype": dtype,
        "data.seq_len": LOSS_TOKENS,
        "data.max_lost_frac": 1,
        "data.eval": "[]",
        "train.checkpointing": "none",
        "train.fused": str(fused).lower(),
        "train.resident_layers": "auto",  # the same bits as dequantising, sooner
        "train.compile": "false",
        "train.max_steps": LOSS_STEPS,
    }
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", [f"{key}={value}" for key, value in said.items()]).recipe
    job = prepare(recipe, RunDir(Path("unused")), Silent()).job
    job.model.train()
    print(f"{LOSS_STEPS} steps in {dtype}, {'fused' if fused else 'plain'}", flush=True)
    return [
        train_step(
            job.causal,
            job.loader.step(step),
            job.optimizer,
            job.accelerator,
            seed=0,
            step=step,
            learning_rate=2e-4,
            max_grad_norm=1.0,
        ).loss
        for step in range(LOSS_STEPS)
    ]
