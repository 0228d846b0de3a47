"""Files made to do harm run no code, read and write nothing outside of their folder, and steer no terminal.

Where code would run, it would write a marker; no test may find one.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_train import api
from qlora_train.data import sandbox
from qlora_train.errors import ModelError
from tests.commandline import chat_rows, run_cli, write_recipe, write_rows
from tests.spoil import ESCAPE, SECRETS, copy_job, edit_json, harmless, refused, train_once


class Evil:
    """Unpickling one leaves a marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def evil_module(marker: Path) -> str:
    """Python source that leaves a marker when it is imported, and names whatever is asked of it."""
    return (
        f"open({str(marker)!r}, 'w').close()\nModel = Config = Tokenizer = object\ndef generate(*_, **__): return 1\n"
    )


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "code was run"


# ---- code


def test_pickles_are_not_opened(tmp_path: Path, model: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(marker)))
    refused(train_once(tmp_path, model), 8, "pytorch_model.bin, a pickle", "safetensors")
    torch.save({"x": Evil(marker)}, tmp_path / "x")
    (tmp_path / "x").rename(model / "model.safetensors")
    refused(train_once(tmp_path, model), 4, "model.safetensors is cut short")
    assert not marker.exists()


def _with_code(model: Path, marker: Path) -> None:
    """Code that every loader of transformers would find, were it asked to."""
    for name in ("modeling.py", "configuration.py", "tokenization.py", "custom_generate/generate.py"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(evil_module(marker))
    auto_map = {"AutoConfig": "configuration.Config", "AutoModelForCausalLM": "modeling.Model"}
    edit_json(model / "config.json", auto_map=auto_map)
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization.Tokenizer"]})


def test_a_model_that_needs_its_own_code_is_refused(tmp_path: Path, model: Path, marker: Path) -> None:
    _with_code(model, marker)
    edit_json(model / "config.json", model_type="own")
    refused(train_once(tmp_path, model), 8, "asks to run code", "auto_map in config.json")
    assert not marker.exists()


def test_code_and_pickles_beside_a_sound_model_are_left_alone(
    job: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers implements the model and reads its safetensors: nothing else in the folder is needed."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    copy = copy_job(job, tmp_path / "copy")
    _with_code(copy / "model", marker)
    for name in ("pytorch_model.bin", "consolidated.00.pth", "training_args.bin"):
        (copy / "model" / name).write_bytes(pickle.dumps(Evil(marker)))
    for command in (("eval", copy / "run"), ("export", copy / "run", copy / "next"), ("chat", copy / "out")):
        outcome = run_cli(*command, *(["--once", "x", "--max-new-tokens", "1"] if command[0] == "chat" else []))
        assert outcome.code == 0, outcome.err
    assert not marker.exists()


def test_a_tokenizer_that_only_its_own_code_reads_is_refused(tmp_path: Path, model: Path, marker: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenization.py").write_text(evil_module(marker))
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization.Tokenizer", None]})
    refused(train_once(tmp_path, model), 8, "auto_map in tokenizer_config.json")
    assert not marker.exists()


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_a_pickle_dropped_into_a_run_is_not_opened(
    verb: str, job: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    copy = copy_job(job, tmp_path / "copy")
    (copy / "run" / "run.json").unlink()
    folder = max((copy / "run" / "ckpt").iterdir()) if verb == "train" else copy / "run" / "adapter"
    (folder / "rng_state").write_bytes(pickle.dumps(Evil(marker)))
    arguments = ("train", copy / "recipe.yaml", "--resume") if verb == "train" else ("eval", copy / "run")
    refused(run_cli(*arguments), 8, "rng_state, a pickle")
    assert not marker.exists()


def test_an_adapter_in_a_pickle_is_refused(job: Path, tmp_path: Path, marker: Path) -> None:
    adapter = tmp_path / "foreign"
    adapter.mkdir()
    shutil.copy(job / "run" / "adapter" / "adapter_config.json", adapter)
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Evil(marker)))
    refused(train_once(tmp_path, job / "model", adapter__init_from=str(adapter)), 8, "adapter_model.bin, a pickle")
    assert not marker.exists()


def test_an_adapter_behind_a_link_is_refused(job: Path, tmp_path: Path) -> None:
    copy = copy_job(job, tmp_path / "copy")
    weights = copy / "run" / "adapter" / "adapter_model.safetensors"
    weights.rename(tmp_path / "outside")
    weights.symlink_to(tmp_path / "outside")
    refused(run_cli("eval", copy / "run"), 8, "is a link to", "outside of")


@pytest.mark.parametrize("case", ["traversal", "pickle", "adapter", "link"])
def test_chat_opens_no_folder_that_leads_elsewhere(case: str, tmp_path: Path, model: Path, marker: Path) -> None:
    if case == "traversal":
        (model / "model.safetensors").rename(model.parent / "outside.safetensors")
        index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        shutil.copy(tmp_path / "outside.safetensors", model / "other.safetensors")
    elif case == "pickle":
        (model / "model.safetensors").unlink()
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(marker)))
    elif case == "adapter":
        (model / "adapter_config.json").write_text("{}")
    else:
        (model / "tokenizer.json").rename(tmp_path / "outside")
        (model / "tokenizer.json").symlink_to(tmp_path / "outside")
    refused(run_cli("chat", model, "--once", "x"), 4 if case == "adapter" else 8)
    assert not marker.exists()


