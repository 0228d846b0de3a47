"""Trained rows for single tokens, in the embedding and the output head: PEFT's layers with a forward of ours.

PEFT's forward copies the whole table and forms a gradient of its size. Ours computes with the frozen table and puts the
trained rows in the place of its own: nothing of the table's size is made, and rows that it lacks can follow its last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import Tensor, nn

from qlora_train.adapters.config import AdapterConfig
from qlora_train.adapters.layers import register_layers
from qlora_train.adapters.module_names import is_named
from qlora_train.errors import ModelError
from qlora_train.loss import TrainedRows, head_logits
from qlora_train.names import PEFT_PREFIX

# The largest value of an embedding's row that was never trained: of reserved tokens, such as <|eot_id|> in the base of
# Llama 3, whose values are about 1e-23. The bound that Unsloth and Axolotl have for it.
NEVER_TRAINED = 1e-16
_BLOCK_ROWS = 4096  # of a table that is averaged
# Ids by the name of the module whose rows they are, as PEFT's `trainable_token_indices` has them.
TokenIds = dict[str, list[int]]


@dataclass(frozen=True)
class NewTokens:
    """The tokens of `adapter.new_tokens`, as the run's tokenizer numbers them."""

    texts: tuple[str, ...]
    ids: tuple[int, ...]
    added: tuple[bool, ...]  # to the tokenizer, which did not know them

    @classmethod
    def placeholders(cls, texts: Sequence[str], num_rows: int) -> NewTokens:
        """As many tokens, for a model without values that has rows for none of them: this takes the most."""
        return cls(tuple(texts), tuple(range(num_rows, num_rows + len(texts))), (True,) * len(texts))

    @property
    def sorted_ids(self) -> list[int]:
        """In the order of the rows that are trained."""
        return sorted(self.ids)

    def num_lacking(self, num_rows: int) -> int:
        """How many of them an embedding of so many rows has none for."""
        return sum(number >= num_rows for number in self.ids)


class TokenLayer(TrainableTokensLayer):
    """An embedding or a head with trained rows, which PEFT holds and saves. One adapter is active at a time."""

    held_ids: dict[str, Tensor]  # of each adapter's rows, on their device

    def trained(self) -> TrainedRows | None:
        """The rows that the layer computes with now; None where its table does.

        Where adapters are off, those that the table lacks stay, as they were at their start: ids must mean something.
        """
        assert not self.merged, "an export merges from files"
        if self.disable_adapters:
            return self._lacking()
        active = [name for name in self.active_adapters if name in self.trainable_tokens_delta]
        if not active:
            return self._lacking()
        (name,) = active
        ids_R = self._ids(name)
        return TrainedRows(ids_R, self.trainable_tokens_delta[name], self._num_new(name))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Of an embedding: x (..., ) ids to (..., H). Of a head: x (..., H) to logits (..., V)."""
        base, rows = self.get_base_layer(), self.trained()
        if isinstance(base, nn.Linear):
            return head_logits(x, base.weight, base.bias, rows)
        if rows is None:
            result: Tensor = base(x)
            return result
        place = torch.searchsorted(rows.ids_R, x).clamp_(max=len(rows.ids_R) - 1)
        is_trained = rows.ids_R[place] == x
        frozen = base(x.clamp(max=base.num_embeddings - 1) if rows.num_new else x)
        # Gathered in float32: the gradient of a token that occurs often is a sum of many terms.
        own = nn.functional.embedding(place, rows.rows_RH).to(frozen.dtype)
        if (scale := self._get_embed_scale()) is not None:
            own = own * scale.to(own.dtype)
        return torch.where(is_trained[..., None], own, frozen)

    @property
    def num_lacking(self) -> int:
        """Rows that the table lacks and the adapter has."""
        return max(map(self._num_new, self.token_indices), default=0)

    @torch.no_grad()
    def start_lacking(self, mean_H: Tensor) -> None:
        """Give rows that the table lacks their start; those of an adapter that is loaded are its own afterwards."""
        for name in self.token_indices:
            if count := self._num_new(name):
                self.trainable_tokens_original[name][-count:] = mean_H

    def get_merged_weights(self, active_adapters: Any) -> Tensor:
        """The whole table, which PEFT's wrapper gives for its `weight`: nothing of ours asks for it."""
        weight, rows = self.get_base_layer().weight, self.trained()
        if rows is None:
            return weight
        lacking = weight.new_empty((rows.num_new, weight.shape[1]))
        return torch.cat([weight, lacking]).index_copy(0, rows.ids_R, rows.rows_RH.to(weight))

    def _ids(self, adapter: str) -> Tensor:
        device = self.get_base_layer().weight.device
        held = self.held_ids.get(adapter)
        if held is None or held.device != device:
            with torch.inference_mode(False):  # kept for calls with gradients
                held = self.held_ids[adapter] = torch.tensor(self.token_indices[adapter], device=device)
        return held

    def _num_new(self, adapter: str) -> int:
        num_rows = self.get_base_layer().weight.shape[0]
        return sum(number >= num_rows for number in self.token_indices[adapter])

    def _lacking(self) -> TrainedRows | None:
        """The start of the rows that the table lacks."""
        for name in self.token_indices:
            if count := self._num_new(name):
                return TrainedRows(self._ids(name)[-count:], self.trainable_tokens_original[name][-count:], count)
        return None


