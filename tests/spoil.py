"""Files changed as accidents and attackers change them, and what a refusal must look like."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qlora_train.artifacts.files import sha256_file, write_json
from qlora_train.artifacts.folders import MANIFEST, _sealed
from tests.commandline import Outcome, run_cli, write_recipe

Tensors = dict[str, torch.Tensor]
# Of a form that is known as a token's, and of none, told by the names of their variables.
SECRETS = {"HF_TOKEN": "hf_" + "Zq7" * 12, "WANDB_API_KEY": "k" * 20 + "0123456789", "MY_PASSWORD": "correct-horse-9"}
# Sets the title, clears the screen, turns the direction of writing, and colours what follows.
ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e\x9b31m"


def refused(outcome: Outcome, code: int, *words: str) -> None:
    """The command ended with the code of this kind of error, without a traceback, with advice and these words."""
    assert outcome.code == code, (outcome.code, outcome.err)
    assert "Traceback" not in outcome.err and "Fix:" in outcome.err, outcome.err
    for word in words:
        assert word in outcome.err, (word, outcome.err)


def harmless(outcome: Outcome) -> None:
    """Nothing of what was printed acts on a terminal."""
    said = outcome.out + outcome.err
    odd = {char for char in said if unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp")} - {"\n", "\r"}
    assert not odd, ascii(said)


def train_once(folder: Path, model: Path, **changes: Any) -> Outcome:
    """Train one step on a model, without generating."""
    settings = {"eval__generate_rows": 0, "train__max_steps": 1, **changes}
    return run_cli("train", write_recipe(folder, model, **settings))


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of a safetensors file in place, and write it anew."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def shards(model: Path) -> dict[str, Any]:
    """Make two shards of a model's file; the index as it would be written."""
    tensors = {name: tensor.clone() for name, tensor in load_file(model / "model.safetensors").items()}
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    return {"metadata": {}, "weight_map": weight_map}


def write_index(model: Path, index: object) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def flip_bit(path: Path, at: int = -1) -> None:
    """Change one bit of a file: by default of its last byte, which is data in a safetensors file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def split_file(path: Path) -> bytes:
    """The data of a safetensors file, without its header."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def read_raw_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file as it stands there."""
    content = path.read_bytes()
    header: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header


def write_raw(path: Path, header: bytes, data: bytes) -> Path:
    """A safetensors file of any header, sound or not."""
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a safetensors file and leave its data as it is."""
    header, data = read_raw_header(path), split_file(path)
    change(header)
    write_raw(path, json.dumps(header).encode(), data)


def sign_again(folder: Path, **changes: Any) -> None:
    """Make the manifest of a published folder agree with its files, as somebody who knows the format would."""
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    manifest["files"] = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in files
    }
    write_json(folder / MANIFEST, _sealed(manifest))


def copy_job(job: Path, target: Path) -> Path:
    """A folder with `model/`, `run/`, rows and recipe, copied as a whole; its recipes name the files of the copy."""
    shutil.copytree(job, target)
    for recipe in (target / "recipe.yaml", target / "run" / "recipe.resolved.yaml"):
        recipe.write_text(recipe.read_text().replace(f"{job}/", f"{target}/"))
    return target
