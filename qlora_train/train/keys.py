"""What a key of the recipe does to a run that goes on: nothing, another rounding, or another course."""

from __future__ import annotations

from typing import Any

from pydantic_core import to_jsonable_python

from qlora_train.recipe.schema import Recipe

# Sections that only concern what is measured or made of the adapter.
NEUTRAL_SECTIONS = frozenset({"eval", "export"})
# Equal bits, whatever they are (tests/invariant/test_resume_changes.py): they may change on resume without a word.
NEUTRAL_KEYS = frozenset(
    {
        "adapter.init_from",  # where a run starts, which lies behind a resume
        "data.eval",
        "data.max_eval_rows",
        # The rows are bound by their fingerprint, wherever they lie and however they are kept; weights by WEIGHTS.
        "data.train",
        "data.bad_rows",
        "data.max_lost_frac",
        "data.streaming",
        "model.path",  # the base is bound by its fingerprint
        "model.revision",
        "model.chat_template",  # bound by its own
        "run.dir",
        "run.log_every",
        "run.trackers",
        "run.tracker_project",
        # The same bits, however memory is spent: tests/numerics/test_checkpointing.py and test_fused_linear.py.
        "train.checkpointing",
        "train.checkpoint_every",
        "train.offload_checkpoints",
        "train.resident_layers",
        "train.memory_limit_gib",
        "train.memory",  # bound by what it came to
        "train.save_every",
        "train.keep",
        "train.on_disk_full",
    }
)
# The same rows in the same order, rounded otherwise: accepted with a warning, and recorded. The device only where the
# base is not quantised: fork.refuse_other_device.
ROUNDING_KEYS = frozenset({"run.threads", "model.device", "train.compile"})
# Sections whose every other key decides what is trained: refused on resume.
TRAJECTORY_SECTIONS = frozenset({"quant", "adapter"})
TRAJECTORY_KEYS = frozenset(
    {
        "model.compute_dtype",
        "model.attn_implementation",
        "model.lord_keep_frac",
        "model.lord_modules",
        "model.lord_batches",
        "data.split",
        "data.format",
        "data.columns",
        "data.loss_on",
        "data.seq_len",
        "data.overlong",
        "data.duplicates",
        "data.max_train_rows",
        "data.batching",
        "train.epochs",
        "train.max_steps",
        "train.micro_batch_size",
        "train.grad_accum_steps",
        "train.learning_rate",
        "train.schedule",
        "train.warmup_frac",
        "train.weight_decay",
        "train.adam_beta1",
        "train.adam_beta2",
        "train.max_grad_norm",
        "train.optimizer",
        "train.fused",
        "run.seed",
    }
)
WEIGHTS = "data.train.weight"  # how often each source comes: the part of data.train that decides


def is_neutral(key: str) -> bool:
    """Whether a key of the recipe, dotted, leaves every bit of the training as it is."""
    return key in NEUTRAL_KEYS or key.partition(".")[0] in NEUTRAL_SECTIONS


def default_of(key: str) -> Any:
    """The value, as JSON has it, of a dotted key that a recipe does not name; None for one that has no default."""
    section, _, name = key.partition(".")
    sections: Any = Recipe.model_fields
    field = sections[section].annotation.model_fields.get(name) if section in sections else None
    if field is None or field.is_required():
        return None
    return to_jsonable_python(field.get_default(call_default_factory=True))


def trajectory_keys(recipe: Recipe) -> dict[str, Any]:
    """Every key that decides what is trained, and how often each source is. A key that is in no list counts as one."""
    keys: dict[str, Any] = {}
    for section, values in recipe.model_dump(mode="json").items():
        for key, value in values.items():
            dotted = f"{section}.{key}"
            if not is_neutral(dotted) and dotted not in ROUNDING_KEYS:
                keys[dotted] = value
    keys[WEIGHTS] = [source.weight for source in recipe.data.train]
    return keys