def token_layers(model: nn.Module) -> dict[str, TokenLayer]:
    """The embedding and the head that have trained rows, by the base's own name of the module."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, TokenLayer)}
    return {name.removesuffix(".token_adapter").removeprefix(PEFT_PREFIX): layer for name, layer in found.items()}


def frozen_part(module: nn.Module) -> nn.Module:
    """An embedding or a head itself, without what PEFT put around it."""
    layer = token_layer(module)
    return module if layer is None else layer.get_base_layer()


def token_layer(module: nn.Module) -> TokenLayer | None:
    """The trained rows of an embedding or a head; None where it has none."""
    layer = getattr(module, "token_adapter", None)
    return layer if isinstance(layer, TokenLayer) else None


def tables_of(model: Any) -> dict[str, Any]:
    """Embedding and output head by name; the embedding alone where they are tied."""
    modules = {id(module): name for name, module in model.named_modules()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = {modules[id(table)]: table}
    if head is not None and head.weight is not table.weight:
        found[modules[id(head)]] = head
    return found


def indices_for(model: Any, tokens: NewTokens) -> TokenIds:
    """PEFT's `trainable_token_indices`: in the embedding, and in the head where it is a table of its own.

    ModelError for ids that would leave a gap after the table's last row, and for a head with a bias.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ModelError(
            f"adapter.new_tokens: the output head of a {type(model).__name__} has a bias, which PEFT leaves out of a "
            "head with trained rows",
            fix="leave adapter.new_tokens out for this model",
        )
    _refuse_gap(tokens.sorted_ids, table.weight.shape[0])
    return dict.fromkeys(tables_of(model), tokens.sorted_ids)


def _refuse_gap(ids: Sequence[int], num_rows: int) -> None:
    """ModelError unless the ids that a table has no rows for follow its last."""
    new = [number for number in ids if number >= num_rows]
    if new != list(range(num_rows, num_rows + len(new))):
        raise ModelError(
            f"adapter.new_tokens: the model's embedding has {num_rows:,} rows, and the tokens have the ids "
            f"{', '.join(f'{number:,}' for number in new[:8])}: ids before them have no rows either",
            fix="name tokens that the tokenizer knows and the model has rows for",
        )


def build_peft_model(model: nn.Module, config: AdapterConfig) -> PeftModel:
    """`get_peft_model` with our layers, rows of tokens among them, in float32.

    PEFT reads the start of every row from the table. Rows that the table lacks borrow its last one, until they are
    given a start or their trained values.
    """
    wanted = config.trainable_token_indices
    if wanted is None:
        return get_peft_model(model, register_layers(config))
    tables = tables_of(model)
    named: TokenIds = wanted if isinstance(wanted, dict) else {next(iter(tables)): wanted}
    asked = {_full_name(name, tables): ids for name, ids in named.items()}
    last = {name: tables[name].weight.shape[0] - 1 for name in asked}
    for name, ids in asked.items():
        _refuse_gap(ids, last[name] + 1)
    config.trainable_token_indices = {n: [min(number, last[n]) for number in ids] for n, ids in asked.items()}
    peft_model = get_peft_model(model, register_layers(config))
    config.trainable_token_indices = wanted
    _use_token_layers(peft_model, asked, trainable=not config.inference_mode)
    head = peft_model.get_output_embeddings()
    if len(tables) == 1 and head is not None and token_layer(head) is None:
        raise AssertionError("PEFT left a tied head without the rows of its embedding")
    return peft_model


