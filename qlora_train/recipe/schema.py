"""The sections of a recipe. Each key has its unit and the reason for its default; no unknown key is let in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0, le=2**40)]
NonNegativeInt = Annotated[int, Field(ge=0, le=2**40)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1)]
Format = Literal["auto", "messages", "sharegpt", "prompt_completion", "alpaca", "text"]


class Section(BaseModel):
    """Strict: no unknown key, no conversion of one type into another, no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class ModelSection(Section):
    path: Name = Field(
        json_schema_extra={"format": "model"},
        description="Hub id, folder, `.gguf` file, or `package:NAME/FILE` for a file inside an installed package.",
    )
    revision: str | None = Field(
        None, description="Commit, tag or branch of a hub id. A commit makes the run repeatable."
    )
    compute_dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16",
        description="Type of activations and matmuls. bfloat16 needs no loss scaling; float32 is for tests.",
    )
    attn_implementation: Literal["auto", "sdpa", "eager"] = Field(
        "auto",
        description="Attention of padded batches; packs have their own. auto: sdpa, but eager on a CPU for rows of up "
        "to 512 tokens, where the backward pass of sdpa is slow; eager holds the scores of a whole row.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train. auto: cuda where there is one.")
    chat_template: Path | None = Field(
        None, description="Jinja file to use instead of the model's own chat template, for bases that ship none."
    )
    lord_keep_frac: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = Field(
        None,
        description="LoRD (experimental): decompose linear layers into two factors before quantising. Share of a "
        "layer's weights that the two hold at most; their rank is a multiple of 64. 0.9 costs little, 0.5 much.",
    )
    lord_modules: Literal["all-linear"] | tuple[Name, ...] = Field(
        "all-linear",
        description="Layers that are decomposed: every linear layer but the head, or names, matched as whole dotted "
        "suffixes. Those of quant.skip_modules stay whole.",
    )
    lord_batches: PositiveInt = Field(
        8,
        description="Micro-batches of training rows whose activations the factors are fitted to. Several times as many "
        "tokens as a layer is wide.",
    )


class QuantSection(Section):
    quant_type: Literal["nf4", "fp4", "int4", "none"] = Field(
        "nf4",
        description="4-bit code of the frozen linear layers. nf4 has the lowest error on normal weights "
        "(QLoRA, arXiv 2305.14314, section 3); int4: 16 even steps and a zero point for each block, into which qalora "
        "merges; none is plain LoRA on a base in compute_dtype.",
    )
    double_quant: bool = Field(
        True, description="Quantise the absmax values too: 4.127 instead of 4.5 bits per weight, at no measured loss."
    )
    block_size: Literal[32, 64, 128, 256] = Field(
        64, description="Weights per absmax value. The paper's 64; smaller is more exact and larger on disk."
    )
    storage_dtype: Literal["uint8", "bfloat16", "float32"] = Field(
        "uint8", description="Container of the packed codes. Anything but uint8 serves sharded training only."
    )
    skip_modules: tuple[str, ...] = Field(
        (), description="Linear layers kept in compute_dtype, by name, besides the output head, which always is."
    )


