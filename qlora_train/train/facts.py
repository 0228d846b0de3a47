"""What a run is made of, kept in its folder and said before it starts."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from qlora_train.artifacts.files import append_json_line, write_file, write_json
from qlora_train.artifacts.layout import RunDir
from qlora_train.data.account import account_for, write_account
from qlora_train.errors import Interrupted, Problem, UserError
from qlora_train.model.table import dtype_table
from qlora_train.printable import without_secrets
from qlora_train.recipe.load import LoadedRecipe, resolved_yaml
from qlora_train.train.metrics import last_logged_step
from qlora_train.train.selfcheck import SelfCheck
from qlora_train.train.setup import Prepared


def write_facts(loaded: LoadedRecipe, prepared: Prepared, checked: SelfCheck) -> None:
    """What the run is made of, before it starts."""
    run_dir = prepared.job.run_dir
    write_file(run_dir.recipe, resolved_yaml(loaded).encode())
    write_json(run_dir.environment, prepared.job.environment)
    inputs, recipe = prepared.inputs, prepared.job.recipe
    if template := inputs.tokenizer.chat_template:
        write_file(run_dir.chat_template, str(template).encode())
    source = {"name": inputs.source.name, "commit": inputs.source.commit, "file_sha256": inputs.source.file_sha256}
    write_json(run_dir.base, {"source": source, **prepared.base.print.as_dict()})
    train, held_out = inputs.train, inputs.eval
    account = account_for(recipe, train, held_out, inputs.tokenizer, prepared.job.loader)
    if unreached := account.batching.num_unreached_rows:
        prepared.job.reporter.warning(f"{unreached:,} kept rows come in none of the steps")
    facts = {
        "files": [
            {"name": source.source.name, "kind": source.source.kind, "sha256": source.digest}
            for split in (train, held_out)
            if split
            for source in split.sources
        ],
        "selfcheck": checked.as_dict(),
        "end_token_ids": train.end_token_ids,
        "conversations": train.holds_conversations(),
    }
    write_account(run_dir, {**account.as_dict(recipe), **facts}, train, held_out)


def describe(prepared: Prepared) -> None:
    """The table of dtypes, the use of the machine, and the adapter against full fine-tuning."""
    reporter = prepared.job.reporter
    for row in dtype_table(prepared.base.print):
        names = ", ".join(row.names[:8]) + (", ..." if len(row.names) > 8 else "")
        reporter.message(
            f"base: {row.num_tensors:>4} tensors in {row.kind:<8} {row.num_params / 1e6:>10,.1f}M parameters "
            f"{row.num_bytes / 2**20:>10,.1f} MiB  {names}"
        )
    for line in prepared.speed.summary():
        reporter.message(line)
    facts = prepared.facts
    # float32 adapter, gradient and two AdamW moments, against bf16 weights and gradients with float32 moments.
    adapter_mib, full_mib = facts.num_trainable * 16 / 2**20, (facts.num_trainable + facts.num_frozen) * 12 / 2**20
    reporter.message(
        f"adapter: {facts.num_trainable:,} trainable parameters ({facts.trainable_frac:.2%}) on "
        f"{len(facts.modules)} layers{_rows_words(facts.token_rows)}; {adapter_mib:,.0f} MiB with gradient and AdamW "
        f"moments, full fine-tuning {full_mib:,.0f} MiB"
    )


def _rows_words(tables: tuple[str, ...]) -> str:
    """Where new tokens have rows that train."""
    return f" and rows of new tokens in {', '.join(tables)}" if tables else ""


@contextlib.contextmanager
def errors_recorded(run_dir: RunDir) -> Iterator[None]:
    """Keep a copy of what ends the block as a line of `errors.jsonl`: an error, a signal, or a bug of ours."""
    try:
        yield
    except UserError as error:
        _record(run_dir, error.kind, error.exit_code, error.problems)
        raise
    except Interrupted as error:
        name = signal.Signals(error.exit_code - 128).name
        _record(run_dir, "signal", error.exit_code, [Problem(f"{name}: {error}", "")])
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        _record(run_dir, "bug", 1, [Problem(what, "send the report that the command line names")])
        raise


def _record(run_dir: RunDir, kind: str, exit_code: int, problems: Sequence[Problem]) -> None:
    """A line with the last step that was logged by now."""
    said = [{name: text and without_secrets(text) for name, text in asdict(problem).items()} for problem in problems]
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    # Where even this cannot be read or written, the first error is the one to show.
    with contextlib.suppress(UserError, OSError):
        step = last_logged_step(run_dir.metrics)
        entry = {"time": when, "kind": kind, "exit_code": exit_code, "step": step, "problems": said}
        append_json_line(run_dir.errors, entry)