def _full_name(name: str, tables: Mapping[str, Any]) -> str:
    """The table that a name of PEFT's config means: its own name, or the end of it."""
    for full_name in tables:
        if is_named(full_name, [name]):
            return full_name
    raise ModelError(
        f"the adapter trains rows of {name}; this model's tables are {', '.join(tables)}",
        fix="use the base that it was trained on",
    )


def _use_token_layers(model: nn.Module, asked: TokenIds, *, trainable: bool) -> None:
    """Give the layers that PEFT made our forward, the ids that were asked for, and rows in float32."""
    made = {n: m for n, m in model.named_modules() if type(m) is TrainableTokensLayer}
    ids_of = {f"{name}.token_adapter": ids for name, ids in asked.items()}
    for full_name, module in made.items():
        module.__class__ = TokenLayer
        layer: Any = module
        layer.held_ids = {}
        if layer.tied_adapter is not None:  # it holds nothing of its own
            continue
        ids = next(ids for name, ids in ids_of.items() if full_name.endswith(name))
        for adapter in layer.trainable_tokens_delta:
            layer.token_indices[adapter] = list(ids)
            rows = layer.trainable_tokens_delta[adapter]
            layer.trainable_tokens_delta[adapter] = nn.Parameter(rows.detach().float(), requires_grad=trainable)
            layer.trainable_tokens_original[adapter] = layer.trainable_tokens_original[adapter].float()
        if layer.num_lacking:
            layer.start_lacking(mean_row(layer.get_base_layer().weight.split(_BLOCK_ROWS)))


@torch.no_grad()
def start_rows(model: nn.Module, tokens: NewTokens, adapter: str) -> None:
    """Start the rows of tokens that the model cannot know from the mean of all rows of their table, each table's own.

    These are tokens that were added to the tokenizer, those that the table lacks, and known ones whose row of the
    embedding was never trained: it holds zeros, at which an RMS norm's gradients are huge. All others start as they
    are. With the mean, the distribution over tokens is bounded in its KL from the one before (Hewitt, "Initializing New
    Word Embeddings for Pretrained Language Models", 2021, nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """
    own = [layer for layer in token_layers(model).values() if layer.tied_adapter is None]
    fresh = {number for number, added in zip(tokens.ids, tokens.added, strict=True) if added}
    for layer in own:
        if not layer.trainable_tokens_delta[adapter].is_meta:
            fresh |= _never_trained(layer, adapter)
    for layer in own:
        rows, table = layer.trainable_tokens_delta[adapter], layer.get_base_layer().weight
        chosen = [at for at, number in enumerate(layer.token_indices[adapter]) if number in fresh]
        if chosen and not rows.is_meta:
            rows[chosen] = mean_row(table.split(_BLOCK_ROWS))


def _never_trained(layer: Any, adapter: str) -> set[int]:
    """Tokens that the table lacks, and of an embedding those whose row holds zeros."""
    base, ids = layer.get_base_layer(), layer.token_indices[adapter]
    is_dead = (layer.trainable_tokens_delta[adapter].abs().amax(1) <= NEVER_TRAINED).tolist()
    dead = {number for number, flag in zip(ids, is_dead, strict=True) if flag and isinstance(base, nn.Embedding)}
    return dead | {number for number in ids if number >= len(base.weight)}


@torch.no_grad()
def mean_row(blocks: Iterable[Tensor]) -> Tensor:
    """The mean (H,) of all rows of a table in float32, from blocks of it, summed in float64: no copy of the table."""
    sums, counts = zip(*((block.sum(0, dtype=torch.float64), len(block)) for block in blocks), strict=True)
    return (torch.stack(sums).sum(0) / sum(counts)).float()
