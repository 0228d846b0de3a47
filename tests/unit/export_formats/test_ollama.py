"""Modelfiles: the template derived from the model's own, rendered by Go where it is installed."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from qlora_train.data.parity import golden_prompts
from qlora_train.errors import ModelError
from qlora_train.export.formats import ollama
from qlora_train.export.formats.ollama import check_template, modelfile, read_turns, render_with_go, without_bos
from tests.unit.export_formats.served import build_tokenizer

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


def test_without_go_it_says_unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama.shutil, "which", lambda _: None)
    tokenizer = tokenizer_with(None)
    assert "unverified" in check_template("", golden_prompts([], tokenizer), "").words


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
