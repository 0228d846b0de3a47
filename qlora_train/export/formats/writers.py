"""One function for each format: write it, read it back, and hand over what was read as weights to be measured."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_train.adapters.fold import read_deltas
from qlora_train.adapters.inits.residual import read_taken
from qlora_train.data.loader import eval_batches
from qlora_train.data.parity import Golden, check_parity, write_golden
from qlora_train.errors import MachineError, ModelError, Problem, RecipeError
from qlora_train.export.base import BaseReader
from qlora_train.export.card import base_name
from qlora_train.export.configs import generation_settings, write_configs
from qlora_train.export.formats import four_bit
from qlora_train.export.formats.families import family_of, hyperparameters
from qlora_train.export.formats.gguf_file import FILE_TYPES, IN_BLOCKS, GgufModel, GgufModelWriter
from qlora_train.export.formats.gguf_lora import read_gguf_lora, write_gguf_lora
from qlora_train.export.formats.gptq import gptq, round_in_layers
from qlora_train.export.formats.lora import served_rank, vllm_problems, write_lora
from qlora_train.export.formats.ollama import (
    MODELFILE,
    check_template,
    modelfile,
    read_turns,
    without_bos,
)
from qlora_train.export.formats.readers import AdapterWeights, FourBitFolder, GgufWeights
from qlora_train.export.formats.vocabulary import Vocabulary, read_vocabulary
from qlora_train.export.layers import CandidateWeights, TrainedWeights, Weights
from qlora_train.export.licence import Licence
from qlora_train.export.tensors import MergedTensors, Onto
from qlora_train.model.hollow import build_hollow
from qlora_train.model.skeleton import build_skeleton, head_name, linear_layers
from qlora_train.model.source import GGUF_SUFFIX, Source
from qlora_train.model.trained import FinishedRun
from qlora_train.quant.bnb import Params4bit, QuantSettings, cpu_width_multiple

CALIBRATION_ROWS = 64
QUANTIZER = "llama-quantize"
K_WIDTH = 256  # of a block of a K-quant: other types hold what is not in whole blocks
_ON_ITS_BASE = (
    "the figures are those of the adapter on the 4-bit base that it was trained on; a {} has other weights, and the "
    "two together are another model: a merged format is the one that was trained"
)
_ROUNDS_INPUTS = (
    "the figures are of these weights, computed in float32: llama.cpp rounds what goes into such layers to 8 bits too"
)
_LAST_WITH_BITSANDBYTES = "vLLM up to 0.27"  # model_executor/layers/quantization/bitsandbytes.py is gone in 0.28
K_QUANTS = ("q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k")


@dataclass(frozen=True)
class Job:
    """What every writer needs of a run."""

    run: FinishedRun
    source: Source
    tokenizer: Any
    end_token_ids: Sequence[int]
    golden: Sequence[Golden]
    name: str  # of the model that is written, as its users will see it
    licence: Licence
    onto: Onto = "dequantized"  # what the adapter is merged onto

    @property
    def config(self) -> Any:
        """transformers' config of the merged model."""
        return self.run.config(self.source)

    def linear_names(self) -> list[str]:
        """The linear layers but the head."""
        return list(linear_layers(build_skeleton(self.config)))

    def tensors(self) -> MergedTensors:
        """The merged model."""
        return MergedTensors(self.run, self.source, self.onto)

    def shards(self, folder: Path) -> four_bit.ShardWriter:
        """Writes safetensors into a folder."""
        return four_bit.ShardWriter(folder, int(self.run.recipe.export.shard_gib * 2**30))

    def vocabulary(self) -> Vocabulary:
        """The tokenizer as GGUF holds it."""
        return read_vocabulary(self.tokenizer, self.config.vocab_size, self.end_token_ids)


@dataclass(frozen=True)
class Written:
    """A format in its folder, not yet published."""

    weights: Weights
    commands: tuple[str, ...]  # that serve it
    notices: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Format:
    """A name that `export --format` takes."""

    title: str
    bits: float  # a weight, for the room it takes
    write: Callable[[Job, Path], Written]
    check: Callable[[Job], None]  # refuses before any work
    lossy: bool = False  # rounds the merged weights further than 16 bit do: may be published by `export.max_kl`
    merges: bool = True  # else the adapter stays beside the base that it was trained on
    dtype: torch.dtype | None = None  # what weights are rounded to; None: coarser than 16 bit

    def onto(self, job: Job) -> Onto:
        """What the updates stand on."""
        return job.onto if self.merges else "dequantized"


