"""Load the base straight into 4 bit, explicit about every dtype and quant type, and read back what was loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from qlora_train.errors import MachineError, ModelError, OutOfMemory, first_line, is_out_of_memory
from qlora_train.model.attention import ATTENTION_NAME
from qlora_train.model.files import StoredTensor, count_not_finite, stored_tensors
from qlora_train.model.low_rank import causal_class
from qlora_train.model.skeleton import build_skeleton, check_widths, head_name, load_config
from qlora_train.model.source import Source
from qlora_train.quant.affine import INT4, AffineLinear
from qlora_train.quant.bnb import QuantSettings, forbid_cpu_repacking, linear4bit_modules, quantize, set_compute_dtype
from qlora_train.quant.fingerprint import BasePrint, print_base
from qlora_train.recipe.schema import QuantSection, Recipe

# Longest row, in tokens, for which eager attention trains faster than sdpa on a CPU and its T x T scores stay small.
EAGER_CPU_TOKENS = 512
# Below this share of the weights outside embeddings and head, "4 bit" would be a promise not kept.
LEAST_QUANTISED_FRAC = 0.8
_QUANT_METHOD = "qlora_train_bnb"


class _Bnb4bitConfig(BitsAndBytesConfig):
    """transformers' config plus what transformers 5.23 has no key for: the block size, and codes of our own."""

    def __init__(self, settings: QuantSettings, **kwargs: Any) -> None:
        super().__init__(load_in_4bit=True, **kwargs)
        self.settings = settings
        self.quant_method = _QUANT_METHOD


class _Quantize(ConversionOps):
    """INT4 codes for a weight as it arrives; transformers' own step knows bitsandbytes' codes only."""

    def __init__(self, settings: QuantSettings) -> None:
        self._settings = settings

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:
        """One weight by name, alone in a list, to its parameter."""
        made = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            made[name] = quantize(weight, self._settings)
            model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True
        return made


class _Stopped(BaseException):
    """Quantising a weight failed, by `error`.

    No Exception: transformers 5.23 writes every Exception of a step into its log, goes on with the next weight, and
    ends with a RuntimeError that names no cause (core_model_loading.log_conversion_errors).
    """

    def __init__(self, error: Exception) -> None:
        self.error = error
        super().__init__(str(error))


class _Stopping(ConversionOps):
    """A quantising step whose first error ends the loading."""

    def __init__(self, op: ConversionOps) -> None:
        self._op = op

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What the step makes."""
        try:
            made: dict[str, Any] = self._op.convert(input_dict, *args, **kwargs)
        except Exception as error:
            raise _Stopped(error) from None
        return made


@register_quantizer(_QUANT_METHOD)
class _Bnb4bitQuantizer(Bnb4BitHfQuantizer):
    """transformers' 4-bit quantiser; sets the block size on the layers before their weights arrive."""

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        settings = self.quantization_config.settings
        for _, module in linear4bit_modules(model):
            module.weight.blocksize = settings.block_size
            if settings.quant_type == INT4:
                module.__class__ = AffineLinear  # the same attributes, and a forward pass of its own

    def get_quantize_ops(self) -> ConversionOps:
        settings = self.quantization_config.settings
        return _Stopping(_Quantize(settings) if settings.quant_type == INT4 else super().get_quantize_ops())


@dataclass(frozen=True)
class Base:
    """The frozen base on its device, with the fingerprint taken as it was loaded."""

    model: Any  # transformers.PreTrainedModel
    source: Source
    print: BasePrint
    device: torch.device
    compute_dtype: torch.dtype


def settings_for(quant: QuantSection) -> QuantSettings:
    """What the quantiser is told for a recipe."""
    return QuantSettings.of(quant.quant_type, quant.double_quant, quant.block_size, quant.storage_dtype)