class AdapterSection(Section):
    method: Name = Field("lora", description="A row of the method table (recipe/methods.py).")
    r: Annotated[int, Field(gt=0, le=4096)] = Field(
        16, description="Rank. 16 serves most sets; 32 to 64 for more than 50,000 rows, 8 for style."
    )
    alpha: PositiveFloat = Field(32.0, description="The update is scaled by alpha / r. 2 r is the usual start.")
    dropout: Fraction = Field(
        0.0,
        description="Share of the adapter's inputs zeroed. 0.05 helps below about 5,000 rows. Not for pissa and loftq, "
        "whose adapter holds a part of the weights.",
    )
    target_modules: Literal["all-linear"] | tuple[Name, ...] = Field(
        "all-linear",
        description="all-linear: every linear layer but the head (attention-only is worse at equal parameters). "
        "Or names, matched as whole dotted suffixes: [q_proj, v_proj]. flora_core adapts convolutions, too, by name.",
    )
    init_from: Path | None = Field(None, description="Folder of a trained adapter to go on from, in PEFT's format.")
    # What only some methods read; validation refuses it for the others. Which: METHODS in recipe/methods.py.
    embeddings: bool = Field(
        False,
        description="lora, rslora: adapt the token embedding too, for new words or another language. Not where it is "
        "tied to the head.",
    )
    new_tokens: tuple[Name, ...] = Field(
        (),
        description="lora, rslora: tokens to train a row for, in the embedding and the head, beside the adapter: "
        '`["<tool>", "</tool>"]`. Those that the tokenizer knows train the row they have; others are added to it, each '
        "one id wherever it stands in the rows.",
    )
    structure: Literal["shim", "icfm", "ctcm", "dtsm"] = Field(
        "shim", description="mtlora: the matrix between B and A. shim: C; icfm: C C^T; ctcm: C D; dtsm: C + D."
    )
    r_out: Annotated[int, Field(gt=0, le=4096)] | None = Field(
        None, description="flora_core: rank on the output's side; default: r."
    )
    r_kernel: Annotated[int, Field(gt=0, le=4096)] | None = Field(
        None, description="flora_core: rank along each side of a convolution's kernel; default: the side itself."
    )
    target_r: Annotated[int, Field(gt=0, le=4096)] | None = Field(
        None, description="adalora: mean rank at the end, below r. r = 1.5 x target_r is usual."
    )
    schedule_start_frac: Fraction = Field(
        0.15, description="adalora, aflora: share of the steps before the first triplet or tensor is given up."
    )
    schedule_end_frac: Fraction = Field(0.3, description="adalora, aflora: share of the steps after the last one is.")
    schedule_every: PositiveInt = Field(10, description="adalora, aflora: steps between two decisions.")
    orthogonality: Annotated[float, Field(ge=0, le=1e3, allow_inf_nan=False)] = Field(
        0.1, description="adalora: weight of the penalty on P and Q that are not orthonormal."
    )
    experts: tuple[Path, ...] = Field(
        (), description="mole: folders of two or more finished adapters of this base, which the router weighs."
    )
    balance: Annotated[float, Field(ge=0, le=1e3, allow_inf_nan=False)] = Field(
        0.01, description="mole: weight of the penalty on experts that are hardly used; 0 turns it off."
    )
    granularity: Literal["matrix", "layer"] = Field(
        "matrix",
        description="mole: what has a gate of its own. matrix: every adapted matrix, by its own input; layer: every "
        "decoder layer, by the layer's input, for all its matrices alike: fewer gates, less memory.",
    )
    parameters: tuple[Name, ...] = Field(
        ("norm",),
        description="delta: what is trained. norm: weights and biases of normalisation layers; bias: biases of linear "
        "layers; or names of modules that hold some, matched as whole dotted suffixes.",
    )
    freeze_rule: Literal["rank", "reference"] = Field(
        "rank",
        description="aflora: rank freezes the lowest-scored tensors until the wanted share is left; reference, as the "
        "authors' program, all whose mean score is below a quantile of the elements.",
    )
    lr_ratio: PositiveFloat = Field(
        16.0, description="loraplus: the learning rate of B as a multiple of A's. The paper's 16; 2 to 32 in use."
    )
    start_iters: Annotated[int, Field(gt=0, le=100)] = Field(
        1,
        description="pissa, loftq: rounds of decomposing and quantising. 5 bring the start nearer to W, at 5 times the "
        "cost; from 2 on loftq changes the base, as pissa always does.",
    )
    stable_gamma: PositiveFloat = Field(
        16.0,
        description="lora_ga: A and B start with rows and columns of length out^(1/4) / sqrt(stable_gamma).",
    )
    probe_batches: PositiveInt = Field(
        4, description="lora_ga, eva: micro-batches that are looked at before the first step, four times over each."
    )
    rho: Annotated[float, Field(ge=1, le=64, allow_inf_nan=False)] = Field(
        1.0, description="eva: the largest rank that a layer may get as a multiple of r; 1 gives every layer r."
    )
    group_size: Literal[32, 64, 128, 256] = Field(
        32, description="qalora: inputs of the base that share one input of the adapter; must be quant.block_size."
    )
    rule_mode: Literal["factor", "full"] = Field(
        "factor",
        description="lora_pro: moments of A and B, or, as in the paper, of whole weights: 8 bytes for each of them.",
    )


class SourceSection(Section):
    """One source of rows. A plain string in a recipe stands for its path."""

    path: Name = Field(
        json_schema_extra={"format": "source"},
        description="JSONL, JSON, CSV, TSV, Parquet or Arrow file, folder of Parquet or Arrow files, or hub id.",
    )
    weight: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = Field(
        1.0, description="Passes over this source in one epoch. 0.5: every row each second epoch; 2: twice an epoch."
    )
    format: Format | None = Field(None, description="Shape of these rows; default: data.format.")
    columns: dict[Name, Name] = Field(
        {}, description="Our column names and theirs, e.g. {instruction: question}, besides those of data.columns."
    )
    revision: str | None = Field(None, description="Commit, tag or branch of a hub id.")
    subset: str | None = Field(None, description="Configuration of a hub data set, where it has several.")
    split: Name = Field("train", description="Split of a hub data set, or of a folder that holds several.")