def write_gguf(job: Job, folder: Path, file_type: str) -> Written:
    """A merged model in GGUF, with a Modelfile beside it."""
    path, vocabulary = folder / f"model-{file_type}.gguf", job.vocabulary()
    model, notices = _write_gguf_file(job, path, file_type, vocabulary)
    notices = (*notices, *_write_modelfile(job, folder, path.name, vocabulary))
    if file_type in IN_BLOCKS:
        notices = (_ROUNDS_INPUTS, *notices)
    return Written(GgufWeights(model), _gguf_commands(path.name), notices)


def _write_gguf_file(job: Job, path: Path, file_type: str, vocabulary: Vocabulary) -> tuple[GgufModel, tuple[str, ...]]:
    """The merged model in one file, read back and compared; what its users must know."""
    tensors = job.tensors()
    shapes = {tensors.parameter(stored): tensors.shape(stored) for stored in tensors.names}
    writer = GgufModelWriter(
        path, job.config, vocabulary, shapes, file_type=file_type, name=job.name, licence=job.licence
    )
    for stored, values in tensors:
        writer.add(tensors.parameter(stored), values.float())
    writer.close()
    _refuse_unused(tensors)
    model = GgufModel(path, job.config)
    if unequal := model.unequal(writer.digests):
        raise ModelError(f"{path.name}: {unequal[0]} is not what was written (of {len(unequal)})", fix="check the disk")
    return model, tuple(writer.notices)


