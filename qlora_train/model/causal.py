"""Running a causal language model for its loss: decoder, output head, and the proof that we know this head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from qlora_train.adapters.tokens import frozen_part, token_layer
from qlora_train.data.loader import MicroBatch
from qlora_train.errors import ModelError
from qlora_train.loss import TrainedRows, head_logits, linear_cross_entropy_sum
from qlora_train.model.attention import run_packed
from qlora_train.names import IGNORE_INDEX

# Relative to the largest logit. In float32 the two agree to 1e-6 on Llama, GPT-NeoX and Phi-3
# (tests/unit/model/test_causal.py); bfloat16 rounds a logit by up to 0.4 %. A head that scales or caps is far off.
HEAD_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Head:
    """The output head: logits = cap(hidden W^T + b). It is frozen, but for `rows` that stand in place of those of W."""

    weight_VH: Tensor
    bias_V: Tensor | None
    softcap: float
    rows: TrainedRows | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.weight_VH.device

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.weight_VH.shape[0] + (self.rows.num_new if self.rows else 0)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits (N, V) of chosen positions in float32."""
        logits = head_logits(hidden_NH, self.weight_VH, self.bias_V, self.rows).float()
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


class CausalModel:
    """A transformers causal model, with or without an adapter, seen as decoder plus head.

    `model` keeps its own modules; the decoder is run alone, so that logits of unsupervised positions never exist.
    """

    loss_sizes: tuple[int, int] | None = None  # tokens of the loss head's chunks and blocks; None: as the device has it

    def __init__(self, model: Any) -> None:
        self.model = model
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        self.decoder: Any = inner.base_model
        self._output: Any = inner.get_output_embeddings()
        output = None if self._output is None else frozen_part(self._output)
        if not isinstance(output, nn.Linear):
            raise ModelError(
                f"the output head is a {type(output).__name__}, not a linear layer", fix="use another model"
            )
        softcap = getattr(inner.config.get_text_config(), "final_logit_softcapping", None) or 0.0
        self._frozen_head = Head(output.weight, output.bias, float(softcap))
        self._inner = inner

    @property
    def head(self) -> Head:
        """The output head as it is now: rows of new tokens train, and go where the adapter is switched off."""
        layer = token_layer(self._output)
        return self._frozen_head if layer is None else replace(self._frozen_head, rows=layer.trained())

    @head.setter
    def head(self, head: Head) -> None:
        self._frozen_head = head

    def loss_sum(self, batch: MicroBatch) -> Tensor:
        """Summed cross-entropy (nats, float32 scalar) over the batch's supervised tokens, differentiable.

        Each token counts as often as it weighs; divide by the `weight_sum` of all that belongs together.
        """
        return self.loss_of(self.hidden(batch), batch)

    def loss_of(self, hidden_BTH: Tensor, batch: MicroBatch) -> Tensor:
        """As `loss_sum`, from the decoder's last hidden state."""
        targets = batch.labels[:, 1:]
        supervised, head = self._supervised(batch), self.head
        return linear_cross_entropy_sum(
            hidden_BTH[:, :-1][supervised],
            head.weight_VH,
            targets[supervised],
            bias_V=head.bias_V,
            rows=head.rows,
            weights_N=None if batch.weights is None else batch.weights[:, 1:][supervised],
            softcap=head.softcap,
            sizes=self.loss_sizes,
        )

    def _supervised(self, batch: MicroBatch) -> Any:
        """What picks the supervised positions out of (B, T - 1): their indices, or a mask where they are not known."""
        return batch.labels[:, 1:] != IGNORE_INDEX if batch.supervised is None else batch.supervised

    def hidden(self, batch: MicroBatch) -> Tensor:
        """The decoder's last hidden state (B, T, H); of no meaning where there is padding.

        Padding stands on the right and attention is causal, so a real token never sees it: no mask is needed. Rows of
        a pack are kept apart by their boundaries.
        """
        if batch.row_starts is not None:
            return run_packed(self.decoder, batch)
        hidden: Tensor = self.decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        return hidden

    @torch.no_grad()
    def check_head(self) -> None:
        """Refuse a model whose own logits are not ours: some architectures scale or cap them in ways we do not know."""
        device = self.head.weight_VH.device
        input_ids = torch.arange(1, 9, device=device)[None, :]
        own = self._inner(input_ids=input_ids, use_cache=False).logits[0].float()
        ours = self.head.logits(self.decoder(input_ids=input_ids, use_cache=False).last_hidden_state[0])
        error = float((own - ours).abs().max() / own.abs().max().clamp(min=1e-6))
        if not error <= HEAD_TOLERANCE:
            raise ModelError(
                f"the model's own logits differ from hidden W^T by {error:.1%}: its output head does more than we know",
                fix="report the architecture; training it would use a wrong loss",
            )
