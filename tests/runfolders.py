"""Run folders written by hand, as training and export write them, for tests of what reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from qlora_train.artifacts.folders import publishing, read_manifest
from qlora_train.artifacts.layout import RunDir

NUM_STEPS = 40
ROWS = "/data/rows.jsonl"
RECIPE = """\
# Every key of the recipe, with its value and where the value came from. Paths are absolute.
version: 1  # default
model:
  path: tiny/model-a  # recipes/tiny.yaml:3
quant:
  quant_type: nf4  # default
adapter:
  method: lora  # default
  r: 4  # recipes/tiny.yaml:6
  alpha: 8.0  # command line
data:
  train: [{path: 'rows #1.jsonl', weight: 1.0}]  # recipes/tiny.yaml:9
train:
  learning_rate: 0.01  # recipes/tiny.yaml:12
  max_grad_norm: 1.0  # default
run:
  dir: /runs/tiny  # recipes/tiny.yaml:20
"""


def train_line(step: int) -> dict[str, Any]:
    """A logged step."""
    return {
        "kind": "train",
        "step": step,
        "loss": 1.0 + 4.0 / step,
        "grad_norm": 0.5 + 2.0 / step,
        "learning_rate": 0.01 * (1 + math.cos(math.pi * step / NUM_STEPS)) / 2,
        "num_tokens": 96,
        "num_supervised_tokens": 20 + step,
        "step_s": 0.25,
    }


def side(loss: float, exact: float, similarity: float, texts: list[str]) -> dict[str, Any]:
    """Base or adapter in eval.json."""
    answers = [
        {
            "where": f"/data/test.jsonl:{index}",
            "asked": f"question {index}",
            "reference": f"answer {index}",
            "text": text,
            "exact_match": float(text == f"answer {index}"),
            "char_similarity": 1.0 if text == f"answer {index}" else 0.25,
        }
        for index, text in enumerate(texts)
    ]
    scores = {"num_answers": len(texts), "exact_match": exact, "first_word": exact, "char_similarity": similarity}
    figures = {"loss": loss, "perplexity": math.exp(loss), "num_rows": 12, "num_supervised_tokens": 345}
    return {**figures, "scores": scores, "answers": answers}


def evaluation() -> dict[str, Any]:
    """eval.json: of eight answers the adapter's are right in six, and in one the base's was better."""
    base = ["answer 0" if index == 7 else "nothing" for index in range(8)]
    base[7] = "answer 7"
    adapter = [f"answer {index}" for index in range(6)] + ["nothing", "worse"]
    return {
        "measured_on": {"rows": "f00d" * 16, "generate_rows": 8, "max_new_tokens": 16},
        "base": side(3.25, 0.125, 0.34375, base),
        "adapter": side(1.5, 0.75, 0.8125, adapter),
    }


def data() -> dict[str, Any]:
    """data.json."""
    zero = dict.fromkeys(("cut", "dropped", "rejected", "duplicate", "held_out", "not_selected"), 0)
    train = {
        "split": "train",
        "counts": {"kept": 117, **zero, "dropped": 3},
        "reasons": [{"fate": "dropped", "reason": "# tokens, seq_len is #", "count": 3, "examples": ["a:1"]}],
        "sources": [{"name": ROWS, "format": "messages", "weight": 1, "num_rows": 120, "num_trained": 117}],
        "num_rows": 120,
        "num_trained": 117,
        "num_pieces": 117,
        "num_tokens": 3_801,
        "num_supervised_tokens": 1_602,
        "num_lost_tokens": 99,
        "lost_token_frac": 0.025,
        "duplicates": {"num_rows": 117, "num_duplicates": 2, "examples": []},
        "near_duplicates": {"num_compared": 117, "num_near": 5},
        "batching": {"kind": "packed", "num_lines": 40, "num_steps": NUM_STEPS, "padding_frac": 0.01},
    }
    held_out = {**train, "split": "eval", "counts": {"kept": 12, **zero}, "reasons": [], "batching": None}
    return {
        "seq_len": 96,
        "max_lost_frac": 0.05,
        "splits": [train, {**held_out, "num_rows": 12, "num_trained": 12, "num_tokens": 777}],
        "overlap": {"num_eval_rows": 12, "num_rows": 0, "num_prompts": 1},
        "files": [{"name": ROWS, "kind": "json", "sha256": "ab" * 32}],
    }


def memory() -> dict[str, Any]:
    """memory.json: training as planned, evaluation a fifth above."""

    def term(stage: str, cause: str, mib: int, how: str = "traced") -> dict[str, Any]:
        return {"stage": stage, "cause": cause, "num_bytes": mib * 2**20, "how": how, "source": "a trace"}

    def phase(name: str, planned: dict[str, int], measured: dict[str, int]) -> dict[str, Any]:
        both = {"planned_by_cause": planned, "measured_by_cause": measured}
        in_bytes = {key: {cause: mib * 2**20 for cause, mib in parts.items()} for key, parts in both.items()}
        sums = {key: sum(in_bytes[f"{key}_by_cause"].values()) or None for key in ("planned", "measured")}
        return {"name": name, **sums, "reserved": None, **in_bytes}

    terms = [
        term("training", "quantised base", 300),
        term("training", "inputs of layers", 400),
        term("training", "loss head", 100),
        term("training", "context", 100, "constant"),
        term("disk", "checkpoints", 1024, "formula"),
    ]
    return {
        "device": "cpu",
        "settings": {"micro_batch_size": 1, "checkpointing": "none", "compiled": False},
        "plan": {"terms": terms},
        "phases": [
            phase("training", {"quantised base": 300, "activations": 500}, {"quantised base": 300, "activations": 508}),
            phase("evaluation", {"quantised base": 300}, {"quantised base": 300, "activations": 60}),
            phase("generation", {"quantised base": 300, "activations": 100}, {"quantised base": 300}),
        ],
        "peak": 2**30,
        "resident": {"before": 400 * 2**20, "peak": 1424 * 2**20},
        "rehearsal": {"checkpoint_bytes": 5 * 2**20, "checkpoint_s": 0.25},
        "warnings": ["evaluation held 20 % more than planned"],
        "out_of_memory": None,
    }


def summary() -> dict[str, Any]:
    """run.json: 10 s of steps."""
    return {
        "num_steps": NUM_STEPS,
        "best_step": NUM_STEPS,
        "num_trainable": 1_234,
        "trainable_frac": 0.0123,
        "num_supervised_tokens": 1_620,
        "supervised_tokens_per_s": 162.0,
        "tokens_per_s": 384.0,
        "peak_memory_bytes": 3 * 2**29,
        "wall_s": 42.0,
    }


def export_line(adapter_sha256: str, *, accepted: bool = True) -> dict[str, Any]:
    """A line of exports.jsonl."""
    kl = 0.0002 if accepted else 0.5
    distance = {"num_tokens": 1_018, "num_supervised_tokens": 203, "max_kl": 1.0, "reference_nll": 1.5}
    return {
        "folder": "/exports/merged",
        "export_dtype": "bfloat16",
        "adapter_sha256": adapter_sha256,
        "accepted": accepted,
        "num_rows": 12,
        "split": "eval",
        "max_kl_frac": 0.01,
        "merged": {**distance, "mean_kl": kl, "top1_agreement": 0.99, "candidate_nll": 1.501},
        "adapter_off": {**distance, "mean_kl": 2.0, "top1_agreement": 0.5, "candidate_nll": 3.25},
    }


def write_adapter(folder: Path, *, step: int = NUM_STEPS, seed: int = 0, **config: Any) -> dict[str, torch.Tensor]:
    """A published adapter of two layers of two modules each, and of the head; returns its tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in (*(f"layers.{layer}.{name}" for layer in (0, 1) for name in ("q_proj", "up_proj")), "lm_head"):
        for factor, shape in (("lora_A", (4, 16)), ("lora_B", (24, 4))):
            tensors[f"base_model.model.{module}.{factor}.weight"] = torch.randn(shape, generator=generator)
    with publishing(folder, manifest={"step": step}) as temporary:
        save_file(tensors, temporary / "adapter_model.safetensors")
        LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **config}).save_pretrained(str(temporary))
    return tensors


