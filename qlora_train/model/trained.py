"""Loading again what a run trained: the same base, proven by its fingerprint, with the adapter on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from qlora_train.adapters.attach import load_adapter
from qlora_train.adapters.inits.residual import takes_from_base
from qlora_train.adapters.state import load_adapter_config
from qlora_train.artifacts.files import read_json
from qlora_train.artifacts.layout import RunDir
from qlora_train.data.fates import Side
from qlora_train.data.split import Split, load_split
from qlora_train.errors import DataError, ModelError, RecipeError
from qlora_train.model.binding import check_published, read_base, read_binding, refuse_changed_recipe, refuse_other_base
from qlora_train.model.load import Base, add_end_tokens, load_recipe_base
from qlora_train.model.lord import RECORD, open_low_rank
from qlora_train.model.low_rank import with_ranks
from qlora_train.model.skeleton import load_config, load_tokenizer, template_digest, tokenizer_digest
from qlora_train.model.source import Source, resolve_source
from qlora_train.model.start import rebuild
from qlora_train.model.tokens import add_new_tokens
from qlora_train.quant.fingerprint import BasePrint
from qlora_train.recipe.load import load_resolved, with_overrides
from qlora_train.recipe.schema import Recipe

_NAMES = {"tokenizer": "tokenizer", "template": "chat template"}


@dataclass(frozen=True)
class FinishedRun:
    """What a run folder says of itself, without any weights."""

    run_dir: RunDir
    recipe: Recipe
    base_print: BasePrint
    commit: str | None  # of a hub id, as it was trained on
    binding: dict[str, Any]  # what the adapter belongs to, from its manifest

    def source(self) -> Source:
        """The base's folder, at the commit that was trained on; the decomposed one that the run keeps, where it has."""
        section = self.recipe.model
        if section.lord_keep_frac is not None:
            return open_low_rank(section.path, self.run_dir.low_rank, self.commit)
        return resolve_source(section.model_copy(update={"revision": self.commit or section.revision}))

    @property
    def num_merged_params(self) -> int:
        """Weights of the merged model: more than the base has where that is decomposed."""
        if self.recipe.model.lord_keep_frac is None:
            return self.base_print.num_params
        return int(read_json(self.run_dir.low_rank / RECORD)["num_dense_params"])

    def config(self, source: Source) -> Any:
        """transformers' config of the merged model: every layer whole, and a row for each token of the adapter's."""
        config = with_ranks(load_config(source), {})
        text = config.get_text_config()
        ids = load_adapter_config(self.run_dir.adapter).token_ids
        text.vocab_size = max([text.vocab_size, *(number + 1 for number in ids)])
        return config

    def tokenizer(self, source: Source) -> Any:
        """The tokenizer of the training: with its new tokens, and with the chat template, which the run folder keeps.

        ModelError when either is not the one of the training.
        """
        template = self.run_dir.chat_template
        tokenizer = load_tokenizer(source, template if template.is_file() else None)
        add_new_tokens(tokenizer, self.recipe.adapter.new_tokens)
        digests = {"tokenizer": tokenizer_digest(tokenizer), "template": template_digest(tokenizer)}
        for name, here in digests.items():
            if here != (then := self.binding.get(name)):
                where = self.run_dir.chat_template if name == "template" else source.name
                raise ModelError(
                    f"{where}: the {_NAMES[name]} is {here[:16]}, and the adapter was trained with {str(then)[:16]}",
                    fix=f"restore the {_NAMES[name]} of the training",
                )
        return tokenizer

    def load_split(self, side: Side, tokenizer: Any, **changes: Any) -> Split:
        """Rows of the recipe, with `changes` to its data section. DataError where held-out rows cannot be told again.

        Rows that `data.split` held out are those of lowest hash among all: from other files it would choose others,
        and rows that were trained on would pass for held-out ones.
        """
        section = self.recipe.data.model_copy(update=changes)
        split = load_split(section, side, tokenizer, self.recipe.run.seed)
        if section.split is not None:
            then = {entry["name"]: entry["sha256"] for entry in read_json(self.run_dir.data)["files"]}
            for source in split.sources:
                if then.get(source.source.name) != source.digest:
                    raise DataError(
                        f"the rows of this run were held out by data.split: {section.split}, and "
                        f"{source.source.name} has changed since: {str(then.get(source.source.name))[:16]} then, "
                        f"{source.digest[:16]} now",
                        fix="restore the file, or name held-out rows: data.eval=FILE",
                    )
        return split


