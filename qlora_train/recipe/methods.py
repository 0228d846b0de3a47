"""The table of adapter methods as plain data. A method the table lacks does not exist. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Keys of the section `adapter` that every method with factors A and B reads.
_COMMON = ("method", "r", "alpha", "dropout", "target_modules", "init_from")


@dataclass(frozen=True)
class Method:
    """One row: what is trained, from which start, by which rule, and what becomes of it."""

    name: str
    title: str  # as its paper writes it
    summary: str
    arxiv: str
    status: Literal["default", "useful", "experimental"]
    form: str = "plain"  # how the tensors of a layer make its update: a row of adapters/forms/registry.py
    start: str = "zero"  # what they begin as; zero: PEFT's own, A random and B zero
    starts_at_base: bool = True  # the model before the first step is the quantised base
    zero_is_base: bool = True  # so is the model whose factors are zero: decay, and dropout of a branch, do no harm
    scaling: str = "alpha / r"  # the factor on B A
    rule: str = "adamw"  # how gradients become steps
    schedule: str | None = None  # what changes in the course of training: adapters/schedules.py
    base: Literal["kept", "residual"] = "kept"  # residual: the start takes its part out of W before quantising
    merges: Literal["fold", "weight", "none"] = "fold"  # into plain LoRA; into a plain weight only; not at all
    trains: tuple[str, ...] = ("lora_A", "lora_B")  # attributes of an adapted layer
    options: tuple[str, ...] = ()  # keys of `adapter` that this method reads besides the common ones
    without: tuple[str, ...] = ()  # common keys that it does not read
    convolutions: bool = False  # whether adapter.target_modules may name convolutions, besides linear layers
    learning_rate: str = "1e-4 to 5e-4"  # what its paper or its users take

    @property
    def reads(self) -> frozenset[str]:
        """Keys of the section `adapter` that mean something to this method."""
        return frozenset((*_COMMON, *self.options)) - frozenset(self.without)

    @property
    def use_rslora(self) -> bool:
        """Whether the scale falls with the root of the rank, in PEFT's word."""
        return self.scaling == "alpha / sqrt(r)"

    @property
    def is_peft(self) -> bool:
        """Whether plain PEFT computes the same from the saved folder: no tag is needed, and none is written."""
        return self.form in ("plain", "dora") and self.base == "kept"


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "lora",
            "LoRA / QLoRA",
            "y = W x + (alpha / r) B A x; B starts at zero",
            "2106.09685",
            "default",
            options=("embeddings", "new_tokens"),
        ),
        Method(
            "rslora",
            "rsLoRA",
            "LoRA whose scale keeps the output's size as r grows; for r of 64 and more",
            "2312.03732",
            "useful",
            scaling="alpha / sqrt(r)",
            options=("embeddings", "new_tokens"),
        ),
        Method(
            "dora",
            "DoRA",
            "the rows of W + (alpha / r) B A, each with a trained length m",
            "2402.09353",
            "useful",
            form="dora",
            merges="weight",
            trains=("lora_A", "lora_B", "lora_magnitude_vector"),
            learning_rate="1e-4 to 2e-4",
        ),
        Method(
            "mtlora",
            "MTLoRA",
            "B T A with a trained matrix T between the factors, of four structures",
            "2403.07440",
            "experimental",
            form="mtlora",
            trains=("lora_A", "lora_B", "lora_core_c", "lora_core_d"),
            options=("structure",),
        ),
        Method(
            "flora_core",
            "FLoRA (core space)",
            "U_out G^T U_in^T: a core G that starts at zero between two random bases",
            "2405.14739",
            "experimental",
            form="flora_core",
            start="core zero",
            trains=("lora_A", "lora_B", "lora_core_c", "lora_kernel_0", "lora_kernel_1", "lora_kernel_2"),
            options=("r_out", "r_kernel"),
            convolutions=True,
        ),
        Method(
            "loraplus",
            "LoRA+",
            "LoRA whose B learns lr_ratio times as fast as A",
            "2402.12354",
            "useful",
            rule="loraplus",
            options=("lr_ratio",),
            learning_rate="half of LoRA's",
        ),
        Method(
            "qalora",
            "QA-LoRA",
            "LoRA on the means of groups of inputs, which merges into the zero points of an INT4 base",
            "2309.14717",
            "useful",
            form="qalora",
            options=("group_size",),
        ),
        Method(
            "loftq",
            "LoftQ",
            "A and B start as the best rank-r correction of the quantisation error; the divided-by-scaling form",
            "2310.08659",
            "useful",
            form="loftq",
            start="loftq",
            zero_is_base=False,
            starts_at_base=False,
            base="residual",
            options=("start_iters",),
        ),
        Method(
            "pissa",
            "PiSSA / QPiSSA",
            "A and B start as the r principal triples of W, taken out of the base before it is quantised",
            "2404.02948",
            "useful",
            form="residual",
            start="pissa",
            zero_is_base=False,
            starts_at_base=False,
            base="residual",
            options=("start_iters",),
            learning_rate="2e-5 to 1e-4",
        ),
        Method(
            "milora",
            "MiLoRA",
            "A and B start as the r minor triples of W, subtracted in the layer",
            "2406.09044",
            "experimental",
            form="offset",
            start="milora",
            zero_is_base=False,
        ),
        Method(
            "olora",
            "OLoRA",
            "A and B start as the first r rows and columns of W = Q R, subtracted in the layer",
            "2406.01775",
            "experimental",
            form="offset",
            start="olora",
            zero_is_base=False,
        ),
        Method(
            "lora_ga",
            "LoRA-GA",
            "A and B start along the leading directions of W's gradient on the first batches",
            "2407.05000",
            "experimental",
            form="offset",
            start="lora_ga",
            zero_is_base=False,
            options=("stable_gamma", "probe_batches"),
            learning_rate="2e-5 to 1e-4",
        ),
        Method(
            "eva",
            "EVA",
            "A starts as the leading directions of the layer's inputs on the first batches; B starts at zero",
            "2410.07170",
            "useful",
            start="eva",
            options=("rho", "probe_batches"),
        ),
        Method(
            "lora_pro",
            "LoRA-Pro",
            "each step's gradients of A and B become those whose effect is nearest to full fine-tuning's",
            "2407.18242",
            "experimental",
            rule="lora_pro",
            options=("rule_mode",),
            learning_rate="2e-5 to 1e-4",
        ),
        Method(
            "adalora",
            "AdaLoRA",
            "P diag(E) Q with more rank than wanted; the least important triplets of the model lose their E",
            "2303.10512",
            "experimental",
            form="adalora",
            start="E zero",
            schedule="rank budget",
            trains=("lora_A", "lora_B", "lora_core_e"),
            options=("target_r", "schedule_start_frac", "schedule_end_frac", "schedule_every", "orthogonality"),
        ),
        Method(
            "aflora",
            "AFLoRA",
            "diag(b) B diag(d) A; A and B are frozen one by one, the least important first, b and d never",
            "2403.13269",
            "experimental",
            form="aflora",
            start="b zero",
            schedule="freezing",
            trains=("lora_A", "lora_B", "lora_core_d", "lora_core_b"),
            options=("freeze_rule", "schedule_start_frac", "schedule_end_frac", "schedule_every"),
            learning_rate="1e-3 to 1e-2",
        ),
        Method(
            "mole",
            "MoLE",
            "a router that weighs finished adapters for each token; the adapters stay as they are",
            "2404.13628",
            "experimental",
            form="mole",
            start="experts",
            starts_at_base=False,
            schedule="balance",
            merges="none",
            trains=("lora_mole_gate", "lora_mole_tau"),
            options=("experts", "balance", "granularity"),
            without=("r", "alpha", "target_modules", "init_from"),
            learning_rate="1e-4 to 1e-3",
        ),
        Method(
            "delta",
            "delta-tuning",
            "a difference on named norms and biases, which are not quantised; no low-rank factors",
            "2203.06904",
            "experimental",
            form="delta",
            scaling="1",
            merges="weight",
            trains=("lora_delta_weight", "lora_delta_bias"),
            options=("parameters",),
            without=("r", "alpha", "dropout", "target_modules"),
            learning_rate="1e-3 to 5e-3",
        ),
    )
}

# Methods that train the factors of a base which LoRD (arXiv 2309.14021) decomposed: model.lord_keep_frac.
ON_LORD = ("lora", "rslora", "loraplus")

# Keys of the section `adapter` that only some methods read, each with the methods that do.
OPTIONS: dict[str, tuple[str, ...]] = {
    option: tuple(name for name, method in METHODS.items() if option in method.options)
    for option in dict.fromkeys(option for method in METHODS.values() for option in method.options)
}