class DataSection(Section):
    train: tuple[SourceSection, ...] = Field(description="Sources of training rows, in order.", min_length=1)
    eval: tuple[SourceSection, ...] = Field((), description="Sources of held-out rows: never trained on.")
    split: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = Field(
        None,
        description="Share of the training rows to hold out, e.g. 5%. Chosen by what they ask: the same rows whatever "
        "the seed, and rows that ask the same stay on one side.",
    )
    format: Format = Field("auto", description="Shape of the rows. auto: told by the columns of a source's first row.")
    columns: dict[Name, Name] = Field({}, description="Our column names and theirs, e.g. {messages: dialogue}.")
    bad_rows: Literal["fail", "skip"] = Field(
        "fail",
        description="What a row that cannot be read, rendered or supervised does: it ends the run before anything is "
        "loaded, or is left out and listed in rejected.jsonl.",
    )
    loss_on: Literal["completion", "assistant", "all"] = Field(
        "assistant",
        description="Tokens that are trained: the last answer (completion), every answer (assistant), or all.",
    )
    seq_len: Annotated[int, Field(ge=8, le=2**24)] = Field(
        1024, description="Tokens of a pack, and of the longest row. Longer rows are handled by `overlong`."
    )
    overlong: Literal["drop", "cut", "split", "fail"] = Field(
        "drop",
        description="What happens to a row longer than seq_len: left out and listed; cut to seq_len, which loses its "
        "end, and listed (above a million characters left out); split, if it is plain text, into rows of at most "
        "seq_len, and else left out; or an error.",
    )
    max_lost_frac: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = Field(
        0.05,
        description="Refuse to train when dropped, cut and rejected rows hold more than this share of the tokens.",
    )
    duplicates: Literal["keep", "drop"] = Field(
        "keep", description="What happens to a training row that repeats an earlier one word for word."
    )
    max_train_rows: PositiveInt | None = Field(None, description="Train on a random subset of so many rows.")
    max_eval_rows: PositiveInt | None = Field(None, description="Evaluate on the first so many rows.")
    batching: Literal["packed", "length_grouped", "shuffled"] = Field(
        "packed",
        description="How rows meet in a micro-batch. packed: whole rows laid end to end in packs of seq_len tokens, "
        "each attending to itself alone; length_grouped: padded, rows of like length together; shuffled: padded.",
    )
    streaming: bool = Field(
        False,
        description="Keep no tokens on disk: rows are read and tokenised again for each use. For sets larger than the "
        "disk cache.",
    )

    @property
    def holds_out(self) -> bool:
        """Whether there are held-out rows."""
        return bool(self.eval) or self.split is not None


class TrainSection(Section):
    epochs: PositiveFloat = Field(1.0, description="Passes over the rows. 1 to 3 for instructions.")
    max_steps: PositiveInt | None = Field(
        None, description="At most so many optimiser steps; fewer where epochs gives fewer."
    )
    micro_batch_size: PositiveInt = Field(
        4, description="Packs (or padded rows) per forward pass. Raise it until memory is full."
    )
    grad_accum_steps: PositiveInt = Field(
        4, description="Forward passes per optimiser step. Packs per step = micro_batch_size x this."
    )
    learning_rate: PositiveFloat = Field(
        2e-4, description="Peak rate. About ten times that of full fine-tuning; 1e-4 from 30 billion parameters on."
    )
    schedule: Literal["linear", "cosine", "constant"] = Field("cosine", description="Shape after the warm-up.")
    warmup_frac: Fraction = Field(0.03, description="Share of the steps in which the rate rises.")
    weight_decay: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = Field(
        0.0,
        description="Decoupled decay of A and B towards zero; scaling vectors and rows of new tokens do not decay. "
        "Refused where A and B start away from zero: loftq, pissa, milora, olora, lora_ga.",
    )
    adam_beta1: Fraction = Field(0.9, description="Decay of AdamW's first moment.")
    adam_beta2: Fraction = Field(0.999, description="Decay of AdamW's second moment (the QLoRA paper's).")
    max_grad_norm: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = Field(
        1.0, description="Clip the gradient to this norm; 0 turns clipping off. The paper used 0.3."
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        "adamw",
        description="AdamW with float32 moments; with 8-bit moments, worth it from r = 64 or 70 billion parameters on; "
        "or with moments that move to the host when the card is full (CUDA).",
    )
    fused: bool = Field(
        True, description="One function for 4-bit matmul and adapter; false: the same in plain steps, to compare."
    )
    checkpointing: Literal["auto", "none", "selective", "full"] = Field(
        "auto",
        description="What is computed again in the backward pass. full: every layer but the last, a third slower, a "
        "fraction of the memory; selective: all but attention; auto: the fastest that fits memory_limit_gib.",
    )
    checkpoint_every: PositiveInt = Field(
        1, description="Recompute only every n-th layer; the others keep their activations."
    )
    offload_checkpoints: bool = Field(
        False,
        description="Keep the inputs of recomputed layers in pinned host memory (CUDA): longer rows, slower steps.",
    )
    resident_layers: Literal["auto"] | NonNegativeInt = Field(
        "auto",
        description="Layers of which a dequantised copy in compute_dtype is kept: faster, 4 times the memory of their "
        "weights. auto: as many as memory_limit_gib leaves room for beside a step and an evaluation.",
    )
    memory: Literal["fixed", "auto"] = Field(
        "fixed",
        description="auto: the run splits micro_batch_size x grad_accum_steps packs per step anew, into the largest "
        "micro-batches that fit memory_limit_gib with the fastest checkpointing. fixed: as they are written.",
    )
    memory_limit_gib: PositiveFloat | None = Field(
        None, description="Memory that `auto` settings may plan with. Default: most of what is free at the start."
    )
    compile: Literal["auto"] | bool = Field(
        "auto", description="torch.compile one layer for all. auto: where compiling pays back within the run."
    )
    save_every: NonNegativeInt = Field(100, description="Steps between checkpoints; 0 saves at the end only.")
    keep: PositiveInt = Field(2, description="Newest checkpoints kept; the best and the last are kept besides.")
    on_disk_full: Literal["stop", "wait"] = Field(
        "stop",
        description="What a checkpoint does that finds no room. stop: it ends the run, and the one before it stays; "
        "wait: it tries again every half minute.",
    )


