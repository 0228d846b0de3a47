"""Held-out loss of the real model with its linear layers rounded by each code; differences are paired by row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comparing.codes import CODES
from qlora_train.data.loader import MicroBatch, eval_batches
from qlora_train.evaluate.compare import Observed, observe
from qlora_train.names import IGNORE_INDEX
from qlora_train.recipe.schema import Recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SETS = {"text_jargon": RECIPES / "jargon.yaml", "shell": RECIPES / "quickstart.yaml"}
CHUNK_TOKENS = 256


@dataclass(frozen=True)
class RowLosses:
    """Summed loss in nats and supervised tokens of each row."""

    loss_R: Tensor
    tokens_R: Tensor

    @property
    def loss(self) -> float:
        """Nats per supervised token."""
        return float(self.loss_R.sum() / self.tokens_R.sum())

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    def above(self, other: RowLosses) -> tuple[float, float]:
        """How much higher this loss is than the other on the same rows, and the standard error of that.

        A ratio of sums over independent rows (Cochran, Sampling Techniques, 6.4).
        """
        rise_R = self.loss_R - other.loss_R
        mean = float(rise_R.sum() / self.tokens_R.sum())
        squares = float(((rise_R - mean * self.tokens_R) ** 2).sum())
        count = len(rise_R)
        return mean, math.sqrt(squares * count / max(count - 1, 1)) / float(self.tokens_R.sum())


@dataclass(frozen=True)
class HeldOut:
    """The model that is to be rounded, and the rows of each set."""

    causal: Any
    batches: Mapping[str, tuple[MicroBatch, ...]]
    weights: Mapping[str, Tensor]  # of the linear layers, as the files have them
    recipe: Recipe


def load_held_out(max_rows: int | None, shared: Iterable[str] = ()) -> HeldOut:
    """The recipes' model in bf16, and the first held-out rows of both sets."""
    from qlora_train.data.split import load_split
    from qlora_train.model.causal import CausalModel
    from qlora_train.model.load import load_recipe_base
    from qlora_train.model.skeleton import linear_layers, load_tokenizer
    from qlora_train.model.source import resolve_source
    from qlora_train.recipe.load import load_recipe

    batches = {}
    limit = "null" if max_rows is None else str(max_rows)
    for name, path in SETS.items():
        said = (f"data.max_eval_rows={limit}", "quant.quant_type=none", *shared)
        recipe = load_recipe(path, said).recipe
        tokenizer = load_tokenizer(resolve_source(recipe.model), recipe.model.chat_template)
        split = load_split(recipe.data, "eval", tokenizer, recipe.run.seed)
        batches[name] = tuple(eval_batches(split.table, recipe.eval.batch_size, tokenizer.pad_token_id))
    base = load_recipe_base(resolve_source(recipe.model), recipe)
    base.model.eval()
    weights = {name: layer.weight.detach().clone() for name, layer in linear_layers(base.model).items()}
    return HeldOut(CausalModel(base.model), batches, weights, recipe)


@dataclass(frozen=True)
class Rounded:
    """The model with its linear layers rounded by a code."""

    code: str
    error: float  # of all linear layers together, ||W - W'|| / ||W||
    losses: Mapping[str, RowLosses]  # by set


@torch.inference_mode()
def round_by_code(held_out: HeldOut, codes: Iterable[str] = CODES) -> Iterator[Rounded]:
    """Round, and measure each set, by one code after the other. The weights are the files' again afterwards."""
    for code in codes:
        error = _put(held_out, code)
        device = held_out.causal.head.device
        losses = {
            name: row_losses(observe(held_out.causal, batches, device)) for name, batches in held_out.batches.items()
        }
        yield Rounded(code, error, losses)
    _put(held_out, "bf16")


def _put(held_out: HeldOut, code: str) -> float:
    """Write the rounded weights into the model; their error in float32, before it rounds them to its own dtype."""
    lost = total = 0.0
    for name, weight in held_out.weights.items():
        rounded = CODES[code](weight)
        held_out.causal.model.get_submodule(name).weight.copy_(rounded)
        lost += float((rounded - weight.float()).double().square().sum())
        total += float(weight.double().square().sum())
    return math.sqrt(lost / total)


@torch.inference_mode()
def row_losses(seen: Observed) -> RowLosses:
    """The loss of each row from what a model made of it; softmax in float32, never all logits at once."""
    num_rows = int(seen.rows_N.max()) + 1
    loss_R, tokens_R = torch.zeros(num_rows, dtype=torch.float64), torch.zeros(num_rows, dtype=torch.float64)
    chosen = (seen.labels_N != IGNORE_INDEX).nonzero()[:, 0]
    for part in chosen.split(CHUNK_TOKENS):
        logits = seen.head.logits(seen.hidden_NH[part].to(seen.head.device))
        found = torch.nn.functional.cross_entropy(logits, seen.labels_N[part].to(logits.device), reduction="none")
        loss_R.index_add_(0, seen.rows_N[part], found.double().cpu())
        tokens_R.index_add_(0, seen.rows_N[part], torch.ones(len(part), dtype=torch.float64))
    return RowLosses(loss_R, tokens_R)


def quantised_loss(held_out: HeldOut, set_name: str, quant_type: str, *, double_quant: bool) -> float:
    """The same loss through the 4-bit layers that training uses: what the rounded dense model stands for."""
    from qlora_train.model.causal import CausalModel
    from qlora_train.model.load import load_recipe_base
    from qlora_train.model.source import resolve_source
    from qlora_train.recipe.schema import QuantSection

    quant = QuantSection(quant_type=quant_type, double_quant=double_quant)  # type: ignore[arg-type]
    recipe = held_out.recipe.model_copy(update={"quant": quant})
    base = load_recipe_base(resolve_source(recipe.model), recipe)
    base.model.eval()
    return row_losses(observe(CausalModel(base.model), held_out.batches[set_name], base.device)).loss
