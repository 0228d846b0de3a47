"""The distance between two models on the same tokens: KL divergence, top-1 agreement, negative log-likelihood."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from qlora_train.data.loader import MicroBatch
from qlora_train.model.causal import CausalModel
from qlora_train.names import IGNORE_INDEX

CHUNK_TOKENS = 256
CHUNK_LOGITS = 2**24  # of either side: 64 MiB, and some more of that size while they are compared


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
    nll_rise_se: float | None = None  # standard error of their difference, over rows; None for a single row


def kl_divergence(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """KL(p || q) of each row in nats, from log-probabilities that need not be normalised better than float32 can.

    The usual sum of p (log p - log q) carries the rounding of both normalisers, +-1e-7 in float32: more than a sound
    merge. With d = log p - log q and its mean m under p, KL is also log E_p[exp(m - d)], which is
    log1p E_p[expm1(m - d) - (m - d)]: the normalisers cancel. Right to 20 % at 1e-12 and to 1e-5 from 1e-6 on, for half
    of what float64 would take more. Where a probability is far larger in q, by exp(20), the usual sum is taken.
    """
    p_NV, difference_NV = log_p_NV.exp(), log_p_NV - log_q_NV
    sum_N1 = (p_NV * difference_NV).sum(-1, keepdim=True)
    centred_NV = sum_N1 - difference_NV
    small_N = (p_NV * (centred_NV.expm1() - centred_NV)).sum(-1).log1p()
    return torch.where(centred_NV.amax(-1) > 20, sum_N1[:, 0], small_N)


class _Sums:
    def __init__(self, num_rows: int) -> None:
        self.kl = self.max_kl = self.agree = self.reference_nll = self.candidate_nll = 0.0
        self.num_tokens = self.num_supervised = 0
        self.rise_R = torch.zeros(num_rows, dtype=torch.float64)  # of the loss, summed over a row
        self.supervised_R = torch.zeros(num_rows, dtype=torch.float64)

    def add(self, reference_NV: Tensor, candidate_NV: Tensor, labels_N: Tensor, rows_N: Tensor) -> None:
        log_p, log_q = reference_NV.log_softmax(-1), candidate_NV.log_softmax(-1)
        kl_N = kl_divergence(log_p, log_q)
        self.kl += float(kl_N.sum())
        self.max_kl = max(self.max_kl, float(kl_N.max()))
        self.agree += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        self.num_tokens += len(kl_N)
        supervised = labels_N != IGNORE_INDEX
        targets = labels_N[supervised][:, None]
        reference, candidate = (log[supervised].gather(1, targets)[:, 0].double() for log in (log_p, log_q))
        self.reference_nll -= float(reference.sum())
        self.candidate_nll -= float(candidate.sum())
        self.num_supervised += len(targets)
        rows = rows_N[supervised.cpu()]
        self.rise_R.index_add_(0, rows, (reference - candidate).cpu())
        self.supervised_R.index_add_(0, rows, torch.ones(len(rows), dtype=torch.float64))

    def _rise_se(self) -> float | None:
        """Of a ratio of sums over independent rows (Cochran, Sampling Techniques, 6.4)."""
        num_rows, num_tokens = int((self.supervised_R > 0).sum()), float(self.supervised_R.sum())
        if num_rows < 2:
            return None
        mean = float(self.rise_R.sum()) / num_tokens
        squares = float(((self.rise_R - mean * self.supervised_R) ** 2).sum())
        return math.sqrt(squares * num_rows / (num_rows - 1)) / num_tokens

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
            nll_rise_se=self._rise_se(),
        )


class OutputHead(Protocol):
    """What turns hidden states into logits."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def vocab_size(self) -> int:
        """V."""

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits (N, V) in float32."""


class ObservedBatch(NamedTuple):
    """What a model makes of one batch: every real position but each row's last."""

    hidden_NH: Tensor  # on the CPU
    labels_N: Tensor  # the next token, IGNORE_INDEX where it is not supervised
    rows_N: Tensor  # which row of the batch


@dataclass(frozen=True)
class Observed:
    """What a model makes of some rows, and its output head: enough to compare it when it is gone."""

    hidden_NH: Tensor
    labels_N: Tensor
    rows_N: Tensor  # numbered through
    head: OutputHead

    @classmethod
    def of(cls, batches: Sequence[ObservedBatch], head: OutputHead) -> Observed:
        """All batches, in their order."""
        rows, first = [], 0
        for batch in batches:
            rows.append(batch.rows_N + first)
            first = int(rows[-1].max()) + 1 if len(batch.rows_N) else first
        hidden, labels = torch.cat([b.hidden_NH for b in batches]), torch.cat([b.labels_N for b in batches])
        return cls(hidden, labels, torch.cat(rows), head)


@torch.inference_mode()
def observe(causal: CausalModel, batches: Iterable[MicroBatch], device: torch.device) -> Observed:
    """Run a model over rows and keep what is needed to compare it when it is gone."""
    return Observed.of([observe_batch(causal.decoder, batch, device) for batch in batches], causal.head)


@torch.inference_mode()
def observe_batch(decoder: Any, batch: MicroBatch, device: torch.device) -> ObservedBatch:
    """Run a decoder over one batch."""
    real = _real_targets(batch)
    hidden: Tensor = decoder(input_ids=batch.to(device).input_ids, use_cache=False).last_hidden_state
    rows = torch.arange(len(real))[:, None].expand_as(real)
    return ObservedBatch(hidden[:, :-1].cpu()[real], batch.labels[:, 1:][real], rows[real])


@torch.inference_mode()
def distance(reference: Observed, candidate: Observed) -> Distance:
    """Measure a candidate against a reference that saw the same rows.

    Softmax and sums in float32, `CHUNK_TOKENS` positions at a time, fewer where the vocabulary is large: never all
    logits.
    """
    chunk = min(CHUNK_TOKENS, max(1, CHUNK_LOGITS // reference.head.vocab_size))
    sums = _Sums(int(reference.rows_N.max()) + 1 if len(reference.rows_N) else 0)
    for start in range(0, len(reference.labels_N), chunk):
        part = slice(start, start + chunk)
        logits = [seen.head.logits(seen.hidden_NH[part].to(seen.head.device)) for seen in (reference, candidate)]
        device = logits[0].device
        sums.add(logits[0], logits[1].to(device), reference.labels_N[part].to(device), reference.rows_N[part])
    return sums.distance()


def _real_targets(batch: MicroBatch) -> Tensor:
    """Mask (B, T-1): positions whose next token is no padding."""
    lengths = torch.tensor(batch.row_lengths)
    return torch.arange(1, batch.input_ids.shape[1])[None, :] < lengths[:, None]
