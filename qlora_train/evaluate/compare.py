"""The distance between two models on the same tokens: KL divergence, top-1 agreement, negative log-likelihood."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_train.data.loader import MicroBatch
from qlora_train.model.causal import CausalModel, Head
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


@dataclass(frozen=True)
class Observed:
    """What a model makes of some rows: hidden states of every real position but the last, and its output head."""

    hidden_NH: Tensor  # on the CPU
    labels_N: Tensor  # the next token, IGNORE_INDEX where it is not supervised
    head: Head


@torch.inference_mode()
def observe(causal: CausalModel, batches: Iterable[MicroBatch], device: torch.device) -> Observed:
    """Run a model over rows and keep what is needed to compare it when it is gone."""
    hidden_states, labels = [], []
    for batch in batches:
        real = _real_targets(batch)
        on_device = batch.to(device)
        hidden: Tensor = causal.decoder(input_ids=on_device.input_ids, use_cache=False).last_hidden_state
        hidden_states.append(hidden[:, :-1].cpu()[real])
        labels.append(batch.labels[:, 1:][real])
    return Observed(torch.cat(hidden_states), torch.cat(labels), causal.head)


@torch.inference_mode()
def distance(reference: Observed, candidate: Observed) -> Distance:
    """Measure a candidate against a reference that saw the same rows.

    Softmax and sums in float32, `CHUNK_TOKENS` positions at a time: never all logits.
    """
    sums = _Sums()
    for start in range(0, len(reference.labels_N), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        logits = [
            seen.head.logits(seen.hidden_NH[part].to(seen.head.weight_VH.device)) for seen in (reference, candidate)
        ]
        sums.add(logits[0], logits[1].to(logits[0].device), reference.labels_N[part].to(logits[0].device))
    return sums.distance()


def _real_targets(batch: MicroBatch) -> Tensor:
    """Mask (B, T-1): positions whose next token is no padding."""
    lengths = torch.tensor(batch.row_lengths)
    return torch.arange(1, batch.input_ids.shape[1])[None, :] < lengths[:, None]