def write_k_quant(job: Job, folder: Path, name: str) -> Written:
    """A K-quant by llama.cpp's own program, from a float32 file that is removed again."""
    program = shutil.which(QUANTIZER)
    assert program is not None, "checked before"
    source, path, vocabulary = folder / "model-F32.gguf", folder / f"model-{name.upper()}.gguf", job.vocabulary()
    _, notices = _write_gguf_file(job, source, "F32", vocabulary)
    command = [program, str(source), str(path), name.upper()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not path.is_file():
        what = (done.stderr or done.stdout).strip()[-500:]
        raise MachineError(f"{QUANTIZER} did not write {path.name}: {what}", fix=_by_hand(name))
    source.unlink()
    model = GgufModel(path, job.config)
    notices = (
        *notices,
        _types_words(model, job),
        _ROUNDS_INPUTS,
        *_write_modelfile(job, folder, path.name, vocabulary),
    )
    return Written(GgufWeights(model), _gguf_commands(path.name), notices)


def _by_hand(name: str) -> str:
    """What to do without this program: the file that an export makes of its own for it is gone by then."""
    return (
        f"export --format gguf-f32, and in its folder, where llama.cpp is installed, run "
        f"`{QUANTIZER} model-F32.gguf model-{name.upper()}.gguf {name.upper()}`"
    )


def _types_words(model: GgufModel, job: Job) -> str:
    """What the file holds: its name is that of a mixture, from which `llama-quantize` falls back on narrow layers."""
    words = ", ".join(f"{kind} for {share:.0%}" for kind, share in model.shares().items() if share >= 0.005)
    widths = {layer.in_features for layer in linear_layers(build_skeleton(job.config)).values()}
    if odd := sorted(width for width in widths if width % K_WIDTH):
        listed = " and ".join(map(str, odd))
        words += f"; K-quants need widths that are multiples of {K_WIDTH}, and layers here are {listed} wide"
    return f"{QUANTIZER} took {words}"


def write_adapter_gguf(job: Job, folder: Path) -> Written:
    """The adapter alone for llama.cpp."""
    path = folder / "adapter.gguf"
    adapter = job.run.run_dir.adapter
    write_gguf_lora(path, adapter, job.config, job.name)
    base = BaseReader(job.run, job.source)
    read = read_gguf_lora(path, job.config, list(job.run.base_print.tensors))
    if missing := sorted(read_deltas(adapter).keys() - read.keys()):
        raise ModelError(f"{path.name} lacks the update of {missing[0]}", fix="export again")
    commands = (f"llama-server -m BASE.gguf --lora THIS_FOLDER/{path.name} --jinja",)
    notices = (_ON_ITS_BASE.format("base in another GGUF"),) if job.run.base_print.quant else ()
    return Written(AdapterWeights(TrainedWeights(base), read), commands, notices)


def write_plain_lora(job: Job, folder: Path) -> Written:
    """The adapter alone in PEFT's format, as vLLM takes it."""
    names = job.linear_names()
    rank = write_lora(folder, job.run.run_dir.adapter, names, job.run.recipe.model.path)
    if problems := vllm_problems(folder, names):
        raise ModelError(f"vLLM would refuse the adapter: {'; '.join(problems[:3])}", fix="export the merged model")
    job.tokenizer.save_pretrained(str(folder))
    write_golden(folder, job.golden)
    check_parity(folder, job.golden)
    quant, base = job.run.base_print.quant, job.run.recipe.model.path
    converted = base.endswith(GGUF_SUFFIX)  # training made safetensors of it, and vLLM takes no other
    served = (
        f"vllm serve {'BASE' if converted else shlex.quote(base)} --enable-lora --max-lora-rank {rank} "
        f"--lora-modules {shlex.quote(job.name)}=THIS_FOLDER"
    )
    notices = [_ON_ITS_BASE.format("base that is not quantised so"), _base_in_vllm(quant)] if quant else []
    if converted:
        notices.append(f"BASE stands for the model in safetensors that {base_name(base)} was made from")
    weights = AdapterWeights(TrainedWeights(BaseReader(job.run, job.source)), read_deltas(folder))
    return Written(weights, (served,), tuple(notices))


def _base_in_vllm(quant: Mapping[str, Any]) -> str:
    """Whether there is a vLLM that makes of 16-bit weights what training did: bitsandbytes' NF4 with its defaults."""
    found = (quant["quant_type"], quant["double_quant"], quant["block_size"])
    if found == (four_bit.NF4.quant_type, four_bit.NF4.double_quant, four_bit.NF4.block_size):
        return f"{_LAST_WITH_BITSANDBYTES} gives the base its 4 bit by --quantization bitsandbytes, later ones cannot"
    return (
        f"no vLLM quantises a base as this one was: {quant['quant_type']}, double quantisation "
        f"{'on' if quant['double_quant'] else 'off'}, blocks of {quant['block_size']}"
    )


def write_nf4(job: Job, folder: Path) -> Written:
    """A merged model in bitsandbytes' NF4, as `from_pretrained` loads it without quantising."""
    skipped = [head_name(build_skeleton(job.config))]
    tensors, writer = job.tensors(), job.shards(folder)
    quantised = {f"{name}.weight" for name in job.linear_names()}
    for stored in tensors.names:
        values, is_linear = tensors.exact(stored, torch.bfloat16), tensors.parameter(stored) in quantised
        writer.add(four_bit.encode_nf4(stored, values) if is_linear else {stored: values.to(torch.bfloat16)})
    written = _finish_four_bit(job, folder, tensors, writer, four_bit.nf4_config(skipped))
    return replace(written, commands=("transformers serve --force-model THIS_FOLDER",))


def write_nf4_lora(job: Job, folder: Path) -> Written:
    """The base with the very 4-bit codes of the training, and the adapter beside it: 4 bits a weight, and exact."""
    reader, (base, adapter) = BaseReader(job.run, job.source), (folder / "base", folder / "adapter")
    settings = QuantSettings(**job.run.base_print.quant)  # type: ignore[arg-type]
    compute_dtype = job.run.recipe.model.compute_dtype
    for part in (base, adapter):
        part.mkdir()
        job.tokenizer.save_pretrained(str(part))
    writer = job.shards(base)
    stored_names = {name: tensor.name for name, tensor in reader.stored.items()}
    for name, stored in stored_names.items():
        held = reader.as_trained(name)
        writer.add(four_bit.stored_parts(stored, held) if isinstance(held, Params4bit) else {stored: held})
    writer.close()
    names = job.linear_names()
    skipped = [name for name in names if not job.run.base_print.tensors[f"{name}.weight"].quantised]
    quantisation = four_bit.nf4_config([head_name(build_skeleton(job.config)), *skipped], settings, compute_dtype)
    write_configs(base, job.source, job.end_token_ids, compute_dtype, quantisation)
    rank = write_lora(adapter, job.run.run_dir.adapter, names, "../base")
    write_golden(folder, job.golden)
    check_parity(base, job.golden)
    weights = AdapterWeights(FourBitFolder(base, stored_names), read_deltas(adapter))
    lora = f"--enable-lora --max-lora-rank {rank} --lora-modules {shlex.quote(job.name)}=THIS_FOLDER/adapter"
    notice = (
        f"{_LAST_WITH_BITSANDBYTES} serves it, later ones read no weights of bitsandbytes; in Python "
        "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('THIS_FOLDER/base'), 'THIS_FOLDER/adapter')"
    )
    return Written(weights, (f"vllm serve THIS_FOLDER/base {lora}",), (notice,))


def write_w4a16(job: Job, folder: Path) -> Written:
    """A merged model in compressed-tensors' W4A16, as vLLM serves it, rounded for what training rows put in."""
    tensors, writer = job.tensors(), job.shards(folder)
    model = build_hollow(job.config, tensors.base.device)
    layers = linear_layers(model)
    group_size = four_bit.group_size_for({layer.in_features for layer in layers.values()})
    stored_names = dict(tensors.stored_names)

    def take(name: str, weight_OI: Tensor, gram_II: Tensor) -> None:
        writer.add(four_bit.packed_parts(stored_names.pop(f"{name}.weight"), *gptq(weight_OI, gram_II, group_size)))

    rows = job.run.load_split("train", job.tokenizer, max_train_rows=CALIBRATION_ROWS)
    batches = list(eval_batches(rows.table, 1, job.tokenizer.pad_token_id))  # one row each: no padding is an input
    round_in_layers(model, CandidateWeights(tensors, torch.float32), batches, layers, tensors.base.device, take)
    if unseen := sorted(f"{name}.weight" for name in layers if f"{name}.weight" in stored_names):
        raise ModelError(
            f"no calibration row reaches {unseen[0]} (of {len(unseen)}): it cannot be rounded for its inputs",
            fix="use --format gguf-q8_0",
        )
    for stored in stored_names.values():
        writer.add({stored: tensors.exact(stored, torch.bfloat16).to(torch.bfloat16)})
    quantisation = four_bit.w4a16_config(group_size, [head_name(model)])
    written = _finish_four_bit(job, folder, tensors, writer, quantisation)
    notice = f"rounded by GPTQ for the inputs that {len(batches)} training rows give each layer"
    return replace(written, notices=(notice,))


def _finish_four_bit(
    job: Job, folder: Path, tensors: MergedTensors, writer: four_bit.ShardWriter, quantisation: dict[str, Any]
) -> Written:
    """What lies beside 4-bit weights, and the weights read back."""
    writer.close()
    _refuse_unused(tensors)
    vocab_size = job.config.vocab_size
    write_configs(folder, job.source, job.end_token_ids, "bfloat16", quantisation, vocab_size=vocab_size)
    job.tokenizer.save_pretrained(str(folder))
    write_golden(folder, job.golden)
    check_parity(folder, job.golden)
    return Written(FourBitFolder(folder, tensors.stored_names), ("vllm serve THIS_FOLDER",))


def _refuse_unused(tensors: MergedTensors) -> None:
    if unused := tensors.unused():
        raise ModelError(f"{len(unused)} updates were not merged, first {unused[0]}", fix="report this")


def _gguf_commands(name: str) -> tuple[str, ...]:
    served = f"llama-server -m THIS_FOLDER/{name} --jinja"
    return served, "ollama create NAME -f THIS_FOLDER/Modelfile && ollama run NAME"


def _write_modelfile(job: Job, folder: Path, model: str, vocabulary: Vocabulary) -> tuple[str, ...]:
    """Modelfile and golden prompts beside a GGUF file; what became of its template."""
    write_golden(folder, job.golden)
    template, remark = None, "none: the model has no chat template"
    if job.tokenizer.chat_template:
        bos = job.tokenizer.bos_token
        try:
            turns = without_bos(read_turns(job.tokenizer), bos, vocabulary.add_bos)
            template = turns.go_template()
            remark = check_template(template, job.golden, bos if bos and vocabulary.add_bos else "").words
        except ModelError as error:
            template, remark = None, f"left out: {' '.join(error.problems[0].what.split())}"
    generation = generation_settings(job.source, job.end_token_ids)
    ends = generation["eos_token_id"]
    names = [job.tokenizer.convert_ids_to_tokens(number) for number in (ends if isinstance(ends, list) else [ends])]
    stops = [name for name in names if name is not None]  # a config may name an end that the tokenizer has no token for
    context = int(hyperparameters(job.config)[0][f"{family_of(job.config).name}.context_length"])  # type: ignore[arg-type]
    content = modelfile(model, template, stops, generation, context, remark)
    (folder / MODELFILE).write_text(content, encoding="utf-8")
    return (f"Modelfile: template {remark}",)


def check_gguf_model(job: Job) -> None:
    """Refuse a model or a tokenizer that llama.cpp reads otherwise."""
    family_of(job.config)
    job.vocabulary()


def check_k_quant(job: Job, name: str) -> None:
    """Refuse where llama.cpp's program is not there, with what to run."""
    check_gguf_model(job)
    if shutil.which(QUANTIZER) is None:
        raise RecipeError(
            f"--format gguf-{name} needs llama.cpp's {QUANTIZER}, which is not on PATH",
            fix=f"install llama.cpp; or {_by_hand(name)}",
        )


def check_adapter(job: Job) -> None:
    """Refuse an adapter that is no plain LoRA on the base that users have."""
    if job.run.recipe.model.lord_keep_frac is not None:
        raise ModelError(
            "the adapter belongs to a base whose layers are in two factors (model.lord_keep_frac): the base that "
            "others have lacks those layers",
            fix="export the merged model",
        )
    adapter = job.run.run_dir.adapter
    served_rank(read_deltas(adapter))
    if read_taken(adapter):
        raise ModelError(
            "the adapter's start took a part out of the base: on the base that others have it is another model",
            fix="export the merged model",
        )


def check_nf4_lora(job: Job) -> None:
    """Refuse a base that bitsandbytes' own folders do not hold, and what `check_adapter` refuses."""
    check_adapter(job)
    quant = job.run.base_print.quant
    if not quant or quant["quant_type"] not in ("nf4", "fp4"):
        kind = quant["quant_type"] if quant else "16-bit"
        raise ModelError(
            f"this run was trained on a {kind} base, and nf4-lora is one in 4 bit", fix="use --format lora"
        )


def check_adapter_gguf(job: Job) -> None:
    """Refuse what llama.cpp cannot put onto its base."""
    family_of(job.config)
    check_adapter(job)


def check_nf4(job: Job) -> None:
    """Refuse widths that bitsandbytes dequantises wrongly on a CPU."""
    layers, multiple = linear_layers(build_skeleton(job.config)), cpu_width_multiple(four_bit.NF4.block_size)
    if bad := sorted(name for name, layer in layers.items() if layer.in_features % multiple):
        raise ModelError(
            f"{bad[0]} is {layers[bad[0]].in_features} wide, no multiple of {multiple}: bitsandbytes gives wrong "
            "values for it on a CPU",
            fix="use --format gguf-q8_0",
        )


def check_w4a16(job: Job) -> None:
    """Refuse widths that no group divides."""
    layers = linear_layers(build_skeleton(job.config))
    four_bit.group_size_for({layer.in_features for layer in layers.values()})


def _gguf(file_type: str, bits: float, *, lossy: bool = False, dtype: torch.dtype | None = None) -> Format:
    def write(job: Job, folder: Path) -> Written:
        return write_gguf(job, folder, file_type)

    return Format(f"GGUF {file_type} (llama.cpp, Ollama)", bits, write, check_gguf_model, lossy, dtype=dtype)


def _k_quant(name: str) -> Format:
    def write(job: Job, folder: Path) -> Written:
        return write_k_quant(job, folder, name)

    def check(job: Job) -> None:
        check_k_quant(job, name)

    return Format(f"GGUF {name.upper()} (llama.cpp, Ollama)", 40.0, write, check, lossy=True)


FORMATS: Mapping[str, Format] = {
    "gguf-f32": _gguf("F32", 32, dtype=torch.float32),
    "gguf-f16": _gguf("F16", 16, dtype=torch.float16),
    "gguf-bf16": _gguf("BF16", 16, dtype=torch.bfloat16),
    "gguf-q8_0": _gguf("Q8_0", 8.5, lossy=True),
    "gguf-q4_1": _gguf("Q4_1", 8, lossy=True),
    **{f"gguf-{name}": _k_quant(name) for name in K_QUANTS},
    "gguf-lora": Format(
        "the adapter for llama.cpp",
        0,
        write_adapter_gguf,
        check_adapter_gguf,
        merges=False,
        dtype=torch.float32,
    ),
    "lora": Format(
        "the adapter for PEFT and vLLM", 0, write_plain_lora, check_adapter, merges=False, dtype=torch.float32
    ),
    "nf4-lora": Format(
        "NF4 base as trained, adapter beside it (transformers, PEFT)",
        8,
        write_nf4_lora,
        check_nf4_lora,
        merges=False,
        dtype=torch.float32,
    ),
    "nf4": Format("bitsandbytes NF4 (transformers)", 8, write_nf4, check_nf4, lossy=True),
    "w4a16": Format("compressed-tensors W4A16 (vLLM)", 8, write_w4a16, check_w4a16, lossy=True),
}
assert {name.removeprefix("gguf-").upper() for name in FORMATS} >= FILE_TYPES.keys()


def refuse_unknown(names: Sequence[str]) -> None:
    """RecipeError for a format that there is not, with those that there are."""
    problems = [
        Problem(f"--format {name}: no such format", f"one of safetensors, {', '.join(FORMATS)}")
        for name in names
        if name not in FORMATS and name != "safetensors"
    ]
    if problems:
        raise RecipeError(problems)
