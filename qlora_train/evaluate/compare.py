"""The distance between two models on the same tokens: KL divergence, top-1 agreement, negative log-likelihood."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_train.data.loader import MicroBatch
from qlora_train.model.causal import CausalModel
from qlora_train.names import IGNORE_INDEX

CHUNK_TOKENS = 256


@dataclass(frozen=True)
class Distance:
    """A candidate against a reference, over every real token but each row's first."""

    num_tokens: int
    num_supervised_tokens: int
    mean_kl: float  # KL(reference || candidate), nats per token
    max_kl: float
    top1_agreement: float  # share of tokens for which both name the same next token
    reference_nll: float  # nats per supervised token
    candidate_nll: float


class _Sums:
    def __init__(self) -> None:
        self.kl = self.max_kl = self.agree = self.reference_nll = self.candidate_nll = 0.0
        self.num_tokens = self.num_supervised = 0

    def add(self, reference_NV: Tensor, candidate_NV: Tensor, labels_N: Tensor) -> None:
        log_p, log_q = reference_NV.log_softmax(-1), candidate_NV.log_softmax(-1)
        kl_N = (log_p.exp() * (log_p - log_q)).sum(-1)
        self.kl += float(kl_N.sum())
        self.max_kl = max(self.max_kl, float(kl_N.max()))
        self.agree += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        self.num_tokens += len(kl_N)
        supervised = labels_N != IGNORE_INDEX
        targets = labels_N[supervised][:, None]
        self.reference_nll -= float(log_p[supervised].gather(1, targets).sum())
        self.candidate_nll -= float(log_q[supervised].gather(1, targets).sum())
        self.num_supervised += len(targets)

    def distance(self) -> Distance:
        supervised = max(self.num_supervised, 1)
        return Distance(
            num_tokens=self.num_tokens,
            num_supervised_tokens=self.num_supervised,
            mean_kl=self.kl / self.num_tokens,
            max_kl=self.max_kl,
            top1_agreement=self.agree / self.num_tokens,
            reference_nll=self.reference_nll / supervised,
            candidate_nll=self.candidate_nll / supervised,
        )


def _hidden(causal: CausalModel, batch: MicroBatch) -> Tensor:
    hidden: Tensor = causal.decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    return hidden[:, :-1]


@torch.inference_mode()
def compare(
    reference: CausalModel,
    candidates: dict[str, Callable[[MicroBatch], tuple[CausalModel, Tensor]]],
    batches: Iterable[MicroBatch],
) -> dict[str, Distance]:
    """Measure candidates against one reference. A candidate maps a batch to (its head's model, hidden states).

    Softmax and sums in float32, `CHUNK_TOKENS` positions at a time: never all logits of a batch.
    """
    sums = {name: _Sums() for name in candidates}
    for batch in batches:
        real = _real_targets(batch)
        reference_NH = _hidden(reference, batch)[real]
        labels_N = batch.labels[:, 1:][real]
        for name, candidate in candidates.items():
            causal, hidden = candidate(batch)
            candidate_NH = hidden[real]
            for start in range(0, len(labels_N), CHUNK_TOKENS):
                part = slice(start, start + CHUNK_TOKENS)
                sums[name].add(reference.logits(reference_NH[part]), causal.logits(candidate_NH[part]), labels_N[part])
    return {name: s.distance() for name, s in sums.items()}


def _real_targets(batch: MicroBatch) -> Tensor:
    """Mask (B, T-1): positions whose next token is no padding."""
    lengths = torch.tensor(batch.row_lengths, device=batch.input_ids.device)
    return torch.arange(1, batch.input_ids.shape[1], device=batch.input_ids.device)[None, :] < lengths[:, None]


def plain(causal: CausalModel) -> Callable[[MicroBatch], tuple[CausalModel, Tensor]]:
    """A candidate that is a model of its own."""
    return lambda batch: (causal, _hidden(causal, batch))


def adapter_off(causal: CausalModel) -> Callable[[MicroBatch], tuple[CausalModel, Tensor]]:
    """The negative control: the same model without its adapter."""

    def run(batch: MicroBatch) -> tuple[CausalModel, Tensor]:
        with causal.model.disable_adapter():
            return causal, _hidden(causal, batch)

    return run
