"""`check --deep`: what training relies on, measured on the user's own model, rows and recipe. Nothing is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from qlora_train.adapters.attach import split_parameter_name
from qlora_train.adapters.forms.base import layer_tensors
from qlora_train.adapters.layers import adapted_layers
from qlora_train.adapters.module_names import is_named
from qlora_train.adapters.tokens import token_layers
from qlora_train.artifacts.layout import RunDir
from qlora_train.data.encode import Encoder
from qlora_train.data.fates import CODE
from qlora_train.data.loader import MicroBatch, collate
from qlora_train.data.parity import MAX_ROWS, golden_prompts, parity_fault
from qlora_train.data.split import Split
from qlora_train.data.table import TokenRow, TokenTable
from qlora_train.errors import ModelError, Problem
from qlora_train.model.checkpointing import decoder_layers
from qlora_train.model.load import memory_advice, with_end_tokens
from qlora_train.model.skeleton import head_name, linear_layers
from qlora_train.model.table import dtype_table
from qlora_train.names import PEFT_PREFIX, TOKEN_ROWS
from qlora_train.quant.fingerprint import BasePrint, print_base
from qlora_train.recipe.methods import METHODS
from qlora_train.recipe.schema import QuantSection, Recipe
from qlora_train.train.job import Job
from qlora_train.train.metrics import Silent
from qlora_train.train.optim import build_optimizer, trainable_parameters
from qlora_train.train.selfcheck import compare_rows, has_experts
from qlora_train.train.setup import Inputs, Prepared, prepare
from qlora_train.train.step import accumulate_gradients, train_step

MAX_ROW_TOKENS = 340  # of each of the three rows that gradients are taken of: a thousand tokens in all
MAX_END_ROWS = 256
NAMED = 4
# Relative, of a mean loss, and of a gradient of all adapter parameters together, whose terms are added up in another
# order. In bfloat16 on SmolLM2 0 to 0.5 % and 1 to 5 % were measured; means of micro-batch means are off by 6 to 57 %
# and by 37 to 240 % there.
RELATIVE_LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15}


@dataclass(frozen=True)
class Finding:
    """One check: what was measured and what it must be. `fix` says what to do where it is not."""

    what: str
    measured: str
    bar: str
    ok: bool
    fix: str


def deep_check(recipe: Recipe) -> tuple[Inputs, tuple[Finding, ...]]:
    """Load the model as training would, and measure it. Layers are not compiled: that alone takes a minute.

    Raises what training raises before its first step.
    """
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    plain = recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": False})})
    run_dir = RunDir(recipe.run.dir)
    with memory_advice(), TemporaryDirectory() as scratch:
        low_rank = run_dir.low_rank if run_dir.low_rank.is_dir() else Path(scratch) / run_dir.low_rank.name
        prepared = prepare(plain, run_dir, Silent(), low_rank=low_rank)
        return prepared.inputs, examine(prepared)


def examine(prepared: Prepared) -> tuple[Finding, ...]:
    """Every check. Adapter, base, mode and random generators are left as they were.

    Costs some twenty passes over about a thousand tokens, and reading the base once. Raises NumericsError where loss
    or gradient of the probe step are not finite.
    """
    inputs, job = prepared.inputs, prepared.job
    table, found = inputs.train.table, prepared.base.print
    with _left_as_it_was(job):
        return (
            *check_quantised(inputs, found, job.recipe.quant),
            check_end_tokens(inputs, job),
            check_prompts(inputs),
            *check_rows_apart(job, table),
            *check_gradients(job, table, found.digest),
        )


def refuse_failed(findings: Sequence[Finding]) -> None:
    """ModelError that lists every check that does not hold."""
    failed = [finding for finding in findings if not finding.ok]
    if failed:
        raise ModelError([Problem(f"{one.what}: {one.measured}, must be {one.bar}", one.fix) for one in failed])


def check_quantised(inputs: Inputs, base_print: BasePrint, quant: QuantSection) -> Iterator[Finding]:
    """Which linear layers are in 4 bit, against the recipe; and what else of two or more dimensions is not."""
    layers = list(linear_layers(inputs.skeleton))
    in_4bit = {name for name in layers if (found := base_print.tensors.get(f"{name}.weight")) and found.quantised}
    if quant.quant_type == "none":
        bar = "none: quant.quant_type is none"
        yield Finding("linear layers in 4 bit", f"{len(in_4bit)} of {len(layers)}", bar, not in_4bit, "report this")
        return
    skipped = {name for name in layers if is_named(name, quant.skip_modules)}
    wrong = sorted(in_4bit ^ (set(layers) - skipped))
    yield Finding(
        f"linear layers in {quant.quant_type}",
        f"{len(in_4bit)} of {len(layers)}" + (f"; not as the recipe says: {_some(wrong)}" if wrong else ""),
        f"{len(layers) - len(skipped)}" + (f", {len(skipped)} kept out by quant.skip_modules" if skipped else ""),
        not wrong,
        "name in quant.skip_modules what is to stay unquantised, else report the architecture",
    )
    yield _unquantised(inputs, base_print, skipped)


def _unquantised(inputs: Inputs, base_print: BasePrint, skipped: set[str]) -> Finding:
    """Matrices that are not in 4 bit, with their share of the base's bytes. Embeddings, head and skipped layers are
    expected; anything else, fused experts for one, is told apart."""
    tables = {
        f"{name}.weight"
        for name, module in inputs.skeleton.named_modules()
        if isinstance(module, nn.Embedding) or name == head_name(inputs.skeleton) or name in skipped
    }
    large = {n: t for n, t in base_print.tensors.items() if not t.quantised and len(t.shape) > 1}
    total = sum(tensor.num_bytes for tensor in base_print.tensors.values())
    told = []
    for label, chosen in (("", tables), ("besides: ", large.keys() - tables)):
        tensors = {name: large[name] for name in large if name in chosen}
        rows = dtype_table(BasePrint(tensors, {}))
        told += [
            f"{label}{_some(row.names)} {row.num_bytes / 2**20:,.1f} MiB in {row.kind} ({row.num_bytes / total:.0%})"
            for row in rows
        ]
    return Finding("matrices left unquantised", "; ".join(told) or "none", "named, with its share", True, "")


def check_rows_apart(job: Job, table: TokenTable) -> Iterator[Finding]:
    """Rows that are batched together against each alone (train/selfcheck.py), a line for each of its measurements."""
    packed = job.recipe.data.batching == "packed"
    found = compare_rows(job.causal, table, job.pad_token_id, job.accelerator.device, packed=packed)
    how = "packed" if packed else "padded"
    yield Finding(
        f"loss of {found.num_rows} rows {how} together and alone",
        f"{found.loss_together:.6g} and {found.loss_alone:.6g}, {found.loss_error:.1e} nats a token apart",
        f"at most {found.loss_tolerance:g} apart",
        found.loss_error <= found.loss_tolerance,
        found.fix,
    )
    if found.change_in_other_rows is None or found.change_in_the_row is None:
        return
    yield Finding(
        "a token replaced: change in the other rows of its pack",
        f"{found.change_in_other_rows:g}",
        f"at most {found.change_allowed:g}",
        found.change_in_other_rows <= found.change_allowed,
        found.fix,
    )
    yield Finding(
        "a token replaced: change in its own row",
        f"{found.change_in_the_row:.3g}",
        "above 0",
        found.change_in_the_row > 0,
        "report the architecture: its output does not depend on its input",
    )


def check_end_tokens(inputs: Inputs, job: Job) -> Finding:
    """Rows that are trained whole must end in a trained end token at which generation then stops."""
    table = _whole_rows(inputs.train)
    count = min(table.num_rows, MAX_END_ROWS)
    chosen = [index * table.num_rows // count for index in range(count)]
    encoder = Encoder(inputs.tokenizer)
    ends = [encoder.end_token_of(row) for row in table.rows(chosen)] if chosen else []
    stops = with_end_tokens(job.model.generation_config.eos_token_id, ())
    good = [token for token in ends if token is not None and token in stops]
    names = ", ".join(repr(inputs.tokenizer.decode([token])) for token in sorted(set(good)))
    bad = next((chosen[at] for at, token in enumerate(ends) if token not in stops), None)
    return Finding(
        "end token trained",
        f"{len(good)} of {len(ends)} whole rows end in {names or 'one'}"
        + (f"; not {table.where(bad)}" if bad is not None else ""),
        "all, and generation stops there",
        len(good) == len(ends),
        "train the last answer of each row, with a chat template that ends it in a special token of the tokenizer",
    )


def check_prompts(inputs: Inputs) -> Finding:
    """The first rows, and some prompts that are easily got wrong, through plain transformers: the ids of training."""
    rows = inputs.train.read(range(min(MAX_ROWS, inputs.train.table.num_rows)))
    golden = golden_prompts(rows, inputs.tokenizer)
    fault = parity_fault(golden, inputs.tokenizer)
    return Finding(
        "prompts read by plain transformers",
        f"not {fault}" if fault else f"{len(golden)} of {len(golden)} with the token ids of training",
        "all",
        not fault,
        "mend the chat template or the tokenizer: what is served would not be what was trained",
    )


def _whole_rows(split: Split) -> TokenTable:
    """The rows that are trained from end to end: one that was cut has lost its end."""
    return split.whole.take(np.flatnonzero(split.fates == CODE["kept"]))


def check_gradients(job: Job, table: TokenTable, base_digest: str) -> Iterator[Finding]:
    """Where gradients reach the adapter, before and after one real step; what the step leaves; sums over micro-batches.

    In plain LoRA B starts at zero, so that A has no gradient before B has moved; other methods have other such parts.
    The step is thrown away by `_left_as_it_was`.
    """
    rows = _gradient_rows(table)
    packed = job.recipe.data.batching == "packed"

    def batch(chosen: Sequence[int]) -> MicroBatch:
        lines = [chosen] if packed else [[row] for row in chosen]
        return collate(table, lines, job.pad_token_id, packed=packed)

    _, at_start = _gradients(job, [batch(rows)])
    parts = METHODS[job.recipe.adapter.method].trains
    is_plain = parts == ("lora_A", "lora_B") and METHODS[job.recipe.adapter.method].start == "zero"
    first = ("lora_B",) if is_plain else parts
    named = "B" if is_plain else "the adapter"
    yield _reached(f"gradient of {named} before the first step", job, at_start, first)
    before = {name: parameter.detach().clone() for name, parameter in trainable_parameters(job.model).items()}
    job.model.train()
    train = job.recipe.train
    train_step(
        job.causal,
        [batch(rows)],
        build_optimizer(job.model, train, job.recipe.adapter),
        job.accelerator,
        seed=job.recipe.run.seed,
        step=0,
        learning_rate=train.learning_rate,
        max_grad_norm=train.max_grad_norm,
    )
    moved = {name: parameter.detach() - before[name] for name, parameter in trainable_parameters(job.model).items()}
    yield _reached(f"{named} moved by one step", job, moved, first)
    same = print_base(job.model).digest == base_digest
    yield Finding(
        "bytes of the base after one step",
        "the same SHA-256" if same else "another SHA-256",
        "unchanged",
        same,
        "report the architecture: a part of the frozen base changes when it runs",
    )
    loss, whole = _gradients(job, [batch(rows)])
    for part in ("lora_A",) if is_plain else parts:
        named = part.removeprefix("lora_").replace("_", " ")
        if _layers_with(job.model, (part,)):
            yield _reached(f"gradient of {named} after one step", job, whole, (part,))
    yield from _token_rows_reached(job, whole, table.rows(rows))
    yield from _same_sums(job, (loss, whole), _gradients(job, [batch([row]) for row in rows]))


def _same_sums(
    job: Job, one: tuple[float, Mapping[str, Tensor]], several: tuple[float, Mapping[str, Tensor]]
) -> Iterator[Finding]:
    """Loss and gradient of rows as one micro-batch, and as one micro-batch each."""
    dtype = job.causal.head.weight_VH.dtype
    (loss_one, gradient_one), (loss_several, gradient_several) = one, several
    loss_error, bar = abs(loss_one - loss_several) / abs(loss_one), RELATIVE_LOSS_TOLERANCE[dtype]
    fix = "set train.grad_accum_steps: 1, and report the architecture"
    yield Finding(
        "loss of one batch and of micro-batches",
        f"{loss_one:.6g} and {loss_several:.6g}, {loss_error:.1e} apart",
        f"at most {bar:g} apart",
        loss_error <= bar,
        fix,
    )
    bar = GRADIENT_TOLERANCE[dtype]
    distance = _norm(gradient_one[name] - gradient_several[name] for name in gradient_one) / _norm(
        gradient_one.values()
    )
    yield Finding(
        "adapter gradient of one batch and of micro-batches",
        f"relative distance {distance:.1e}",
        f"at most {bar:g}",
        distance <= bar,
        fix,
    )


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt())


def _reached(what: str, job: Job, tensors: Mapping[str, Tensor], parts: Sequence[str]) -> Finding:
    """In how many adapted layers that have one of these parts (lora_A, lora_B) one is finite and not zero: in all.

    Of a mixture of experts, those may be left out that no token of these few rows was sent to.
    """
    norms: dict[str, float] = {}
    for name, tensor in tensors.items():
        layer, attribute = split_parameter_name(name)
        if attribute in parts:
            norms[layer] = max(norms.get(layer, 0.0), _norm([tensor]))
    layers = _layers_with(job.model, parts)
    missing = [name for name in layers if not 0 < norms.get(name, 0.0) < float("inf")]
    spared = [name for name in missing if has_experts(job.causal) and "expert" in name]
    bad = [name for name in missing if name not in spared]
    return Finding(
        what,
        f"in {len(layers) - len(missing)} of {len(layers)} adapted layers" + (f"; not in {_some(bad)}" if bad else ""),
        "all" + (f" but {len(spared)} experts that no token reached" if spared else ""),
        not bad,
        "leave these layers out of adapter.target_modules, or report the architecture",
    )


def _token_rows_reached(job: Job, gradients: Mapping[str, Tensor], rows: Sequence[TokenRow]) -> Iterator[Finding]:
    """Gradients of new tokens in each table: of a head all have one, of an embedding those read before a loss."""
    own = {name: layer for name, layer in token_layers(job.model).items() if layer.tied_adapter is None}
    read = {number for row in rows for number in row.ids[: row.span_stops[-1] - 1].tolist()}
    for name, layer in own.items():
        reads_only = isinstance(layer.get_base_layer(), nn.Embedding) and len(own) > 1
        due = [at for at, number in enumerate(layer.token_indices["default"]) if number in read or not reads_only]
        norms = gradients[f"{PEFT_PREFIX}{name}.{TOKEN_ROWS}.default"].norm(dim=1)
        reached = sum(0 < float(norms[at]) < float("inf") for at in due)
        yield Finding(
            f"gradient of new tokens in {name}",
            f"in {reached} of {len(due)} rows",
            "all" + (" that these rows of the data read" if reads_only else ""),
            reached == len(due),
            "report the architecture",
        )


def _layers_with(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """The adapted layers that have one of these parts at least."""
    adapted = adapted_layers(model).items()
    return [name for name, layer in adapted if layer_tensors(layer, "default").keys() & set(parts)]


def _gradient_rows(table: TokenTable) -> list[int]:
    """A short, a middle and a long row among the supervised ones of up to MAX_ROW_TOKENS; else the two shortest."""
    supervised = np.flatnonzero(table.num_supervised)
    by_length = supervised[np.argsort(table.lengths[supervised], kind="stable")]
    count = max(2, int((table.lengths[by_length] <= MAX_ROW_TOKENS).sum()))
    fitting = by_length[:count]
    return [int(fitting[at]) for at in sorted({0, len(fitting) // 2, len(fitting) - 1})]


def _gradients(job: Job, batches: Sequence[MicroBatch]) -> tuple[float, dict[str, Tensor]]:
    """Mean loss and adapter gradients of one step without dropout, recomputed as in training; none is left behind."""
    job.model.eval()
    for layer in decoder_layers(job.model):
        layer.training = True  # of the layer alone: it recomputes, what is in it draws nothing
    loss = accumulate_gradients(job.causal, batches, job.accelerator, seed=job.recipe.run.seed, step=0)
    parameters = trainable_parameters(job.model)
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in parameters.items()}
    job.model.zero_grad(set_to_none=True)
    return loss, gradients


@contextmanager
def _left_as_it_was(job: Job) -> Iterator[None]:
    """Adapter, mode of every module and random generators afterwards are those before, to the bit."""
    parameters = trainable_parameters(job.model)
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    modes = {module: module.training for module in job.model.modules()}
    device = job.accelerator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(kept[name])
                    parameter.grad = None
            for module, training in modes.items():
                module.training = training


def _some(names: Sequence[str]) -> str:
    """The first few names, without PEFT's prefix."""
    short = [name.removeprefix(PEFT_PREFIX) for name in names]
    return ", ".join(short[:NAMED]) + (f" and {len(short) - NAMED} more" if len(short) > NAMED else "")
