"""Settings given on the command line of an export that nothing of it would read: each is an error, none is ignored."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from qlora_train.errors import Problem, RecipeError
from qlora_train.export.formats.writers import FORMATS

SAFETENSORS = "safetensors"
_SHARDED = frozenset({SAFETENSORS, "nf4", "nf4-lora", "w4a16"})
_ANSWERS = ("eval.generate_rows", "eval.max_new_tokens")


def refuse_unread(overrides: Sequence[str], formats: Collection[str], base: str) -> None:
    """RecipeError for overrides (`section.key=value`) without an effect on these formats, merged onto `base`.

    What stands in the recipe serves all exports of a run, and may be meant for another.

    >>> refuse_unread(["export.max_kl=0.1"], ["safetensors"], "dequantized")
    Traceback (most recent call last):
    qlora_train.errors.RecipeError: error[recipe] export.max_kl has no effect here: it is for formats of 8 bits or \
fewer. Fix: leave it out, or name one, as --format gguf-q8_0
    """
    given = {override.partition("=")[0].strip() for override in overrides}
    if problems := [problem for key, problem in _unread(frozenset(formats), base) if key in given]:
        raise RecipeError(problems)


def _unread(formats: frozenset[str], base: str) -> Iterator[tuple[str, Problem]]:
    def problem(key: str, why: str, fix: str) -> tuple[str, Problem]:
        return key, Problem(f"{key} has no effect here: {why}", f"leave it out, or {fix}")

    named, kinds = ", ".join(sorted(formats)), [FORMATS[name] for name in formats if name in FORMATS]
    if SAFETENSORS not in formats and base != "auto":
        yield problem(
            "export.export_dtype", f"the name of a format says how its weights are stored ({named})", "name another"
        )
    if not formats & _SHARDED:
        yield problem("export.shard_gib", f"{named} is one file", "name a format in safetensors")
    if not any(kind.lossy for kind in kinds):
        yield problem("export.max_kl", "it is for formats of 8 bits or fewer", "name one, as --format gguf-q8_0")
    if base == "dequantized":
        yield problem(
            "export.max_loss_rise",
            "merged onto the dequantised base, the model is the one that was trained, and held to export.max_kl_frac",
            "give export.base=original or export.base=auto",
        )
    if base == "original" and all(kind.merges for kind in kinds):
        yield problem(
            "export.max_kl_frac",
            "merged onto the original weights, the model is another one than was trained, and held to "
            "export.max_loss_rise",
            "give export.base=dequantized or export.base=auto",
        )
    if base != "auto":
        for key in _ANSWERS:
            yield problem(key, "answers are compared to choose what to merge onto", "give export.base=auto")