def write_run(folder: Path, *, seed: int = 0, recipe: str = RECIPE) -> Path:
    """A finished and exported run; returns its folder."""
    folder.mkdir(parents=True)
    run_dir = RunDir(folder)
    run_dir.recipe.write_text(recipe, encoding="utf-8")
    lines = [*map(train_line, range(1, NUM_STEPS + 1))]
    lines.insert(20, {"kind": "eval", "step": 20, "eval_loss": 1.75, "num_eval_tokens": 345})
    lines.append({"kind": "eval", "step": NUM_STEPS, "eval_loss": 1.5, "num_eval_tokens": 345})
    run_dir.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    environment = {
        "python": "3.11.7",
        "system": "Linux x86_64",
        "cpu_capability": "AVX2",
        "cpu_count": 2,
        "threads": 2,
        "cuda": None,
        "cuda_devices": [],
        "versions": {"torch": "2.15.0", "peft": "0.21.2"},
        "code_sha256": "c0de" * 16,
    }
    base = {
        "source": {"name": "tiny/model-a", "commit": "1a2b3c", "file_sha256": None},
        "digest": "ba5e" * 16,
        "quant": {"quant_type": "nf4", "double_quant": True},
        "tensors": {"layers.0.q_proj.weight": {"dtype": "nf4", "num_bytes": 2**20, "shape": [24, 16]}},
    }
    files = {run_dir.environment: environment, run_dir.base: base, run_dir.data: data(), run_dir.memory: memory()}
    for path, content in {**files, run_dir.evaluation: evaluation(), run_dir.summary: summary()}.items():
        path.write_text(json.dumps(content), encoding="utf-8")
    write_adapter(run_dir.adapter, seed=seed)
    sha256 = read_manifest(run_dir.adapter)["files"]["adapter_model.safetensors"]["sha256"]
    run_dir.exports.write_text(json.dumps(export_line(sha256)) + "\n", encoding="utf-8")
    return folder


