"""Modelfiles: the template derived from the model's own, rendered by Go where it is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_train.data.parity import golden_prompts
from qlora_train.errors import ModelError
from qlora_train.export.formats import ollama, writers
from qlora_train.export.formats.ollama import check_template, modelfile, read_turns, render_with_go, without_bos
from qlora_train.export.formats.vocabulary import read_vocabulary
from tests.unit.export_formats.served import CONFIGS, build_tokenizer

needs_go = pytest.mark.skipif(shutil.which("go") is None, reason="needs Go (apt install golang-go)")
pytestmark = pytest.mark.usefixtures("shared_workers")
TEMPLATES = {
    "chatml": None,  # the tokenizer's own, with a system turn where there is none
    "llama3": "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + "
    "(first if loop.first else '') + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + "
    "' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% else %}"
    "{{ raise_exception('no system') }}{% endif %}{% endfor %}",
    "phi3": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
}


def tokenizer_with(template: str | None) -> Any:
    tokenizer = build_tokenizer("gpt-2")
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


@needs_go
@pytest.mark.parametrize("family", TEMPLATES)
def test_go_renders_what_the_chat_template_renders(family: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[family])
    checked = check_template(read_turns(tokenizer).go_template(), golden_prompts([], tokenizer), "")
    assert checked.num_prompts >= 3 and checked.num_equal == checked.num_prompts, checked.words
    assert checked.words.startswith("verified")


@needs_go
def test_the_bos_that_the_server_adds_is_left_out() -> None:
    tokenizer = tokenizer_with(TEMPLATES["llama3"])
    template = without_bos(read_turns(tokenizer), tokenizer.bos_token, True).go_template()
    assert tokenizer.bos_token not in template
    golden = golden_prompts([], tokenizer)
    assert check_template(template, golden, tokenizer.bos_token).num_equal == len(
        [g for g in golden if g["generation_prompt"]]
    )
    assert check_template(template, golden, "").num_equal == 0, "negative control: without it the prompts differ"


@needs_go
def test_what_differs_is_said() -> None:
    trimming = TEMPLATES["llama3"].replace("m['content']", "m['content'] | trim")  # type: ignore[union-attr]
    tokenizer = tokenizer_with(trimming)
    checked = check_template(read_turns(tokenizer).go_template(), golden_prompts([], tokenizer), "")
    assert checked.num_equal == checked.num_prompts - 1 and "white space around a message" in checked.words
    template = read_turns(tokenizer).go_template().replace("eot_id", "eos_id")
    assert check_template(template, golden_prompts([], tokenizer), "").num_equal == 0


@needs_go
def test_messages_are_joined_as_ollama_joins_them() -> None:
    tokenizer = tokenizer_with(TEMPLATES["phi3"])
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert render_with_go(read_turns(tokenizer).go_template(), [turns]) == ["<|user|>\na\n\nb<|end|>\n<|assistant|>\n"]


@needs_go
def test_a_template_that_go_refuses_is_an_error() -> None:
    with pytest.raises(ModelError, match="Go does not render"):
        render_with_go("{{ .Missing", [[]])


def test_a_template_that_takes_too_long_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(command: list[str], **settings: Any) -> None:
        raise subprocess.TimeoutExpired(command, settings["timeout"])

    monkeypatch.setattr(ollama.subprocess, "run", slow)
    with pytest.raises(ModelError, match="within 120 s"):
        render_with_go("", [[]])


@needs_go
def test_what_the_system_says_goes_into_the_first_question_where_it_has_no_place() -> None:
    tokenizer = build_tokenizer("sentencepiece")
    tokenizer.chat_template = TEMPLATES["mistral"]
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    template = read_turns(tokenizer).go_template()
    assert render_with_go(template, [turns, turns[1:]]) == ["<s>[INST] S\n\nQ [/INST]", "<s>[INST] Q [/INST]"]


def job_with(tokenizer: Any, folder: Path) -> Any:
    """What a Modelfile is written from."""
    (folder / "config.json").write_text("{}")
    source = SimpleNamespace(folder=folder)
    ends = [tokenizer.eos_token_id]
    return SimpleNamespace(
        tokenizer=tokenizer, golden=[], source=source, end_token_ids=ends, config=CONFIGS["llama"], vocabulary=list
    )


def test_a_template_that_go_refuses_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ModelError("Go does not render the template:\nline 1: no", fix="report this")

    tokenizer = tokenizer_with(None)
    job, vocabulary = job_with(tokenizer, tmp_path), read_vocabulary(tokenizer, 512, [])
    writers._write_modelfile(job, tmp_path, "m.gguf", vocabulary)
    assert "TEMPLATE" in (tmp_path / "Modelfile").read_text(), "negative control"
    monkeypatch.setattr(writers, "check_template", refuse)
    (notice,) = writers._write_modelfile(job, tmp_path, "m.gguf", vocabulary)
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert lines[0] == "# Template left out: Go does not render the template: line 1: no."
    assert notice == "Modelfile: template left out: Go does not render the template: line 1: no"
    assert lines[1] == "FROM ./m.gguf" and not any(line.startswith("TEMPLATE") for line in lines)


def test_k_quants_keep_the_notices_of_the_file_they_are_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_file(job: Any, path: Path, *_: Any) -> tuple[None, tuple[str, ...]]:
        path.touch()
        return None, ("the context is short",)

    def quantise(command: list[str], **_: Any) -> Any:
        Path(command[2]).touch()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(writers.shutil, "which", str)
    monkeypatch.setattr(writers.subprocess, "run", quantise)
    monkeypatch.setattr(writers, "_write_gguf_file", write_file)
    monkeypatch.setattr(writers, "_write_modelfile", lambda *_: ("Modelfile: template none",))
    monkeypatch.setattr(writers, "GgufModel", lambda *_: None)
    monkeypatch.setattr(writers, "_types_words", lambda *_: "all in Q4_K")
    written = writers.write_k_quant(job_with(tokenizer_with(None), tmp_path), tmp_path, "q4_k_m")
    assert written.notices[:2] == ("the context is short", "all in Q4_K") and "rounds what goes" in written.notices[2]
    assert written.notices[3:] == ("Modelfile: template none",)


def test_without_go_it_says_unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama.shutil, "which", lambda _: None)
    tokenizer = tokenizer_with(None)
    assert "unverified" in check_template("", golden_prompts([], tokenizer), "").words


def test_nothing_to_render_verifies_nothing() -> None:
    assert ollama.Checked(0, 0, (), program=True).words.startswith("unverified: no golden prompt")


def test_an_end_without_a_token_is_no_stop(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(None)
    job, vocabulary = job_with(tokenizer, tmp_path), read_vocabulary(tokenizer, 512, [])
    job.end_token_ids = [tokenizer.eos_token_id, 100_000]
    writers._write_modelfile(job, tmp_path, "m.gguf", vocabulary)
    stops = [line for line in (tmp_path / "Modelfile").read_text().splitlines() if line.startswith("PARAMETER stop")]
    assert stops == ['PARAMETER stop "<|im_end|>"']


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m['content'] if not loop.first else 'gone' }}{% endfor %}", "three questions"),
        (
            "{% for m in messages %}{{ loop.index ~ ':' ~ m['content'] ~ ';' }}{% endfor %}",
            "otherwise where another follows",
        ),
    ],
)
def test_templates_that_do_more_than_write_turns_are_refused(template: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        read_turns(tokenizer_with(template))


def test_parameters() -> None:
    generation = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.1, "top_p": None}
    content = modelfile("model-F16.gguf", "T", ["<|im_end|>", 'a"b'], generation, 2048, "verified")
    assert content.splitlines() == [
        "# Template verified.",
        "FROM ./model-F16.gguf",
        'TEMPLATE """T"""',
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "a\\"b"',
        "PARAMETER temperature 0.7",
        "PARAMETER repeat_penalty 1.1",
        "PARAMETER num_ctx 2048",
    ]
    plain = modelfile("m.gguf", None, [], {"temperature": 0.7}, 8192, "none")
    assert plain.splitlines() == ["# Template none.", "FROM ./m.gguf"], "greedy models and long contexts need no more"
