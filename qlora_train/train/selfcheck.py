"""Before training, on the user's own model: rows that are batched together give what each gives alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_train.data.loader import MicroBatch, collate
from qlora_train.data.table import TokenTable
from qlora_train.errors import ModelError
from qlora_train.model.attention import PLAIN_TOKENS
from qlora_train.model.causal import CausalModel

MAX_ROWS = 4
MAX_TOKENS = 1024  # of the short rows, unless the two shortest hold more
# Attention takes another path above PLAIN_TOKENS, and sliding windows are wider than short rows: one long row besides.
MAX_LONG_TOKENS = 2048
# So some ten forward passes of at most 3,072 tokens (padded 3 x 2,048), or of the two shortest rows: seconds on a CPU
# for a small model.
# Nats per supervised token. The two paths add up in another order, and each sum is rounded anew: in bfloat16 (2^-9 a
# rounding) a logit of 20 to 30 moves by some 0.05, which a token of little loss shows as well as one of much (measured
# on SmolLM2: 0.02 before and 0.05 after training); float32 stays below 1e-5. A row that reads its neighbour differs in
# every logit after the first; that no bit of it changes is checked besides, without a tolerance. Rows that the model
# finds very unlikely (10 nats a token) have larger logits at play: there a share of the loss is allowed (measured on an
# H100 with DoRA: 0.16 of 10.7 nats).
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15}
LOSS_SHARE = {torch.float32: 1e-4, torch.bfloat16: 0.03}
# Of hidden states of other rows, with a mixture of experts.
EXPERTS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class SelfCheck:
    """What was measured. Changes are the largest of any hidden state."""

    num_rows: int
    num_tokens: int
    weight_sum: float  # supervised tokens, by their weights
    loss_together: float  # summed, in nats
    loss_alone: float
    change_in_other_rows: float | None  # when a row's first token is replaced; None: not packed
    change_in_the_row: float | None  # the smallest of all rows, as a control
    loss_tolerance: float  # nats per supervised token
    change_allowed: float  # in other rows

    @property
    def loss_error(self) -> float:
        """Nats per supervised token by which rows together and alone differ."""
        return abs(self.loss_together - self.loss_alone) / self.weight_sum

    @property
    def fix(self) -> str:
        """What to set where rows are not kept apart."""
        packed = self.change_in_other_rows is not None
        return "set data.batching: length_grouped" if packed else "set train.micro_batch_size: 1"

    def fault(self) -> str:
        """How rows together are not what they are alone; empty where they are. NaN is a difference."""
        if not self.loss_error <= self.loss_tolerance:
            return f"their loss differs by {self.loss_error:.2g} nats a token (at most {self.loss_tolerance:.2g})"
        if self.change_in_other_rows is not None and not self.change_in_other_rows <= self.change_allowed:
            return f"replacing a token changes other rows by {self.change_in_other_rows:g}"
        if self.change_in_the_row is not None and not self.change_in_the_row > 0:
            return "replacing a token does not even change its own row"
        return ""

    def summary(self) -> str:
        """One line for people."""
        text = f"{self.num_rows} rows, {self.num_tokens} tokens: summed loss {self.loss_together:.6g} together"
        text += f" and {self.loss_alone:.6g} alone, {self.loss_error:.2g} nats a token apart"
        text += f" (at most {self.loss_tolerance:.2g})"
        if self.change_in_other_rows is not None:
            text += f"; replacing a token changes other rows by {self.change_in_other_rows:g}"
            text += f" and its own by {self.change_in_the_row:.3g}"
        return text

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def selfcheck(
    causal: CausalModel, table: TokenTable, pad_token_id: int, device: torch.device, *, packed: bool
) -> SelfCheck:
    """What `compare_rows` measures; ModelError with the numbers when rows together are not what they are alone."""
    result = compare_rows(causal, table, pad_token_id, device, packed=packed)
    if what := result.fault():
        raise ModelError(f"rows together are not what they are alone: {what}. {result.summary()}", fix=result.fix)
    return result


@torch.no_grad()
def compare_rows(
    causal: CausalModel, table: TokenTable, pad_token_id: int, device: torch.device, *, packed: bool
) -> SelfCheck:
    """Measure a few rows together, as training batches them, and each alone.

    Packed: furthermore, replacing the first token of a row leaves every other row's hidden states the same to the bit;
    with a mixture of experts, whose matmuls join the tokens of all rows by expert, the same up to rounding.
    Runs in eval mode, draws no random number, and leaves the model in the mode it was in.
    """
    rows = _rows(table)
    was_training = causal.model.training
    causal.model.eval()
    try:
        together = collate(table, [rows] if packed else [[row] for row in rows], pad_token_id, packed=packed).to(device)
        alone = sum(float(causal.loss_sum(collate(table, [[row]], pad_token_id).to(device))) for row in rows)
        hidden = causal.hidden(together)
        changes = _changes(causal, together, hidden) if packed else None
        allowed = EXPERTS_TOLERANCE[hidden.dtype] if has_experts(causal) else 0.0
        return SelfCheck(
            num_rows=len(rows),
            num_tokens=together.num_tokens,
            weight_sum=together.weight_sum,
            loss_together=float(causal.loss_sum(together)),
            loss_alone=alone,
            change_in_other_rows=None if changes is None else float(changes[:, 0].max()),
            change_in_the_row=None if changes is None else float(changes[:, 1].min()),
            loss_tolerance=_tolerance(hidden.dtype, alone / together.weight_sum),
            change_allowed=allowed,
        )
    finally:
        causal.model.train(was_training)


def _tolerance(dtype: torch.dtype, loss: float) -> float:
    """Nats per supervised token, for rows of such a loss; one that is no number allows nothing more."""
    share = LOSS_SHARE[dtype] * loss
    return max(LOSS_TOLERANCE[dtype], share) if math.isfinite(share) else LOSS_TOLERANCE[dtype]


def has_experts(causal: CausalModel) -> bool:
    """Whether the model is a mixture of experts."""
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return any(getattr(causal.decoder.config.get_text_config(), name, None) for name in names)


def _rows(table: TokenTable) -> list[int]:
    """Two to four of the shortest rows that are supervised; a single one stands for two.

    Where all of them are short and a longer row is not too long, the longest such row between the two shortest.
    """
    supervised = np.flatnonzero(table.num_supervised)
    by_length = supervised[np.argsort(table.lengths[supervised], kind="stable")]
    lengths = table.lengths[by_length]
    fitting = max(2, int((np.cumsum(lengths[:MAX_ROWS], dtype=np.int64) <= MAX_TOKENS).sum()))
    rows: list[int] = by_length[:fitting].tolist()
    last = int(np.searchsorted(lengths, MAX_LONG_TOKENS, side="right")) - 1
    if lengths[:fitting].max() <= PLAIN_TOKENS < lengths[last]:
        rows = [rows[0], int(by_length[last]), rows[1]]
    return rows if len(rows) > 1 else rows * 2


def _changes(causal: CausalModel, batch: MicroBatch, before: Tensor) -> Tensor:
    """(rows, 2): when a row's first token is replaced, the largest change in the other rows, and in the row itself."""
    assert batch.row_starts is not None
    spans = [slice(start, start + n) for start, n in zip(batch.row_starts, batch.row_lengths, strict=True)]
    flat_before = before.flatten(0, 1).float()
    changes = []
    for index, span in enumerate(spans):
        original = batch.input_ids[0, span.start].item()
        batch.input_ids[0, span.start] = 0 if original else 1
        difference = (causal.hidden(batch).flatten(0, 1).float() - flat_before).abs()
        batch.input_ids[0, span.start] = original
        others = torch.cat([difference[other] for at, other in enumerate(spans) if at != index])
        changes.append(torch.stack([others.max(), difference[span].max()]))  # NaN goes through
    return torch.stack(changes)
