"""What survives a restart, and nothing else: position, best evaluation, and what the run is bound to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from qlora_train.errors import ResumeError
from qlora_train.recipe.schema import Recipe

# Changing one of these changes what is trained; the rest of a recipe may change on resume.
NEUTRAL_KEYS = frozenset(
    {
        "eval.every",
        "eval.batch_size",
        "eval.generate_rows",
        "eval.max_new_tokens",
        "data.eval",
        "data.max_eval_rows",
        "train.save_every",
        "train.keep",
        "train.on_disk_full",
        # The same bits, however memory is spent: tests/numerics/test_checkpointing.py and test_fused_linear.py.
        "train.checkpointing",
        "train.checkpoint_every",
        "train.offload_checkpoints",
        "train.resident_layers",
        "train.memory_limit_gib",
        "train.memory",  # bound by what it came to
        "train.compile",  # bound by what it came to
        "export.export_dtype",
        "export.shard_gib",
        "export.verify_rows",
        "export.max_kl_frac",
        "run.dir",
        "run.log_every",
        "run.trackers",
        "run.tracker_project",
        "model.path",  # the base is bound by its fingerprint, the data by theirs, wherever they lie
        "model.revision",
        "model.chat_template",
        "data.train",  # but for the weights of its sources, see trajectory_keys
        "adapter.init_from",
    }
)


@dataclass
class TrainState:
    """Counters at the end of a step. Randomness and data order follow from `step` and the seed.

    `num_rows` says where in the data that is, each pass over a row counting, and `plan_sha256` in which order: that of
    the epoch of the next step, taken when a checkpoint is made. A resume checks both against its own.
    """

    step: int = 0
    num_rows: int = 0
    plan_sha256: str = ""
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    train_s: float = 0.0
    best_step: int | None = None
    best_eval_loss: float | None = None
    evaluation_due: bool = False  # of this step: memory ran out in it

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrainState:
        """The inverse of `as_dict`; ResumeError when a key is missing, but for `evaluation_due`, or unknown."""
        names = {field.name for field in fields(cls)}
        if set(data) | {"evaluation_due"} != names:
            raise ResumeError(
                f"state.json has the keys {sorted(data)}, expected {sorted(names)}", fix="use another step"
            )
        return cls(**data)


@dataclass(frozen=True)
class Binding:
    """Fingerprints that a checkpoint belongs to; a resume with others is refused."""

    base: str
    data: str
    template: str
    recipe: dict[str, Any]
    tokenizer: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def refuse_difference(self, stored: dict[str, Any]) -> None:
        """ResumeError with a table of old and new values when the stored binding is not this one."""
        names = {
            "base": "the base model",
            "data": "the training data",
            "template": "the chat template",
            "tokenizer": "the tokenizer",
        }
        differing = [
            f"{what}: {str(stored.get(key))[:16]} at the checkpoint, {getattr(self, key)[:16]} now"
            for key, what in names.items()
            if stored.get(key) != getattr(self, key)
        ]
        old = stored.get("recipe", {})
        differing += [
            f"{key}: {old.get(key)} at the checkpoint, {self.recipe.get(key)} now"
            for key in sorted(set(old) | set(self.recipe))
            if old.get(key) != self.recipe.get(key)
        ]
        if differing:
            raise ResumeError(
                "this is not the run of the checkpoint: " + "; ".join(differing),
                fix="restore these values, or start a new run in another run.dir",
            )


def trajectory_keys(recipe: Recipe) -> dict[str, Any]:
    """Every key of the recipe, dotted, that decides what is trained, and how often each source is."""
    keys: dict[str, Any] = {}
    for section, values in recipe.model_dump(mode="json").items():
        for key, value in values.items():
            if f"{section}.{key}" not in NEUTRAL_KEYS:
                keys[f"{section}.{key}"] = value
    keys["data.train.weight"] = [source.weight for source in recipe.data.train]
    return keys
