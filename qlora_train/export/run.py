"""A whole export: merge, verify, describe, publish; nothing appears under the target's name before it is accepted."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_train.artifacts.files import read_json
from qlora_train.artifacts.folders import publishing
from qlora_train.data.fates import Side
from qlora_train.data.parity import MAX_ROWS, Golden, check_parity, golden_prompts, write_golden
from qlora_train.data.split import Split
from qlora_train.errors import MachineError, ModelError, RecipeError, is_out_of_memory
from qlora_train.evaluate.sides import questions_of
from qlora_train.export.card import Facts, figures, model_card
from qlora_train.export.choice import Choice, measure_bases
from qlora_train.export.clock import Clock
from qlora_train.export.configs import write_configs
from qlora_train.export.licence import Licence, copy_texts, find_licence
from qlora_train.export.merge import merge_to
from qlora_train.export.noise import Noise, noise
from qlora_train.export.push import check_push, push
from qlora_train.export.record import record_export
from qlora_train.export.tensors import Onto
from qlora_train.export.unfinished import FinishedShards, finished_shards, shards_folder
from qlora_train.export.verify import MAX_DEVIATION, Reference, Verdict, how_to_verify, observe_trained, verify
from qlora_train.memory.exhausted import Exhaustion, Option
from qlora_train.model.load import resolve_device
from qlora_train.model.source import Source
from qlora_train.model.trained import FinishedRun

# Beside the shards: tokenizer, golden prompts, card.
SMALL_FILES_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Measured:
    """What the trained model made of the rows, and what `export.base: auto` found to merge onto."""

    reference: Reference
    choice: Choice | None = None


@dataclass(frozen=True)
class ExportResult:
    """A published export."""

    folder: Path
    verdict: Verdict
    num_modules: int
    num_bytes: int
    num_golden_prompts: int  # that the exported tokenizer turns into the ids of training
    choice: Choice | None = None  # what was measured for `export.base: auto`
    noise: Noise | None = None  # the change of each weight beside the errors of quantising and rounding
    seconds: dict[str, float] = field(default_factory=dict)  # by what they went to
    peak_memory_bytes: int = 0  # resident, of this process so far
    num_taken_over: int = 0  # shards that an earlier export, killed, had finished
    left_out: tuple[str, ...] = ()  # tensors of the base's files that the model does not compute with
    licence: Licence | None = None
    pushed_to: str | None = None  # its address on the hub


def run_export(
    run: FinishedRun,
    target: Path,
    *,
    repository: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    measured: Measured | None = None,
) -> ExportResult:
    """Merge a run's adapter and publish it as `target`; see `api.export` for what it raises.

    `measured` is what `measure_trained` came to where other formats are exported too.
    """
    if target.exists():
        raise RecipeError(f"{target} exists already", fix="remove it or choose another folder; it was not touched")
    if repository is not None:
        check_push(repository)
    _check_disk(run, target)
    clock = Clock(say)
    source = run.source()
    audit = read_json(run.run_dir.data)
    tokenizer = run.tokenizer(source)
    work = _Export(run, source, tokenizer, rows_to_verify(run, tokenizer), clock, measured)
    manifest = {"base_digest": run.base_print.digest}
    with (
        finished_shards(target) as finished,
        clock.of("publish"),  # what is left of the other stretches: small files, hashes, the disk
        publishing(target, manifest=manifest) as folder,
    ):
        golden = _write_small_files(folder, work, audit["end_token_ids"])
        facts = work.merge(folder, finished, audit)
        if not facts.verdict.accepted:
            record_export(run, target, facts.verdict, say)
            raise _refusal(facts.verdict, run.recipe.export.export_dtype)
        (folder / "README.md").write_text(model_card(target.name, facts), encoding="utf-8")
        (folder / "export.json").write_text(json.dumps(figures(facts), indent=1), encoding="utf-8")
    record_export(run, target, facts.verdict, say)
    return ExportResult(
        folder=target,
        verdict=facts.verdict,
        num_modules=len(facts.merged.rows),
        num_bytes=sum(path.stat().st_size for path in target.iterdir()),
        num_golden_prompts=len(golden),
        choice=facts.choice,
        noise=noise(facts.merged.rows),
        seconds=dict(clock.seconds),
        peak_memory_bytes=_peak_resident_bytes(),
        num_taken_over=facts.merged.num_taken_over,
        left_out=facts.merged.left_out,
        licence=facts.licence,
        pushed_to=None if repository is None else _push(target, repository, say),
    )


@dataclass
class _Export:
    """What the stages of an export share."""

    run: FinishedRun
    source: Source
    tokenizer: Any
    held_out: Split
    clock: Clock
    measured: Measured | None

    def merge(self, folder: Path, finished: FinishedShards, audit: dict[str, Any]) -> Facts:
        """Write the weights and measure them; where it is to be measured what to merge onto, that comes first."""
        base, measured = self.run.recipe.export.base, self.measured
        if base == "auto" and measured is None:
            measured = self._measure()
        onto = onto_of(self.run, measured.choice if measured else None)
        with memory_advice(self.run, "while the merged weights were written"):
            merged = merge_to(folder, self.run, self.source, onto, finished, self.clock)
        comparing = "while the merged model was compared with the trained one"
        with memory_advice(self.run, comparing), self.clock.of("verify"):
            measured = measured or self._measure()
            self.clock.say("running the merged model on them")
            verdict = verify(self.run, folder, measured.reference, merged)
        licence = find_licence(self.run, self.source)
        return Facts(self.run, audit, verdict, merged, licence, measured.choice, dict(self.clock.seconds))

    def _measure(self) -> Measured:
        return measure_trained(self.run, self.source, self.tokenizer, self.held_out, self.clock)


def measure_trained(run: FinishedRun, source: Source, tokenizer: Any, held_out: Split, clock: Clock) -> Measured:
    """Run the trained model over the rows; for `export.base: auto` compare the ways to merge on them too."""
    auto, how = run.recipe.export.base == "auto", how_to_verify(run)
    words = "" if how == "whole" else ", one layer at a time"
    clock.say(f"running the trained model on {held_out.table.num_rows} {held_out.side} rows{words}")
    limit = run.recipe.eval.generate_rows if auto and how == "whole" else 0
    questions = questions_of(held_out, tokenizer, limit) if limit else []
    if not auto:
        return Measured(observe_trained(run, source, held_out, tokenizer.pad_token_id, how, questions))
    with memory_advice(run, "while the ways to merge were compared"):
        with clock.of("measure trained"):
            reference = observe_trained(run, source, held_out, tokenizer.pad_token_id, how, questions)
        return Measured(reference, measure_bases(run, source, reference, tokenizer, clock))


def onto_of(run: FinishedRun, choice: Choice | None) -> Onto:
    """What the adapter is merged onto, as the recipe says, or as was measured."""
    base = run.recipe.export.base
    if base == "auto":
        assert choice is not None, "measured before"
        return choice.onto
    return base


def _push(target: Path, repository: str, say: Callable[[str], None]) -> str:
    say(f"uploading to {repository}")
    return push(target, repository)


def rows_to_verify(run: FinishedRun, tokenizer: Any) -> Split:
    """The first held-out rows, as many as the comparison reads; training rows where the recipe names no others."""
    export = run.recipe.export
    limit = max(export.verify_rows, export.compare_rows) if export.base == "auto" else export.verify_rows
    side: Side = "eval" if run.recipe.data.holds_out else "train"
    return run.load_split(side, tokenizer, max_eval_rows=limit, max_train_rows=limit)


def _refusal(verdict: Verdict, dtype: str) -> ModelError:
    worst = verdict.worst_layer
    if verdict.onto == "original" and not verdict.layers_hold and worst is not None:
        return ModelError(
            f"the merged model is not the trained one on the original weights: {worst.name} by itself is off by "
            f"{worst.ratio:,.0f} times what rounding explains (limit {MAX_DEVIATION:g})",
            fix="nothing was published; report this",
        )
    if verdict.onto == "original":
        rise = verdict.loss_rise
        return ModelError(
            f"merged onto the original weights the model is another one than was trained, and worse on the "
            f"{verdict.split} rows: its loss is {verdict.merged.candidate_nll:.4f} nats per token, the trained model's "
            f"{verdict.merged.reference_nll:.4f} ({rise:+.4f}, limit {verdict.max_loss_rise:+.4f})",
            fix="nothing was published; export with export.base=dequantized, or take the loss knowingly: "
            f"export.max_loss_rise={rise * 1.05:.2g}",
        )
    what = (
        f"the merged model is not the trained one: KL {verdict.merged.mean_kl:.3g} nats per token is "
        f"{verdict.kl_frac:.2%} of the adapter's own effect ({verdict.adapter_off.mean_kl:.3g})"
    )
    if worst is None or verdict.layers_hold:
        finer = "report this" if dtype == "float32" else "export with export.export_dtype=float32"
        return ModelError(what, fix=f"{finer}; nothing was published")
    off = f"{worst.name} by itself is off by {worst.ratio:,.0f} times what rounding explains (limit {MAX_DEVIATION:g})"
    return ModelError(f"{what}; {off}", fix="nothing was published; report this")


@contextmanager
def memory_advice(run: FinishedRun, where: str, *, saved: str = "nothing was published") -> Iterator[None]:
    """Say what the export needs where memory runs out in the block, and what is on the disk by then."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        plan = read_json(run.run_dir.memory)["plan"] if run.run_dir.memory.is_file() else None
        needed = plan["peak_bytes"]["export"] if plan else 4 * run.num_merged_params  # the merged model in float32
        options = [Option("on a machine with more memory", "the run folder and the base can be copied there")]
        if run.recipe.export.verify_rows > 1:
            fewer = f"export.verify_rows={run.recipe.export.verify_rows // 2}"
            options.insert(0, Option(fewer, "the hidden states of half as many rows are held"))
        if run.recipe.eval.batch_size > 1:
            options.insert(0, Option("eval.batch_size=1", "one row is computed at a time"))
        if how_to_verify(run) == "whole":
            options.insert(0, Option("export.verify=layers", "one layer is held at a time, and no whole model"))
        exhaustion = Exhaustion.of(error, where, "export", resolve_device(run.recipe.model.device))
        raise exhaustion.error(
            planned=needed, saved=f"{saved}; the run folder is as it was", options=options
        ) from error