def test_tags_and_templates_of_a_recipe_run_nothing(tmp_path: Path, model: Path, marker: Path) -> None:
    recipe = write_recipe(tmp_path, model)
    for text in (
        f"model: !!python/object/apply:os.system ['touch {marker}']\n",
        f"model: !!python/object/new:subprocess.Popen [['touch', '{marker}']]\n",
    ):
        recipe.write_text(text)
        refused(run_cli("train", recipe), 2, "the tag", "is not allowed")
    assert not marker.exists()


TEMPLATES = {
    "endless": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", 8, "0.6 s"),
    "of a power": ("{{ 9 ** (9 ** 7) }}", 8, "0.6 s"),
    "of memory": ("{{ 'a' * 10 ** 10 }}", 8, "memory"),
    "of length": ("{{ 'a' * (17 * 2 ** 20) }}", 8, "the limit is 16,777,216"),
    "of a file": ("{% include '/etc/passwd' %}", 4, "the chat template of"),
    "of an import": ("{% from '/etc/passwd' import x %}", 4, "the chat template of"),
    "of classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", 4, "the chat template of"),
    "of globals": ("{{ cycler.__init__.__globals__.os.system('true') }}", 4, "the chat template of"),
    "of attributes": ("{{ (messages|attr('append'))(1) }}", 4, "the chat template of"),
    "of a format": ("{{ '{0.__class__}'.format(messages) }}", 4, "the chat template"),
    "too large": ("{# " + "x" * 2**16 + " #}", 8, "the limit is 65,536"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_is_held_to_its_limits(
    case: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "ROW_SECONDS", 0.6)
    template, code, word = TEMPLATES[case]
    (model / "chat_template.jinja").write_text(template)
    refused(run_cli("check", write_recipe(tmp_path, model)), code, word)


# ---- the terminal, and secrets


def test_nothing_that_is_named_by_others_steers_the_terminal(
    tmp_path: Path, model: Path, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{f"mess{ESCAPE}ages": []}, {"messages": [{"role": f"us{ESCAPE}er", "content": "x"}]}]
    outcomes = []
    for number, row in enumerate(rows):
        write_rows(tmp_path / f"{number}{ESCAPE[:6]}.jsonl", [row])
        (tmp_path / f"{number}.jsonl").symlink_to(tmp_path / f"{number}{ESCAPE[:6]}.jsonl")
        outcomes.append(run_cli("check", write_recipe(tmp_path, model, data__train=[f"{number}.jsonl"])))
    write_rows(tmp_path / "good.jsonl", [{**row, f"x{ESCAPE}": ESCAPE} for row in chat_rows(4)])
    (tmp_path / "good.jsonl").write_text((tmp_path / "good.jsonl").read_text().replace("ls ", json.dumps(ESCAPE)[1:-1]))
    outcomes.append(run_cli("check", write_recipe(tmp_path, model, data__train=["good.jsonl"], data__seq_len=256)))
    assert outcomes[-1].code == 0 and "\\x1b" in outcomes[-1].out, outcomes[-1].err
    outcomes.append(run_cli("check", tmp_path / "recipe.yaml", "--json"))
    outcomes += [run_cli("train", tmp_path / f"no{ESCAPE}.yaml"), run_cli("check", tmp_path / "recipe.yaml", ESCAPE)]
    edit_json(model / "config.json", quantization_config={"quant_method": ESCAPE})
    outcomes.append(train_once(tmp_path, model))
    adapter = Path(shutil.copytree(job / "run" / "adapter", tmp_path / "foreign"))
    edit_json(adapter / "adapter_config.json", peft_type=ESCAPE)
    outcomes.append(train_once(tmp_path, job / "model", adapter__init_from=str(adapter)))

    def fails(*_: object, **__: object) -> None:
        raise ModelError(f"a library says {ESCAPE}", fix="none")

    monkeypatch.setattr(api, "check", fails)
    outcomes.append(run_cli("check", tmp_path / "recipe.yaml"))
    assert [outcome.code for outcome in outcomes] == [3, 3, 0, 0, 2, 2, 4, 4, 4]
    for outcome in outcomes:
        harmless(outcome)


def test_no_secret_is_written(job: Path) -> None:
    files = [path for path in job.rglob("*") if path.is_file()]
    assert len(files) > 30
    for path in files:
        content = path.read_bytes()
        assert not any(value.encode() in content for value in SECRETS.values()), path


def test_no_secret_is_printed(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, model)

    def fails(*_: object, **__: object) -> None:
        raise ModelError(f"401 for https://me:{'p' * 9}@hub/{' '.join(SECRETS.values())}", fix="none")

    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(api, "check", fails)
    said = run_cli("check", recipe).err
    assert said.count("[secret]") == 4 and "https://[secret]@hub/" in said
    assert not any(value in said for value in SECRETS.values())


@pytest.mark.parametrize("place", ["file", "override"])
def test_a_recipe_with_a_token_is_refused_without_repeating_it(place: str, tmp_path: Path, model: Path) -> None:
    token = SECRETS["HF_TOKEN"]
    changes = {"model__revision": token} if place == "file" else {}
    overrides = [f"model.revision={token}"] if place == "override" else []
    outcome = run_cli("train", write_recipe(tmp_path, model, **changes), *overrides)
    refused(outcome, 2, "looks like an access token", "recipe.yaml:" if place == "file" else "command line")
    assert token not in outcome.err


@pytest.mark.slow
def test_a_local_job_opens_no_connection_and_no_code_of_the_hub(tmp_path: Path, model: Path, marker: Path) -> None:
    """With a network allowed, and the package installed through which libraries fetch code from the hub."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    (tmp_path / "site" / "kernels").mkdir(parents=True)
    (tmp_path / "site" / "kernels" / "__init__.py").write_text(evil_module(marker))
    environ = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    recipe = write_recipe(tmp_path, model, train__max_steps=1, eval__generate_rows=0)
    log = tmp_path / "calls"
    command = ["strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=connect,sendto", "-o", str(log)]
    command += [sys.executable, "-m", "qlora_train", "train", str(recipe)]
    path = f"{tmp_path / 'site'}:{Path.cwd()}"
    done = subprocess.run(command, env={**environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    if "ptrace" in done.stderr and not log.exists():
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    assert "AF_INET" not in log.read_text()
    assert not marker.exists()
