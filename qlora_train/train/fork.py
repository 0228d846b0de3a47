"""May this recipe, on this machine, go on from that checkpoint? What has changed, what of it is refused, what is kept.

Three levels, documented in the README. D2: nothing has changed that could change a bit. D1: the same rows in the same
order, rounded otherwise (threads, versions, processor, another split of a step; the device where the base is not
quantised). D0: a fork, which
`--allow-change KEY` asked for.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any, Literal

from qlora_train.artifacts.files import append_json_line
from qlora_train.artifacts.layout import RunDir
from qlora_train.errors import Problem, RecipeError, ResumeError
from qlora_train.recipe.schema import Recipe
from qlora_train.train.keys import WEIGHTS, default_of, trajectory_keys
from qlora_train.train.state import Binding

Level = Literal["D2", "D1", "D0"]
# Fingerprints by the key of a recipe that stands for them; None: no key, these never change in a run.
_FINGERPRINTS = {
    "base": ("the base model", None),
    "tokenizer": ("the tokenizer", None),
    "template": ("the chat template", "model.chat_template"),
    "data": ("the training data", "data.train"),
}
SPLIT = ("train.micro_batch_size", "train.grad_accum_steps")
_ALLOWED_OF_ADAPTER = ("adapter.alpha", "adapter.dropout")
_FIX = "restore what has changed, or start a new run in another run.dir"
# Of what a machine computes with: its rounding may differ where one of these does.
_PROCESSOR = ("threads", "cpu", "cpu_capability")
_ENVIRONMENT = ("device", *_PROCESSOR, "cuda", "cuda_devices", "layers_compiled", "python", "system")
_MAPPINGS = ("versions", "cpu_features")
NO_ORIGINS: Mapping[str, str] = {}
_CODE = {"versions.qlora-train", "code_sha256"}


@dataclass(frozen=True)
class Change:
    """One thing that is not as it was at the checkpoint. `where`: file and line, or the command line, where known."""

    key: str
    old: Any
    new: Any
    where: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


class OtherRun(ResumeError):
    """The checkpoint is another run's: a table of what differs, with both sides."""

    def __init__(self, refused: Sequence[Change], checkpoint: str) -> None:
        options = " ".join(dict.fromkeys(f"--allow-change {_key_of(change)}" for change in refused))
        may = all(may_fork(change.key) for change in refused)
        fork = f"; or go on as a fork, which is recorded: --resume {options}" if may else ""
        super().__init__(
            [
                Problem(
                    f"{change.key}: {_text(change.old)} at the checkpoint, {_text(change.new)} now",
                    _FIX,
                    change.where or None,
                )
                for change in refused
            ]
        )
        count = "one thing" if len(refused) == 1 else f"{len(refused)} things"
        table = _table([("", "at the checkpoint", "now", "")] + [_row(change) for change in refused])
        self.args = (
            f"error[{self.kind}] this is not the run of {checkpoint}: {count} that decide{'s' * (len(refused) == 1)} "
            f"what is trained changed.\n{table}\nFix: {_FIX}{fork}",
        )


def _row(change: Change) -> tuple[str, str, str, str]:
    known = _FINGERPRINTS.get(change.key)
    return (known[0] if known else change.key), _text(change.old), _text(change.new), change.where


def _text(value: Any) -> str:
    text = str(value)
    return text[:16] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line.rstrip()}" for line in lines)


def may_fork(key: str) -> bool:
    """Whether a run can go on with another value: the checkpoint's tensors still fit, and the base stays."""
    if key in _FINGERPRINTS:
        return _FINGERPRINTS[key][1] is not None
    section = key.partition(".")[0]
    return key in _ALLOWED_OF_ADAPTER or (section not in ("adapter", "quant") and key != "train.optimizer")


def check_allowed(keys: Iterable[str], recipe: Recipe) -> frozenset[str]:
    """The keys of `--allow-change`; RecipeError for one that is none, or that no run can go on with."""
    known = {*trajectory_keys(recipe), *(key for _, key in _FINGERPRINTS.values() if key)} - {WEIGHTS}
    problems = []
    for key in keys:
        if key not in known:
            near = get_close_matches(key, known, 3)
            fix = f"name one of {', '.join(near)}" if near else "name a key as SECTION.KEY that decides what is trained"
            problems.append(Problem(f"--allow-change {key}: no such key, or one that may change anyway", fix))
        elif not may_fork(key):
            what = "the tensors of a checkpoint do not fit another value"
            problems.append(Problem(f"--allow-change {key}: {what}", "start a new run in another run.dir"))
    if problems:
        raise RecipeError(problems)
    return frozenset(keys)