def rewrite(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def resume_line(step: int, minute: int, **changes: Any) -> dict[str, Any]:
    """A line of resumes.jsonl; `fork` and `rounding` as {key: (old, new)}."""
    found = {
        part: [{"key": key, "old": old, "new": new, "where": ""} for key, (old, new) in changes.get(part, {}).items()]
        for part in ("fork", "rounding")
    }
    level = "D0" if found["fork"] else "D1" if found["rounding"] else "D2"
    return {"time": clock(minute), "step": step, "from": f"step-{step:06d}", "level": level, **found}


def end_line(kind: str, code: int, minute: int, step: int, what: str, fix: str = "") -> dict[str, Any]:
    """A line of errors.jsonl."""
    problems = [{"what": what, "fix": fix, "where": None}]
    return {"time": clock(minute), "kind": kind, "exit_code": code, "step": step, "problems": problems}


def clock(minute: int) -> str:
    """A time of one afternoon."""
    return f"2026-11-22T17:{minute:02d}:00+0100"


def spike(step: int, loss: float = 9.5) -> dict[str, Any]:
    """A loss that leaps, in metrics.jsonl."""
    rows = [f"{ROWS}:{index}" for index in range(6)]
    return {"kind": "event", "step": step, "what": "loss spike", "loss": loss, "limit": 2.5, "rows": rows}


def write_lines(path: Path, *lines: dict[str, Any]) -> None:
    """Append JSON lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def write_flight(run_dir: RunDir, step: int, **changes: Any) -> None:
    """The record of a step that came to no finite number; module 1 grew before, all gradients are none in the end."""
    names = [f"layers.{layer}.q_proj.lora_{factor}" for layer in (0, 1) for factor in "AB"]
    before = list(range(max(1, step - 3), step))
    grown = {name: [3.0 + 27.0 * (name.startswith("layers.1") and at == step - 1) for at in before] for name in names}
    content = {
        "step": step,
        "loss": "nan",
        "grad_norm": "inf",
        "learning_rate": 0.01,
        "first_not_finite": {"kind": "output", "name": "m", "micro_step": 1, "text": "the output of layers.1.mlp"},
        "rows": [
            {"row": i, "where": f"{ROWS}:{i}", "micro_step": i % 2, "num_tokens": 7, "text": f"<s>row {i}\nits answer"}
            for i in range(10)
        ],
        "last_steps": {
            "step": before,
            "loss": [2.0] * len(before),
            "grad_norm": [4.0] * len(before),
            "learning_rate": [0.01] * len(before),
            "grad_norm_of": grown,
            "norm_of": {name: [4.0 + place for place in range(len(before))] for name in names},
        },
        "this_step": {"grad_norm_of": dict.fromkeys(names, "nan")},
        "repeat": f"qlora-train train tiny.yaml --resume --from {step - 1}",
    }
    with publishing(run_dir.flight(step), manifest={"step": step}) as folder:
        (folder / "flight.json").write_text(json.dumps(content | changes), encoding="utf-8")


def write_history(run_dir: RunDir) -> None:
    """A spike; SIGTERM at step 10; a resume; step 21 not finite; a fork at 20, after which the run ended well."""
    write_lines(run_dir.metrics, spike(7), spike(30, 4.0), spike(31, 8.0))
    write_flight(run_dir, 21)
    numerics = "step 21: loss nan, gradient norm inf; recorded in /runs/tiny/flight/step-000021"
    write_lines(
        run_dir.errors,
        end_line("signal", 143, 10, 10, "SIGTERM: saved /runs/tiny/ckpt/step-000010; go on with --resume"),
        *(end_line("resume", 5, 11 + n, 10, "train.epochs: 1 at the checkpoint, 2 now", "restore it") for n in (0, 1)),
        end_line("numerics", 7, 30, 20, numerics, "lower train.learning_rate"),
    )
    fork = {"train.learning_rate": (0.01, 0.005), "data": ("ab" * 32, "cd" * 32)}
    write_lines(run_dir.resumes, resume_line(10, 20), resume_line(20, 40, fork=fork, rounding={"threads": (2, 1)}))
