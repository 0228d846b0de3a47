"""How our own speed and memory grow with the length of a row, the rank and the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from contenders.job import LONG_SET, Options
from contenders.processes import Worker
from qlora_train.loss import BLOCK_BYTES, CHUNK_BYTES

LENGTHS = (512, 1024, 2048, 4096, 8192)
RANKS = (8, 16, 64, 256)
VOCABULARIES = (49_152, 150_000)
BASE_LENGTH, BASE_RANK = 1024, 16
# Steps of each point: the first makes the optimiser's moments, the second is measured.
_NUM_STEPS = 2


@dataclass(frozen=True)
class Point:
    """One measured size. Bytes are resident above the loaded model."""

    row_tokens: int
    r: int
    vocabulary: int
    tokens_per_s: float
    peak_bytes: int
    predicted_bytes: float

    @property
    def ratio(self) -> float:
        """Measured to predicted."""
        return self.peak_bytes / self.predicted_bytes


@dataclass(frozen=True)
class Shape:
    """What the prediction needs to know of a model."""

    num_layers: int
    hidden: int
    layer_shapes: Sequence[Sequence[int]]  # (out, in) of a layer's linear modules
    layer_saved_bytes: float  # per position, by a layer of which nothing is recomputed; counted


def predicted_bytes(shape: Shape, row_tokens: int, r: int, vocabulary: int) -> float:
    """Memory above the model of a step of one row under full checkpointing, in bytes.

        adapter   12 r layers (in + out): float32 gradients and two moments
        weights   2 in out: one layer's weights in bf16
        inputs    2 tokens hidden layers: one bf16 tensor a layer
        layer     2 tokens saved: what one layer saves while it is recomputed, and as much in gradients
        head      bf16 logits of a chunk, 2 float32 blocks of them, and 3 bf16 copies of the hidden states

    Head and layer are not needed at the same time: the larger one counts.
    """
    adapter = 12 * r * shape.num_layers * sum(num_out + num_in for num_out, num_in in shape.layer_shapes)
    weights = 2 * sum(num_out * num_in for num_out, num_in in shape.layer_shapes)
    inputs = 2 * row_tokens * shape.hidden * shape.num_layers
    layer = 2 * row_tokens * shape.layer_saved_bytes
    logits = min(CHUNK_BYTES["cpu"], 2 * row_tokens * vocabulary) + 2 * BLOCK_BYTES["cpu"]
    head = logits + 3 * 2 * row_tokens * shape.hidden
    return adapter + weights + inputs + max(layer, head)


def measure_point(row_tokens: int, r: int, vocabulary: int, threads: int) -> Point:
    """One size in a process of its own."""
    own_head = vocabulary == VOCABULARIES[0]
    options = Options(seq_len=row_tokens, r=r, vocabulary=None if own_head else vocabulary)
    with Worker("ours:full", options, threads) as worker:
        worker.wait_until_loaded()
        about = worker.ask(set=LONG_SET, num_steps=_NUM_STEPS)
        counts = worker.ask(threads=threads, count=True, settle=False)["counts"]
        answer = worker.ask(threads=threads, count=False, settle=True)
        facts = worker.facts
    saved = counts["layer_saved_bytes"] / counts["positions"]
    hidden = facts["layer_shapes"][0][1]
    shape = Shape(facts["num_layers"], hidden, facts["layer_shapes"], saved)
    return Point(
        row_tokens,
        r,
        vocabulary,
        about["num_tokens"][1] / answer["seconds"],
        answer["peak_bytes"] - facts["loaded_bytes"],
        predicted_bytes(shape, row_tokens, r, vocabulary),
    )


def sizes() -> list[tuple[int, int, int]]:
    """(tokens of a row, r, vocabulary): each varied alone."""
    usual = VOCABULARIES[0]
    points = [(length, BASE_RANK, usual) for length in LENGTHS]
    points += [(BASE_LENGTH, r, usual) for r in RANKS if r != BASE_RANK]
    return points + [(BASE_LENGTH, BASE_RANK, vocabulary) for vocabulary in VOCABULARIES[1:]]