def recipe_changes(
    stored: Mapping[str, Any], now: Mapping[str, Any], origins: Mapping[str, str] = NO_ORIGINS
) -> list[Change]:
    """Keys that decide what is trained, and are not as the checkpoint has them.

    A key that came after the checkpoint had its default there.
    """
    then = {key: stored.get(key, default_of(key)) for key in {*stored, *now}}
    return [
        Change(key, then[key], now.get(key), origins.get(key.removesuffix(".weight"), ""))
        for key in sorted(then)
        if then[key] != now.get(key)
    ]


def binding_changes(
    stored: Mapping[str, Any], binding: Binding, origins: Mapping[str, str] = NO_ORIGINS
) -> list[Change]:
    """All that a run is bound to, and is not as the checkpoint has it: base, tokenizer, template, rows, keys."""
    fingerprints = [
        Change(name, stored.get(name), getattr(binding, name), origins.get(key or "model.path", ""))
        for name, (_, key) in _FINGERPRINTS.items()
        if stored.get(name) != getattr(binding, name)
    ]
    return fingerprints + recipe_changes(stored.get("recipe", {}), binding.recipe, origins)


def environment_changes(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What the machine computes with, and is not as it was: the same rows, perhaps rounded otherwise.

    What was not recorded then is not compared.
    """
    then, here = _flat(stored), _flat({key: value for key, value in now.items() if key in stored})
    return [
        Change(key, then.get(key), here.get(key))
        for key in dict.fromkeys((*here, *then))
        if then.get(key) != here.get(key)
    ]


def _flat(environment: Mapping[str, Any]) -> dict[str, Any]:
    named = {key: environment[key] for key in (*_ENVIRONMENT, "code_sha256") if key in environment}
    parts = ((part, name, value) for part in _MAPPINGS for name, value in environment.get(part, {}).items())
    return named | {f"{part}.{name}": value for part, name, value in parts}


def refuse_other_device(stored: Mapping[str, Any], recipe: Recipe, device: str, checkpoint: str) -> None:
    """ResumeError where a run on a quantised base went on with another kind of device, before anything is loaded.

    `device`: "cpu" or "cuda". Statistics of blocks, which the base's fingerprint holds, are rounded otherwise there.
    """
    then = stored.get("device", device)
    if then == device or recipe.quant.quant_type == "none":
        return
    way = "set model.device: cpu" if then == "cpu" else "go on where there is a CUDA device, with model.device: auto"
    raise ResumeError(
        f"{checkpoint} was trained on {then}, and this would go on on {device}: the base is quantised to other values "
        "there, so that the adapter would get another base",
        fix=f"{way}; or start a new run in another run.dir",
    )


def is_another_split(changes: Sequence[Change], stored: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether all that has changed is how a step is split: as many packs, in the same order, in other micro-batches.

    Not for batches by length, whose rows are sorted within so many micro-batches.
    """
    others = {change.key for change in changes} - set(SPLIT)
    if not changes or others or recipe.data.batching == "length_grouped":
        return False
    packs = recipe.train.micro_batch_size * recipe.train.grad_accum_steps
    return stored[SPLIT[0]] * stored[SPLIT[1]] == packs


def refuse_changes(changes: Sequence[Change], allowed: frozenset[str], checkpoint: str) -> None:
    """OtherRun for the changes that nobody allowed."""
    refused = [change for change in changes if _key_of(change) not in allowed]
    if refused:
        raise OtherRun(refused, checkpoint)


def refuse_idle(changes: Sequence[Change], allowed: frozenset[str]) -> None:
    """RecipeError for what was allowed to change and has not: a mistyped value, most likely."""
    if idle := sorted(allowed - {_key_of(change) for change in changes}):
        raise RecipeError(
            f"--allow-change {', '.join(idle)}: nothing has changed there",
            fix="give the new value in the recipe or on the command line, or leave the option out",
        )


def _key_of(change: Change) -> str | None:
    if change.key in _FINGERPRINTS:
        return _FINGERPRINTS[change.key][1]
    return change.key.removesuffix(".weight")


def record_resume(
    run_dir: RunDir, checkpoint: str, step: int, level: Level, forked: Sequence[Change], rounding: Sequence[Change]
) -> None:
    """A line of `resumes.jsonl`: from where the run went on, at which level, and what was not as before."""
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "from": checkpoint,
        "level": level,
        "fork": [change.as_dict() for change in forked],
        "rounding": [change.as_dict() for change in rounding],
    }
    append_json_line(run_dir.resumes, entry)


def describe_changes(changes: Sequence[Change]) -> str:
    """A line: each with both values, the versions of our own code by name alone."""
    parts = [
        "this program's code" if change.key in _CODE else f"{change.key} {_text(change.old)} -> {_text(change.new)}"
        for change in changes
    ]
    return "; ".join(dict.fromkeys(parts))
