"""A whole export: merge, verify, describe, publish; nothing appears under the target's name before it is accepted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_train.artifacts import publishing, read_json
from qlora_train.data.parity import MAX_ROWS, check_parity, golden_prompts, write_golden
from qlora_train.errors import MachineError, ModelError, RecipeError, is_out_of_memory
from qlora_train.export.card import figures, model_card
from qlora_train.export.merge import merge_to
from qlora_train.export.record import record_export
from qlora_train.export.verify import Verdict, rows_to_verify, verify
from qlora_train.memory.exhausted import Exhaustion, Option
from qlora_train.model.load import resolve_device, with_end_tokens
from qlora_train.model.source import Source
from qlora_train.model.trained import FinishedRun
from qlora_train.recipe.schema import Recipe


@dataclass(frozen=True)
class ExportResult:
    """A published export."""

    folder: Path
    verdict: Verdict
    num_modules: int
    num_bytes: int
    num_golden_prompts: int  # that the exported tokenizer turns into the ids of training


def run_export(run: FinishedRun, target: Path) -> ExportResult:
    """Merge a run's adapter and publish it as `target`; see `api.export` for what it raises."""
    if target.exists():
        raise RecipeError(f"{target} exists already", fix="remove it or choose another folder; it was not touched")
    _check_disk(run, target)
    source = run.source()
    audit = read_json(run.run_dir.data)
    tokenizer = run.tokenizer(source)
    held_out = rows_to_verify(run, tokenizer)
    with publishing(target, manifest={"base_digest": run.base_print.digest}) as folder:
        with _memory_advice(run, "while the merged weights were written"):
            rows = merge_to(folder, run, source)
        _write_configs(folder, run.recipe, source, audit["end_token_ids"])
        tokenizer.save_pretrained(str(folder))
        golden = golden_prompts(held_out.read(range(min(MAX_ROWS, held_out.table.num_rows))), tokenizer)
        write_golden(folder, golden)
        check_parity(folder, golden)
        with _memory_advice(run, "while the merged model was compared with the trained one"):
            verdict = verify(run, folder, held_out, tokenizer.pad_token_id)
        if not verdict.accepted:
            record_export(run, target, verdict)
            raise ModelError(
                f"the merged model is not the trained one: KL {verdict.merged.mean_kl:.3g} nats per token is "
                f"{verdict.kl_frac:.2%} of the adapter's own effect ({verdict.adapter_off.mean_kl:.3g})",
                fix="export with export.export_dtype=float32; nothing was published",
            )
        (folder / "README.md").write_text(model_card(target.name, run, verdict, audit), encoding="utf-8")
        (folder / "export.json").write_text(json.dumps(figures(run, verdict, rows), indent=1), encoding="utf-8")
    record_export(run, target, verdict)
    num_bytes = sum(path.stat().st_size for path in target.iterdir())
    return ExportResult(target, verdict, len(rows), num_bytes, len(golden))


@contextmanager
def _memory_advice(run: FinishedRun, where: str) -> Iterator[None]:
    """Say what the export needs where memory runs out in the block. Nothing has been published by then."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        plan = read_json(run.run_dir.memory)["plan"] if run.run_dir.memory.is_file() else None
        needed = plan["peak_bytes"]["export"] if plan else 4 * run.base_print.num_params  # the merged model in float32
        options = [Option("on a machine with more memory", "the run folder and the base can be copied there")]
        if run.recipe.export.verify_rows > 1:
            fewer = f"export.verify_rows={run.recipe.export.verify_rows // 2}"
            options.insert(0, Option(fewer, "the hidden states of half as many rows are held"))
        exhaustion = Exhaustion.of(error, where, "export", resolve_device(run.recipe.model.device))
        raise exhaustion.error(
            planned=needed, saved="nothing was published; the run folder is as it was", options=options
        ) from error


def _check_disk(run: FinishedRun, target: Path) -> None:
    """Refuse before any work when the weights cannot fit."""
    width = {"float32": 4}.get(run.recipe.export.export_dtype, 2)
    needed = width * run.base_print.num_params
    folder = next(p for p in target.absolute().parents if p.exists())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise MachineError(
            f"{target} needs {needed / 2**30:.2f} GiB, {folder} has {free / 2**30:.2f} GiB free", fix="free space"
        )


def _write_configs(folder: Path, recipe: Recipe, source: Source, end_token_ids: list[int]) -> None:
    """The base's config with the dtype of these weights; its generation config, which stops at the trained end too."""
    config: dict[str, Any] = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    for key in ("torch_dtype", "_name_or_path", "auto_map"):
        config.pop(key, None)
    config["dtype"] = recipe.export.export_dtype
    path = source.folder / "generation_config.json"
    generation: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ends = with_end_tokens(generation.get("eos_token_id", config.get("eos_token_id")), end_token_ids)
    generation["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
