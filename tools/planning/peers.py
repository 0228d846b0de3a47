"""How each tool that published figures runs its step, as a configuration of our trace; and what its figure counts.

A source stands with each. What no source says is said here to be assumed. No number in this file was chosen to meet a
published figure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from planning.architectures import ARCHITECTURES
from planning.huggingface import FLASH, Head, mixed_precision, trainer_loss, trainer_model
from planning.litgpt import Settings, litgpt_loss, litgpt_model, moments_on_card
from planning.published import Row
from planning.tracing import Traced, traced_step
from planning.unsloth import unsloth_loss, unsloth_model
from qlora_train.memory.constants import CUDA_CONTEXT
from qlora_train.memory.trace import StepStyle
from qlora_train.model.checkpointing import Checkpointing

Counts = Literal["allocated", "reserved", "card", "least card"]
COUNTS: dict[Counts, str] = {
    "allocated": "tensors (torch.cuda.max_memory_allocated)",
    "reserved": "what torch's allocator reserved",
    "card": "what torch's allocator reserved, and the CUDA context",
    "least card": "the least card on which it goes through: empty segments are given back; with the CUDA context",
}
CHECKPOINTED = Checkpointing("full")
OFFLOADED = Checkpointing("full", offload=True)


@dataclass(frozen=True)
class Peer:
    """One tool at one time."""

    name: str
    is_of: Callable[[Row], bool]
    trace: Callable[[Row, Any], Traced]  # of the row's model config
    counts: Counts
    step: str  # how it runs, in words
    source: str


def planned_bytes(row: Row, peer: Peer, traced: Traced) -> int:
    """What the plan says for a published figure."""
    if peer.counts == "allocated":
        return traced.allocated
    if peer.counts == "reserved":
        return traced.reserved
    return (traced.reserved if peer.counts == "card" else traced.least) + CUDA_CONTEXT.num_bytes


def peer_of(row: Row) -> Peer:
    """The peer of a row that states its settings."""
    return next(peer for peer in PEERS if peer.is_of(row))


def config_of(row: Row) -> Any:
    """The config of a row's model."""
    return ARCHITECTURES[row.model].config()


def _in_4bit(row: Row) -> bool:
    return not row.quant.startswith("none")


def trace_litgpt(row: Row, config: Any, *, norms_in_float32: bool, follows_another: bool) -> Traced:
    """LitGPT's step."""
    quant = row.quant if _in_4bit(row) else "none"
    targets = {"q,v": ("q", "v"), "all+head": ("q", "k", "v", "proj", "mlp", "head")}[row.lora_targets]
    model = litgpt_model(config, Settings(quant, int(row.rank), targets, norms_in_float32=norms_in_float32))
    loss = partial(litgpt_loss, follows_another=follows_another)
    style = StepStyle(loss=loss, optimizer_bytes=partial(moments_on_card, quant))
    return traced_step(model, row.num_rows, row.num_tokens, style)


def trace_trainer(
    row: Row,
    config: Any,
    *,
    head: Head,
    optimizer: str = "adamw",
    attention: str = FLASH,
    upcast: Literal["none", "all"] = "none",
    dropout: float = 0.0,
    checkpointed: bool = True,
    mixed: bool = True,
) -> Traced:
    """The step of transformers' Trainer, or of a loop like it, with PEFT's layers."""
    model = trainer_model(
        config,
        r=int(row.rank),
        targets=("q_proj", "v_proj") if row.lora_targets == "q,v" else "all-linear",
        quant_type="nf4" if _in_4bit(row) else "none",
        attention=attention,
        upcast=upcast,
        dropout=dropout,
    )
    style = partial(
        StepStyle,
        checkpointing=CHECKPOINTED if checkpointed else Checkpointing(),
        recompute_last=True,
        optimizer=optimizer,
    )
    loss = partial(trainer_loss, head=head)
    if not mixed:
        return traced_step(model, row.num_rows, row.num_tokens, style(loss=loss))
    with mixed_precision() as mode:
        return traced_step(model, row.num_rows, row.num_tokens, style(loss=partial(loss, mode=mode)))


def trace_unsloth(row: Row, config: Any, *, head: Any, optimizer: str, offloaded: bool) -> Traced:
    """Unsloth's step."""
    model = unsloth_model(config, int(row.rank), "nf4-dq" if _in_4bit(row) else "none")
    style = StepStyle(
        checkpointing=OFFLOADED if offloaded else CHECKPOINTED,
        recompute_last=True,
        optimizer=optimizer,
        loss=partial(unsloth_loss, head=head),
    )
    return traced_step(model, row.num_rows, row.num_tokens, style)