def resolve_device(name: str) -> torch.device:
    """`auto` is cuda where there is one. MachineError when cuda is asked for and absent."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise MachineError("model.device is cuda, but torch sees no CUDA device", fix="set model.device: auto or cpu")
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def memory_advice(first: str = "") -> Iterator[None]:
    """OutOfMemory where memory runs out in the block and no plan is at hand; `first`: what to try before all else."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        plan = "`qlora-train plan RECIPE` shows what takes the memory, and what to change"
        raise OutOfMemory(f"out of memory: {first_line(error)}", fix=f"{first}; {plan}" if first else plan) from error


def resolve_attention(name: str, device: torch.device, seq_len: int, batching: str) -> str | None:
    """The attention that `auto` stands for (measured: README.md, "Speed"). Packs need our own.

    None leaves it to transformers: sdpa, and eager for the models that it has no sdpa for, such as Gemma 2.
    """
    if name != "auto":
        return name
    if batching == "packed":
        return ATTENTION_NAME
    return "eager" if device.type == "cpu" and seq_len <= EAGER_CPU_TOKENS else None


def check_attention(skeleton: Any, name: str) -> None:
    """ModelError where a recipe asks for an attention that transformers refuses to run a model with."""
    if name == "sdpa" and not skeleton._supports_sdpa:
        raise ModelError(
            f"transformers runs {type(skeleton).__name__} without sdpa, which model.attn_implementation asks for",
            fix="set model.attn_implementation: auto",
        )


def load_recipe_base(source: Source, recipe: Recipe) -> Base:
    """The base as a recipe wants it: for training, and again for evaluation and export."""
    device = resolve_device(recipe.model.device)
    attention = resolve_attention(recipe.model.attn_implementation, device, recipe.data.seq_len, recipe.data.batching)
    return load_base(source, recipe.quant, getattr(torch, recipe.model.compute_dtype), device, attention)


def load_base(
    source: Source,
    quant: QuantSection,
    compute_dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str | None = "sdpa",
) -> Base:
    """Load, freeze and fingerprint the base. Each weight is quantised as it arrives: no 16-bit copy exists.

    Raises ModelError when weights are missing, unreadable, not finite, or were not quantised as the recipe says, and
    MachineError when bitsandbytes cannot quantise on the device.
    """
    config = load_config(source)
    skeleton = build_skeleton(config)
    # Refuses, before hours of training, what could not be exported after them.
    stored = stored_tensors(source, skeleton)
    quantised = quant.quant_type != "none"
    check_widths(skeleton, quant, device)
    kwargs: dict[str, Any] = {
        "dtype": compute_dtype,
        "device_map": {"": device},
        "attn_implementation": attn_implementation,
        "trust_remote_code": False,
    }
    if quantised:
        settings = settings_for(quant)
        kwargs["quantization_config"] = _Bnb4bitConfig(
            settings,
            bnb_4bit_quant_type="nf4" if settings.quant_type == INT4 else settings.quant_type,
            bnb_4bit_use_double_quant=settings.double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
            bnb_4bit_quant_storage=getattr(torch, quant.storage_dtype),
            llm_int8_skip_modules=[head_name(skeleton), *quant.skip_modules],
        )
    try:
        model, info = causal_class(config).from_pretrained(
            str(source.folder), config=config, use_safetensors=True, output_loading_info=True, **kwargs
        )
    except _Stopped as stopped:
        raise _quantiser_fault(stopped.error, device) from None
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{source.name}: the weights do not load: {error}", fix="download the model again") from error
    _check_complete(source, info)
    forbid_cpu_repacking(model)
    set_compute_dtype(model, compute_dtype)
    model.requires_grad_(False)
    model.config.use_cache = False
    base_print = print_base(model)
    tables = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    embeddings = {name for name, parameter in model.named_parameters() if id(parameter) in tables}
    _check_finite(source, base_print, stored, compute_dtype)
    _check_print(source, base_print, quant if quantised else None, embeddings)
    return Base(model, source, base_print, device, compute_dtype)