class EvalSection(Section):
    every: NonNegativeInt = Field(
        100, description="Steps between evaluations of the held-out loss; 0: at the end only."
    )
    batch_size: PositiveInt = Field(8, description="Rows per forward pass without gradients.")
    generate_rows: NonNegativeInt = Field(
        64, description="Held-out rows answered by generation, before and after training; 0 turns it off."
    )
    max_new_tokens: PositiveInt = Field(64, description="Longest generated answer, in tokens.")


class ExportSection(Section):
    export_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="Type of the merged weights on disk."
    )
    shard_gib: PositiveFloat = Field(4.0, description="Largest weight file, in GiB.")
    verify_rows: PositiveInt = Field(
        16, description="Held-out rows on which the merged model is compared with the trained one."
    )
    max_kl_frac: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = Field(
        0.01, description="Refuse to publish when KL(trained || merged) exceeds this share of the adapter's own effect."
    )
    max_kl: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = Field(
        None,
        description="KL in nats per token up to which a format of 8 bits or fewer may be published that exceeds "
        "max_kl_frac. Its KL is measured first; without this it is refused.",
    )
    base: Literal["dequantized", "original", "auto"] = Field(
        "dequantized",
        description="What the adapter is merged onto. dequantized: the weights it was trained on, so that the result "
        "is the trained model; original: those before quantising, another model, whose price is measured; auto: both "
        "are measured on held-out rows, and the original weights are taken only where they answer better. For loftq "
        "only dequantized.",
    )
    compare_rows: PositiveInt = Field(
        128, description="Held-out rows on which `base: auto` compares the ways to merge."
    )
    max_loss_rise: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = Field(
        0.0,
        description="Nats per supervised token by which a model that is knowingly not the trained one may be worse on "
        "the held-out rows. Above it nothing is published.",
    )
    verify: Literal["auto", "whole", "layers"] = Field(
        "auto",
        description="How the merged model is compared with the trained one: whole models, or one layer at a time from "
        "the files, where the models are larger than memory. The numbers are the same.",
    )
    license: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+_-]{0,59}$")] | None = Field(
        None, description="Licence for the model card, as the hub writes it (apache-2.0), where the base names none."
    )


class RunSection(Section):
    dir: Path = Field(description="The run folder. Everything that the run writes is in it.")
    seed: NonNegativeInt = Field(0, description="Everything random follows from it.")
    threads: PositiveInt | None = Field(
        None, description="CPU threads of torch. Part of what makes a run repeatable; default: all cores."
    )
    log_every: PositiveInt = Field(1, description="Steps between lines of metrics.jsonl.")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        (),
        description="Where the lines of metrics.jsonl go besides: tensorboard (into the run folder), wandb (without a "
        "network: WANDB_MODE=offline), trackio. A tracker that fails never ends a run.",
    )
    tracker_project: Name = Field("qlora_train", description="Project that wandb and trackio file the run under.")


class Recipe(Section):
    """A whole recipe. `Recipe.model_fields` is what validation, help and the documentation read."""

    model: ModelSection
    quant: QuantSection = Field(default_factory=QuantSection)
    adapter: AdapterSection = Field(default_factory=AdapterSection)
    data: DataSection
    train: TrainSection = Field(default_factory=TrainSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    export: ExportSection = Field(default_factory=ExportSection)
    run: RunSection