def _refuse_other_reading(stored: Recipe, recipe: Recipe) -> None:
    """RecipeError where rows that `data.split` held out would be read in another way than in the training.

    The split ranks rows by what they ask. Read otherwise they ask something else, and rows that were trained on would
    pass for held-out ones.
    """
    if recipe.data.split is None:
        return
    for key in ("format", "columns"):
        then, now = getattr(stored.data, key), getattr(recipe.data, key)
        if then != now:
            raise RecipeError(
                f"the rows of this run were held out by data.split: {recipe.data.split}, which goes by what each row "
                f"asks, read with data.{key}: {then}; with {now} rows that were trained on would be among them",
                fix=f"leave data.{key} as it was, or name held-out rows: data.eval=FILE",
                where=f"data.{key}",
            )


@dataclass(frozen=True)
class Trained:
    """A run's base and adapter on the device."""

    run: FinishedRun
    base: Base
    model: PeftModel
    tokenizer: Any
    conversations: bool  # trained on rows of messages, not on plain prompts


def open_run(folder: Path, overrides: Sequence[str] = (), *, sections: Sequence[str] = ()) -> FinishedRun:
    """Read a run folder that holds an adapter; `overrides` may change keys of its recipe in `sections`.

    An entry of `sections` is a section or one key of it, dotted.

    ModelError when it is no run folder or the run did not end, RecipeError for an override that is out of place.
    """
    run_dir = RunDir(folder)
    if not run_dir.recipe.is_file():
        raise ModelError(
            f"{folder} is not a run folder: it holds no {run_dir.recipe.name}", fix="name the recipe's run.dir"
        )
    if not run_dir.adapter.is_dir():
        again = " --resume" if run_dir.checkpoint_steps() else ""
        raise ModelError(f"{folder} holds no finished adapter yet", fix=f"finish it: qlora-train train RECIPE{again}")
    check_published(run_dir.adapter)
    stored, binding = load_resolved(run_dir.recipe), read_binding(run_dir.adapter)
    refuse_changed_recipe(run_dir, stored, binding)
    recipe = with_overrides(stored, overrides, sections)
    if recipe.data.eval and recipe.data.split is not None:  # held-out rows of its own, named for this occasion
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"split": None})})
    _refuse_other_reading(stored, recipe)
    base_print, commit = read_base(run_dir)
    if base_print.digest != binding.get("base"):
        raise ModelError(
            f"{run_dir.base} describes the base {base_print.digest[:16]}, and the adapter was trained on "
            f"{str(binding.get('base'))[:16]}",
            fix="restore the run folder as it was",
        )
    return FinishedRun(run_dir, recipe, base_print, commit, binding)


def load_trained(run: FinishedRun) -> Trained:
    """Load base and adapter as they were trained. ModelError when the base is not the one that was trained on."""
    source = run.source()
    base = load_recipe_base(source, run.recipe)
    if not takes_from_base(run.run_dir.adapter):  # else its own weights are needed to tell
        refuse_other_base(run.base_print, base.print)
    data = read_json(run.run_dir.data)
    add_end_tokens(base.model, data["end_token_ids"])
    model = load_adapter(base.model, run.run_dir.adapter)
    base = rebuild(base, model)
    refuse_other_base(run.base_print, base.print)
    model.eval()
    return Trained(run, base, model, run.tokenizer(source), data["conversations"])


# What may be said anew of the rows that a finished run is measured on.
MEASURED_ON = tuple(
    f"data.{key}"
    for key in ("eval", "max_eval_rows", "format", "columns", "seq_len", "overlong", "bad_rows", "max_lost_frac")
)
