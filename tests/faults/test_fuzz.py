"""Whatever a file holds, reading it gives what it says or our own error: soon, and in little memory.

Each target damages a sound file with a fixed sequence of seeds; the long form, of a minute each, is marked slow.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_train.adapters.state import CONFIG, WEIGHTS, load_adapter_config, read_adapter_tensors
from qlora_train.artifacts.folders import MANIFEST, manifest_faults, publishing
from qlora_train.artifacts.layout import RunDir
from qlora_train.data.formats import detect, parse_row
from qlora_train.data.problems import RowFault, SourceFault
from qlora_train.data.sources.open import open_source
from qlora_train.errors import DataError, ModelError, ResumeError
from qlora_train.model.binding import read_base, read_binding
from qlora_train.model.files import stored_tensors
from qlora_train.model.gguf_header import check_gguf
from qlora_train.model.skeleton import build_skeleton, load_config
from qlora_train.model.source import Source, check_model_folder
from qlora_train.quant.bnb import QuantSettings
from qlora_train.quant.fingerprint import BasePrint, TensorPrint
from qlora_train.recipe.load import load_recipe
from qlora_train.train.checkpoint import find_checkpoint
from qlora_train.untrusted import read_header
from tests.commandline import chat_rows, write_recipe, write_rows
from tests.faults import mutation
from tests.faults.mutation import damaged_bytes, damaged_json, dumps, hold
from tests.spoil import read_raw_header, split_file, write_raw
from tests.unit.model.ggufs import gguf_bytes

Read = Callable[[random.Random], object]


def recipes(folder: Path, model: Path) -> Read:
    path = write_recipe(folder, model)
    written = path.read_bytes()
    plain = b"".join(
        b"%s:\n" % name.encode() + b"".join(b"  %s: %s\n" % (k.encode(), dumps(v)) for k, v in section.items())
        for name, section in json.loads(written).items()
    )

    def read(rng: random.Random) -> None:
        path.write_bytes(damaged_bytes(rng.choice((written, plain)), rng))
        load_recipe(path)

    return read


def rows(folder: Path, model: Path) -> Read:
    path = write_rows(folder / "rows.jsonl", chat_rows(3))
    prompts = [{"prompt": "a", "completion": "b"}, {"instruction": "a", "input": "", "output": "b"}, {"text": "abc"}]
    sound = (path.read_bytes(), b"".join(dumps(row) + b"\n" for row in prompts))

    def report(number: int, fault: RowFault, text: bytes, num_bytes: int) -> None:
        raise fault

    def read(rng: random.Random) -> None:
        content = rng.choice(sound)
        if rng.random() < 0.5:
            lines = [damaged_json(json.loads(line), rng) for line in content.splitlines()]
            path.write_bytes(b"".join(dumps(line) + b"\n" for line in lines))
        else:
            path.write_bytes(damaged_bytes(content, rng))
        try:
            source = open_source(str(path))
            for raw in source.read(report):
                parse_row(source.place(raw.number), raw.columns, detect(raw.columns))
        except (RowFault, SourceFault) as fault:
            raise DataError(fault.what, fix=fault.fix) from fault

    return read


def manifests(folder: Path, model: Path) -> Read:
    checkpoint = folder / "run" / "ckpt" / "step-000001"
    with publishing(checkpoint, manifest={"step": 1, "base": "b" * 64, "binding": {"base": "b" * 64}}) as temporary:
        (temporary / "state.json").write_text("{}")
        (temporary / "more").mkdir()
        (temporary / "more" / "file").write_bytes(b"abc")
    path = checkpoint / MANIFEST
    sound = path.read_bytes()
    assert manifest_faults(checkpoint) == []

    def read(rng: random.Random) -> None:
        if rng.random() < 0.5:
            path.write_bytes(dumps(damaged_json(json.loads(sound), rng)))
        else:
            path.write_bytes(damaged_bytes(sound, rng))
        if faults := manifest_faults(checkpoint):
            assert all(isinstance(fault, str) for fault in faults)
            with pytest.raises(ResumeError):
                find_checkpoint(RunDir(folder / "run"))
        read_binding(checkpoint)

    return read


def descriptions_of_bases(folder: Path, model: Path) -> Read:
    entry = TensorPrint("a" * 64, (2, 2), "nf4", 4, True, True)
    quant = QuantSettings("nf4", True, 64, "uint8")
    base = BasePrint({"m.0.weight": entry, "m.1.weight": entry}, quant.__dict__)
    run_dir = RunDir(folder)

    def read(rng: random.Random) -> None:
        data = damaged_json({"source": {"commit": None}, **base.as_dict()}, rng)
        run_dir.base.write_bytes(dumps(data))
        found, _ = read_base(run_dir)
        assert found.num_params >= 0 and len(found.digest) == 64

    return read


def safetensors_files(folder: Path, model: Path) -> Read:
    path = folder / "x.safetensors"
    save_file({"a": torch.ones(2, 3), "b.c": torch.zeros(4, dtype=torch.bfloat16), "d": torch.tensor(1.0)}, path)
    sound, header, data = path.read_bytes(), read_raw_header(path), split_file(path)

    def read(rng: random.Random) -> None:
        if rng.random() < 0.5:
            write_raw(path, dumps(damaged_json(header, rng)), data)
        else:
            path.write_bytes(damaged_bytes(sound, rng))
        entries = read_header(path)
        tensors = load_file(path)
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
            name: entry.shape for name, entry in entries.items()
        }, "what we let in, safetensors reads alike"

    return read


def adapters(folder: Path, model: Path) -> Read:
    stem = "base_model.model.model.layers.0.mlp.up_proj"
    tensors = {f"{stem}.lora_A.weight": torch.ones(4, 128), f"{stem}.lora_B.weight": torch.ones(256, 4)}
    save_file(tensors, folder / WEIGHTS)
    weights = (folder / WEIGHTS).read_bytes()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8.0, "lora_dropout": 0.1, "bias": "none"}
    config |= {"target_modules": ["up_proj"], "use_rslora": False, "task_type": "CAUSAL_LM", "use_dora": False}
    config |= {"rank_pattern": {}, "modules_to_save": None, "init_lora_weights": True, "auto_mapping": None}

    def read(rng: random.Random) -> None:
        spoil = rng.randrange(3)
        (folder / CONFIG).write_bytes(dumps(damaged_json(config, rng) if spoil else config))
        (folder / WEIGHTS).write_bytes(damaged_bytes(weights, rng) if spoil == 0 else weights)
        found = load_adapter_config(folder)
        assert found.r == 4 and not found.use_dora and not found.rank_pattern and found.bias == "none"
        read_adapter_tensors(folder)

    return read


def model_folders(folder: Path, model: Path) -> Read:
    spoilt = Path(shutil.copytree(model, folder / "spoilt"))
    config = json.loads((model / "config.json").read_text())
    entries = dict.fromkeys(load_file(model / "model.safetensors"), "model-1.safetensors")
    (spoilt / "model.safetensors").rename(spoilt / "model-1.safetensors")

    def read(rng: random.Random) -> None:
        index = {"weight_map": entries}
        spoil_index = rng.random() < 0.3
        index_bytes = dumps(damaged_json(index, rng) if spoil_index else index)
        (spoilt / "model.safetensors.index.json").write_bytes(index_bytes)
        (spoilt / "config.json").write_bytes(dumps(config if spoil_index else damaged_json(config, rng)))
        source = Source("spoilt", spoilt)
        check_model_folder(source, weights=True)
        stored_tensors(source, build_skeleton(load_config(source)))

    return read


def gguf_files(folder: Path, model: Path) -> Read:
    path, sound = folder / "x.gguf", gguf_bytes()
    path.write_bytes(sound)
    check_gguf(path)

    def read(rng: random.Random) -> None:
        path.write_bytes(damaged_bytes(sound, rng))
        check_gguf(path)

    return read


# How many seeds a target gets in `make test`: about a second.
TARGETS: dict[Callable[[Path, Path], Read], int] = {
    recipes: 120,
    rows: 250,
    manifests: 300,
    descriptions_of_bases: 400,
    safetensors_files: 400,
    adapters: 200,
    model_folders: 50,
    gguf_files: 400,
}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_damaged_files_are_read_or_refused(
    target: Callable[[Path, Path], Read], tmp_path: Path, tiny_llama_dir: Path
) -> None:
    sound = hold(target(tmp_path, tiny_llama_dir), count=TARGETS[target])
    assert sound < TARGETS[target], "the damage is seen"


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_damaged_files_for_a_minute(target: Callable[[Path, Path], Read], tmp_path: Path, tiny_llama_dir: Path) -> None:
    hold(target(tmp_path, tiny_llama_dir), count=None, seed=1)


@pytest.mark.parametrize("failure", [ValueError("x"), KeyboardInterrupt(), RecursionError()])
def test_any_other_error_is_a_failure(failure: BaseException) -> None:
    """Negative control of the harness."""

    def read(_: random.Random) -> None:
        raise failure

    with pytest.raises(AssertionError, match="seed 0"):
        hold(read, count=1)


def test_memory_and_errors_without_advice_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tenth of the limit: some machines take seconds to hand out as much as the whole of it."""
    held = []
    monkeypatch.setattr(mutation, "MAX_BYTES", mutation.MAX_BYTES // 10)
    with pytest.raises(AssertionError, match="memory grew by"):
        hold(lambda _: held.append(torch.ones(20 * 2**20)), count=1)
    held.clear()

    def read(_: random.Random) -> None:
        raise ModelError("without advice")

    with pytest.raises(AssertionError, match="seed 0"):
        hold(read, count=1)
