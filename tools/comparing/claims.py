"""What people repeat about LoRA, each measured on the real model: the start, rank, targets, latency, memory.

Every function returns bars: figures, and where the claim is one that can fail, what it has to reach.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from proofs.common import Bar

from comparing.entrants import REFERENCE, Entrant, entrants
from comparing.sweep import Sweep

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"
TIMED_TURNS = 15
FORWARD_TOKENS = 32
MIB = 2**20
RANKS = (1, 2, 4, 8, 16, 64)
FEW_RANKS = (1, 8, 64)
# Where the adapter's 1.2 million parameters go: r such that they come out within 5 % of each other on SmolLM2-135M.
TARGETS = (
    ("all seven layers", "all-linear", 4),
    ("attention", "[q_proj,k_proj,v_proj,o_proj]", 11),
    ("q and v", "[q_proj,v_proj]", 21),
    ("q alone", "[q_proj]", 35),
)


def _job(shared: Sequence[str], *overrides: str) -> Any:
    """A training of the quickstart that is about to begin, nothing written."""
    from qlora_train.artifacts.layout import RunDir
    from qlora_train.recipe.load import load_recipe
    from qlora_train.train.metrics import Silent
    from qlora_train.train.setup import prepare

    said = ["train.resident_layers=0", "train.compile=false", "run.dir=unused", *overrides, *shared]
    recipe = load_recipe(RECIPE, said).recipe
    return prepare(recipe, RunDir(Path("unused")), Silent()).job


def start(shared: Sequence[str] = ()) -> list[Bar]:
    """B = 0: the model starts as the base, to the bit, and B learns from step 1 on. Both zero: nothing ever learns."""
    import torch

    from qlora_train.adapters.layers import lora_layers
    from qlora_train.train.step import accumulate_gradients

    job = _job(shared)
    job.model.eval()
    batches = job.loader.step(0)

    @torch.no_grad()
    def hidden() -> Any:
        return job.causal.hidden(batches[0])

    with_adapter = hidden()
    with job.model.disable_adapter():
        without = hidden()
    layers = list(lora_layers(job.model).values())

    def norms() -> tuple[float, float]:
        """Of all gradients of A, and of all of B, after one step's backward pass."""
        job.optimizer.zero_grad(set_to_none=True)
        job.model.train()
        accumulate_gradients(job.causal, batches, job.accelerator, seed=0, step=0)
        sides = ([layer.lora_A["default"].weight for layer in layers], [x.lora_B["default"].weight for x in layers])
        found = [sum(float(p.grad.square().sum()) for p in side) ** 0.5 for side in sides]
        return found[0], found[1]

    grad_A, grad_B = norms()
    with torch.no_grad():
        for layer in layers:
            layer.lora_A["default"].weight.zero_()
    both = norms()
    return [
        Bar("start, B = 0: largest difference from the base", float((with_adapter - without).abs().max()), at_most=0),
        Bar("start, B = 0: gradient norm of A at step 1", grad_A, at_most=0),
        Bar("start, B = 0: gradient norm of B at step 1", grad_B, at_least=1e-3),
        Bar("start, A = B = 0: gradient norm of A and B, at step 1 and so for ever", max(both), at_most=0),
    ]


def rank(sweep: Sweep, ranks: Sequence[int] = RANKS) -> list[Bar]:
    """A small r suffices: the held-out loss by rank, each at its own best rate, alpha = 2 r."""
    lora = entrants()[REFERENCE]
    found = []
    for r in ranks:
        keys = ("adapter.method=lora", f"adapter.r={r}", f"adapter.alpha={2 * r}")
        found.append(_best(sweep, replace(lora, name=f"lora-r{r}", overrides=keys), f"rank: r = {r}"))
    return found


def targets(sweep: Sweep) -> list[Bar]:
    """Many matrices with a small r beat one with a large r: the same number of parameters, spread or not."""
    lora = entrants()[REFERENCE]
    found = []
    for title, modules, r in TARGETS:
        keys = ("adapter.method=lora", f"adapter.target_modules={modules}", f"adapter.r={r}", f"adapter.alpha={2 * r}")
        entrant = replace(lora, name=f"lora-{title.replace(' ', '-')}", overrides=keys)
        found.append(_best(sweep, entrant, f"targets: {title}, r = {r}"))
    return found