def _quantiser_fault(error: Exception, device: torch.device) -> Exception:
    """The error to raise for one of the quantiser: its own where memory ran out, or where it is our bug."""
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return error
    return MachineError(
        f"bitsandbytes cannot quantise on {device.type}: {first_line(error)}",
        fix="`python -m bitsandbytes` says what its build lacks",
    )


def _check_complete(source: Source, info: dict[str, Any]) -> None:
    """transformers fills tensors that a file lacks with random numbers and goes on; we do not."""
    for key, what in (("missing_keys", "lacks"), ("mismatched_keys", "has other shapes for")):
        if names := sorted(str(name) for name in info.get(key) or ()):
            raise ModelError(
                f"{source.name} {what} {len(names)} tensors, first {names[0]}", fix="download the model again, whole"
            )


def _check_finite(
    source: Source, base_print: BasePrint, stored: dict[str, StoredTensor], compute_dtype: torch.dtype
) -> None:
    """ModelError with name and counts of the first tensor that holds NaN or infinity: one value spoils a block."""
    bad = [name for name, tensor in base_print.tensors.items() if not tensor.finite]
    if not bad:
        return
    num_nan, num_infinite = count_not_finite(stored[bad[0]], compute_dtype) if bad[0] in stored else (0, 0)
    raise ModelError(
        f"{source.name}: {len(bad)} tensors hold NaN or infinity, first {bad[0]} ({num_nan:,} NaN, {num_infinite:,} "
        "infinite)",
        fix="download the model again",
    )


def _check_print(source: Source, base_print: BasePrint, quant: QuantSection | None, embeddings: set[str]) -> None:
    """What was loaded is quantised as the recipe says, nearly all of it."""
    if quant is None:
        return
    wanted = settings_for(quant)
    linear_numel = sum(t.num_params for t in base_print.tensors.values() if len(t.shape) > 1)
    quantised_numel = sum(t.num_params for t in base_print.tensors.values() if t.quantised)
    embedding_numel = sum(t.num_params for n, t in base_print.tensors.items() if n in embeddings)
    if not quant.skip_modules and quantised_numel < LEAST_QUANTISED_FRAC * (linear_numel - embedding_numel):
        raise ModelError(
            f"only {quantised_numel / 1e6:,.0f}M of {(linear_numel - embedding_numel) / 1e6:,.0f}M weights could be "
            "quantised: the rest is not in linear layers (fused experts, convolutions)",
            fix="use a dense model, or quant.quant_type: none",
        )
    if base_print.quant != wanted.__dict__:
        raise ModelError(
            f"{source.name} was loaded as {base_print.quant or 'not quantised'}, not {wanted}", fix="report this"
        )


def with_end_tokens(configured: int | list[int] | None, end_token_ids: Iterable[int]) -> list[int]:
    """The ids of an `eos_token_id` setting, which may be none, one or a list, together with further ones.

    >>> with_end_tokens(2, [7]), with_end_tokens(None, [7]), with_end_tokens([9, 2], [2])
    ([2, 7], [7], [2, 9])
    """
    known = [] if configured is None else configured if isinstance(configured, list) else [configured]
    return sorted({*known, *end_token_ids})


def add_end_tokens(model: Any, end_token_ids: list[int]) -> None:
    """Let generation stop at the tokens that were trained as the end, besides those that the model stops at already."""
    config = model.generation_config
    config.eos_token_id = with_end_tokens(config.eos_token_id, end_token_ids)


def to_float32(model: nn.Module) -> None:
    """Compute in float32 with the very weights that were loaded: the others upcast exactly, 4-bit codes untouched."""
    done: dict[int, nn.Parameter] = {}  # tied parameters stay one
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
                if id(parameter) not in done:
                    done[id(parameter)] = nn.Parameter(
                        parameter.detach().float(), requires_grad=parameter.requires_grad
                    )
                setattr(module, name, done[id(parameter)])
    set_compute_dtype(model, torch.float32)