def _factory_trainer(row: Row, config: Any) -> Traced:
    return trace_trainer(row, config, head="shifted copy", attention=FLASH if "FA2" in row.method else "eager")


def _factory_unsloth(row: Row, config: Any) -> Traced:
    offloaded = "(offload)" in row.notes
    return trace_unsloth(row, config, head="kernel on all logits", optimizer="adamw", offloaded=offloaded)


_FACTORY = (
    "4 bit with double quantisation, float32 adapters, bfloat16 by autocast, embeddings and head in half precision, "
    "AdamW with float32 moments, every layer computed again; "
)
_FACTORY_SOURCE = "hiyouga/LLaMA-Factory 86556b1c (14 April 2024), src/llmtuner/model/{patcher,adapter}.py"
PEERS: tuple[Peer, ...] = (
    Peer(
        "LitGPT, config hub (2024)",
        lambda row: "litgpt config_hub" in row.source,
        partial(trace_litgpt, norms_in_float32=True, follows_another=True),
        "allocated",
        "bfloat16 adapters, nothing computed again, all logits kept in float32; head quantised, no double "
        "quantisation; the micro-step before, as long, is still referenced",
        "Lightning-AI/litgpt e5493986, litgpt/{finetune/lora,lora,model,utils}.py, and Lightning Fabric's "
        "BitsandbytesPrecision; bitsandbytes 0.42",
    ),
    Peer(
        "LitGPT, resource tables (2023)",
        lambda row: "resource-tables" in row.source,
        partial(trace_litgpt, norms_in_float32=False, follows_another=False),
        "allocated",
        "as in 2024, but RMSNorm in bfloat16 (the stated commit); the longest row comes first, and only once",
        "Lightning-AI/litgpt 8641822, finetune/lora.py, lit_gpt/{lora,model,rmsnorm}.py; bitsandbytes 0.41.1",
    ),
    Peer(
        "Unsloth in LLaMA-Factory",
        lambda row: row.tool == "LLaMA-Factory" and row.method.startswith("Unsloth"),
        _factory_unsloth,
        "card",
        _FACTORY + "Unsloth's layers, a kernel that writes the gradient over all logits, and a float32 copy of them "
        "that accelerate makes; inputs of layers on the host where the row says so",
        f"{_FACTORY_SOURCE}; unslothai/unsloth before 15 April 2024, kernels/*.py, models/{{llama,_utils}}.py",
    ),
    Peer(
        "transformers in LLaMA-Factory",
        lambda row: row.tool == "LLaMA-Factory",
        _factory_trainer,
        "card",
        _FACTORY + "PEFT's layers, all logits in float32 and a shifted copy of them; eager attention without FA2",
        f"{_FACTORY_SOURCE}; transformers 4.39, modeling_llama.py",
    ),
    Peer(
        "Unsloth, longest context",
        lambda row: row.tool == "unsloth" and row.method.startswith("Unsloth"),
        partial(trace_unsloth, head="cut cross-entropy", optimizer="adamw_8bit", offloaded=True),
        "least card",
        "float32 adapters, 8-bit moments, inputs of layers on the host, no logits",
        "unslothai/unsloth before 20 December 2024, kernels/*.py, models/{llama,_utils}.py",
    ),
    Peer(
        "transformers + FA2, longest context (as Unsloth measured it)",
        lambda row: row.tool == "unsloth",
        partial(
            trace_trainer,
            head="shifted copy, outputs in half",
            optimizer="adamw_8bit",
            upcast="all",
        ),
        "least card",
        "PEFT's layers; embeddings, head and norms in float32 (prepare_model_for_kbit_training), hence a float32 "
        "residual stream; all logits in float32 and a shifted copy; 8-bit moments",
        "SFTTrainer of TRL 0.13 (assumed: the page names no script), peft/utils/other.py, transformers 4.47 "
        "loss/loss_utils.py",
    ),
    Peer(
        "axolotl",
        lambda row: row.tool == "axolotl",
        partial(trace_trainer, head="cut cross-entropy", optimizer="adamw_8bit", dropout=0.05),
        "reserved",
        "PEFT's layers with dropout, float32 adapters, 8-bit moments, no logits",
        "axolotl-ai-cloud/axolotl 067b021, examples/*/*.yaml, src/axolotl/loaders/model.py",
    ),
    Peer(
        "PEFT's method comparison",
        lambda row: row.tool == "peft",
        partial(trace_trainer, head="padded labels", attention="sdpa", checkpointed=False, mixed=False),
        "reserved",
        "bfloat16 base, float32 adapters without autocast (their inputs are cast), all logits, nothing computed again",
        "huggingface/peft method_comparison/MetaMathQA/run.py and default_training_params.json",
    ),
)