def _best(sweep: Sweep, entrant: Entrant, what: str) -> Bar:
    losses = sweep.search(entrant)
    if not losses:
        return Bar(what, float("nan"), "nats", note="no run of it has a result")
    rate = min(losses, key=lambda rate: losses[rate])
    return Bar(what, losses[rate], "nats", note=f"learning rate {rate:g}, best of {len(losses)}")


def latency(shared: Sequence[str] = ()) -> list[Bar]:
    """No added latency after merging: a forward pass of base, base with adapter and merged model, in turns."""
    import torch

    from qlora_train.adapters.layers import delta_weight, lora_layers

    jobs = [_job(shared, "quant.quant_type=none") for _ in range(3)]
    ids = torch.arange(1, FORWARD_TOKENS + 1)[None, :]
    with torch.no_grad():
        for job in jobs:
            job.model.eval()
            for layer in lora_layers(job.model).values():
                layer.lora_B["default"].weight.normal_(std=0.01)
        bare, adapted, merged = (job.model for job in jobs)
        for layer in lora_layers(merged).values():
            weight = layer.get_base_layer().weight
            weight.copy_(weight.float() + delta_weight(layer, "default"))
        bare, merged = bare.unload(), merged.unload()
        seconds = _in_turns([lambda m=m: m(input_ids=ids, use_cache=False) for m in (bare, adapted, merged)])  # type: ignore[misc]
    base_s, adapted_s, merged_s = (median(times) for times in seconds)
    note = f"forward pass of {FORWARD_TOKENS} tokens, bf16, median of {TIMED_TURNS} turns; base {1000 * base_s:.0f} ms"
    return [
        Bar("latency: merged model as a multiple of the base", merged_s / base_s, at_most=1.1, note=note),
        Bar("latency: adapter beside the base as a multiple of the base", adapted_s / base_s),
    ]


def _in_turns(calls: Sequence[Callable[[], object]]) -> list[list[float]]:
    """Seconds of each call; the first turn warms up and does not count."""
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(TIMED_TURNS + 1):
        for times, call in zip(seconds, calls, strict=True):
            started = time.perf_counter()
            call()
            if turn:
                times.append(time.perf_counter() - started)
    return seconds


def memory(shared: Sequence[str] = ()) -> list[Bar]:
    """Trainable share, and tensors of a training step: LoRA on NF4 against all weights in bf16 with float32 moments."""
    from qlora_train.memory.live import LiveBytes
    from qlora_train.memory.measure import model_bytes
    from qlora_train.model.causal import CausalModel
    from qlora_train.train.step import accumulate_gradients

    def step_bytes(job: Any, moment_bytes: int) -> int:
        job.model.train()
        with LiveBytes() as live:
            accumulate_gradients(job.causal, job.loader.step(0), job.accelerator, seed=0, step=0)
        return model_bytes(job.model) + live.peak + moment_bytes

    lora = _job(shared)
    trainable = [parameter for parameter in lora.model.parameters() if parameter.requires_grad]
    num_trainable = sum(parameter.numel() for parameter in trainable)
    lora_bytes = step_bytes(lora, 8 * num_trainable)
    del lora
    full = _job(shared, "quant.quant_type=none", "adapter.r=1")
    base = full.model.unload()
    base.requires_grad_(True)
    base.get_output_embeddings().weight.requires_grad_(False)  # our loss is that of a frozen head
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in base.parameters()]
    num_all = sum(count for count, _ in sizes)
    whole = _Whole(base, CausalModel(base), full.loader, full.accelerator)
    full_bytes = step_bytes(whole, 8 * sum(count for count, trains in sizes if trains))
    note = "one pack; weights, gradients, float32 moments and activations without checkpointing; the head is frozen"
    return [
        Bar("memory: trainable share of the parameters", num_trainable / (num_all + num_trainable), at_most=0.05),
        Bar("memory: a step of LoRA on NF4", lora_bytes / MIB, "MiB", note=note),
        Bar("memory: a step of full fine-tuning in bf16", full_bytes / MIB, "MiB"),
        Bar("memory: full fine-tuning as a multiple of LoRA on NF4", full_bytes / lora_bytes, at_least=1.5),
    ]


class _Whole:
    """Full fine-tuning, as far as a backward pass needs it."""

    def __init__(self, model: Any, causal: Any, loader: Any, accelerator: Any) -> None:
        self.model, self.causal, self.loader, self.accelerator = model, causal, loader, accelerator