def _check_disk(run: FinishedRun, target: Path) -> None:
    """Refuse before any work when the weights cannot fit beside what a killed export left there."""
    width = {"float32": 4}.get(run.recipe.export.export_dtype, 2)
    needed = width * run.num_merged_params + SMALL_FILES_BYTES
    folder = next(p for p in target.absolute().parents if p.exists())
    there = sum(path.stat().st_size for path in shards_folder(target).glob("*.safetensors"))
    if (free := shutil.disk_usage(folder).free) < needed - there:
        raise MachineError(
            f"{target} needs {(needed - there) / 2**30:.2f} GiB, {folder} has {free / 2**30:.2f} GiB free",
            fix="free space",
        )


def _write_small_files(folder: Path, work: _Export, end_token_ids: list[int]) -> list[Golden]:
    """Everything but weights, card and figures; ModelError where the tokenizer would not serve as it trained."""
    vocab_size = work.run.config(work.source).get_text_config().vocab_size
    write_configs(folder, work.source, end_token_ids, work.run.recipe.export.export_dtype, vocab_size=vocab_size)
    copy_texts(work.source, folder)
    work.tokenizer.save_pretrained(str(folder))
    rows = work.held_out.read(range(min(MAX_ROWS, work.held_out.table.num_rows)))
    golden = golden_prompts(rows, work.tokenizer)
    write_golden(folder, golden)
    check_parity(folder, golden)
    return golden


def _peak_resident_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
