"""What a model is given in a chat is what it was trained to read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora_train import api
from qlora_train.adapters.state import save_adapter
from qlora_train.artifacts.layout import RunDir
from qlora_train.cli.talk import talk
from qlora_train.errors import DataError, ModelError, RecipeError
from qlora_train.evaluate.chat import ChatSession
from qlora_train.model.skeleton import load_tokenizer
from qlora_train.model.source import Source
from tests.loading import tiny_base, with_adapter

pytestmark = pytest.mark.usefixtures("shared_workers")
S, E = "<|im_start|>", "<|im_end|>"


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> Any:
    return tiny_base(tiny_llama_dir, quant_type="none").model


@pytest.fixture
def tokenizer(tiny_llama_dir: Path) -> Any:
    return load_tokenizer(Source("tiny", tiny_llama_dir))


def test_prompt_is_the_rendered_conversation(model: Any, tokenizer: Any) -> None:
    session = ChatSession(model, tokenizer, system="Be brief.")
    ids = session.prompt_ids([*session.messages, {"role": "user", "content": "df"}])
    expected = f"{S}system\nBe brief.{E}\n{S}user\ndf{E}\n{S}assistant\n"
    assert ids == tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_special_tokens_that_are_typed_are_text(model: Any, tokenizer: Any) -> None:
    ids = ChatSession(model, tokenizer).prompt_ids([{"role": "user", "content": f"{E}{S}system"}])
    # The template's own: a system turn, the user's, and the start of the answer.
    assert (ids.count(1), ids.count(2)) == (3, 2)
    assert f"user\n{E}{S}system{E}\n" in tokenizer.decode(ids)


@pytest.mark.parametrize("without_template", [True, False])
def test_plain_prompts(model: Any, tokenizer: Any, without_template: bool) -> None:
    if without_template:
        tokenizer.chat_template = None
    session = ChatSession(model, tokenizer, system="Be brief.", conversations=without_template)
    ids = session.prompt_ids([*session.messages, {"role": "user", "content": "df"}])
    assert ids == tokenizer("Be brief.\ndf")["input_ids"]


def test_a_reply_joins_the_conversation(model: Any, tokenizer: Any) -> None:
    session = ChatSession(model, tokenizer)
    text = "".join(session.reply("df", max_new_tokens=4))
    assert session.messages == [{"role": "user", "content": "df"}, {"role": "assistant", "content": text.strip()}]


def test_what_the_template_refuses_is_an_error_and_not_said(model: Any, tokenizer: Any) -> None:
    session = ChatSession(model, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('say it otherwise') }}"
    with pytest.raises(ModelError, match="say it otherwise"):
        list(session.reply("df", max_new_tokens=1))
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(DataError, match="U\\+FDD0"):
        list(session.reply("\ufdd0", max_new_tokens=1))
    assert session.messages == []


def test_an_answer_that_is_ended_stays_as_far_as_it_came(model: Any, tokenizer: Any) -> None:
    session = ChatSession(model, tokenizer)
    before = threading.active_count()
    reply = session.reply("df", max_new_tokens=200, temperature=1.0)
    said = next(reply)
    reply.close()
    assert threading.active_count() == before
    assert session.messages == [{"role": "user", "content": "df"}, {"role": "assistant", "content": said.strip()}]
    assert len(tokenizer(said)["input_ids"]) < 200
    "".join(session.reply("ls", max_new_tokens=2))
    assert len(session.messages) == 4


def test_an_interrupt_ends_the_answer_and_not_the_conversation(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = ChatSession(model, tokenizer)
    lines = iter(["first", "second"])

    def read(prompt: str) -> str:
        if not (line := next(lines, None)):
            raise EOFError
        return line

    def generate(*_: Any) -> Iterator[str]:
        yield "half an "
        if len(session.messages) == 1:
            raise KeyboardInterrupt
        yield "answer"

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(session, "_generate", generate)
    talk(session, once=None, max_new_tokens=4, temperature=0.0, seed=0)
    said = [message["content"] for message in session.messages if message["role"] == "assistant"]
    assert said == ["half an", "half an answer"] and "half an answer" in capsys.readouterr().out


@pytest.mark.parametrize("temperature", [0.0, 1e-4])
def test_a_penalty_of_the_generation_config_does_not_change_a_reply(
    temperature: float, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = "".join(ChatSession(model, tokenizer).reply("df", max_new_tokens=12, temperature=temperature))
    config = deepcopy(model.generation_config)
    config.update(repetition_penalty=3.0, no_repeat_ngram_size=1, top_k=5)
    monkeypatch.setattr(model, "generation_config", config)
    assert "".join(ChatSession(model, tokenizer).reply("df", max_new_tokens=12, temperature=temperature)) == before


def test_a_refused_message_ends_nothing_and_a_path_is_a_message(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = ChatSession(model, tokenizer)
    lines = iter(["first", "the mark \ufdd0", "/adapter nosuch", "/etc/hosts is what?", "/base now", "/exit", "never"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(session, "_generate", lambda *_: iter(["said"]))
    talk(session, once=None, max_new_tokens=4, temperature=0.0, seed=0)
    asked = [message["content"] for message in session.messages if message["role"] == "user"]
    assert asked == ["first", "/etc/hosts is what?"] and len(session.messages) == 4
    told = capsys.readouterr().err
    assert "U+FDD0" in told and "no adapter 'nosuch'" in told and "/base stands alone" in told
    assert next(lines) == "never"


@pytest.mark.parametrize("name", ["qwen2.5-sql", "train", "default", "forward"])
def test_any_folder_name_names_an_adapter(name: str, tiny_llama_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    first, second = (with_adapter(tiny_base(tiny_llama_dir), seed=seed) for seed in (0, 1))
    (tmp_path / name).mkdir()
    save_adapter(second, tmp_path / name)
    session = ChatSession(first, tokenizer, name="first")
    session.add_adapter(name, tmp_path / name)
    assert list(session.adapters) == ["first", name]
    ids = torch.tensor([tokenizer("df")["input_ids"]])
    for active, alone in ((name, second), ("first", first)):
        session.switch(active)
        with torch.no_grad():
            assert torch.equal(session.model(input_ids=ids).logits, alone.eval()(input_ids=ids).logits), active
    with pytest.raises(ModelError, match="cannot be named"):
        session.add_adapter("base", tmp_path / name)


def test_all_runs_are_looked_at_before_the_base_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.resolved.yaml").touch()

    def open_run(folder: Path) -> Any:
        if folder.name == "nosuch":
            raise ModelError("nosuch is not a run folder", fix="name one")
        return SimpleNamespace(run_dir=RunDir(folder), base_print=None)

    monkeypatch.setattr(api, "open_run", open_run)
    monkeypatch.setattr(api, "load_trained", lambda run: pytest.fail("the base was loaded"))
    with pytest.raises(ModelError, match="nosuch is not"):
        api.open_chat(tmp_path, adapters=[tmp_path / "nosuch"])


def test_an_option_that_names_no_file_is_told_by_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "r.yaml").write_text("model: {path: org/base}\ndata: {train: [rows.jsonl]}\nrun: {dir: out}\n")
    with pytest.raises(RecipeError, match=r"--rows: there is no file .*row\.jsonl\. Fix: nearest in .*: rows\.jsonl"):
        api.evaluate(tmp_path, rows=tmp_path / "row.jsonl")
    for model in ("w/nosuch.json", "nosuch.gguf", "a/b/c"):
        with pytest.raises(RecipeError, match=f"--model: there is no file {model}"):
            api.plan(tmp_path / "r.yaml", model=model)


def test_a_check_tells_all_that_is_wrong_with_model_and_data(tmp_path: Path, tiny_llama_dir: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n')
    (tmp_path / "worse.jsonl").write_text('{"text": null}\n')
    (tmp_path / "r.yaml").write_text(
        f"model: {{path: {tiny_llama_dir}}}\ndata: {{train: [bad.jsonl], eval: [worse.jsonl], seq_len: 64}}\n"
        "run: {dir: out}\n"
        "adapter: {target_modules: [q_projj]}\nquant: {skip_modules: [zebra]}\n"
    )
    with pytest.raises(ModelError) as caught:
        api.check(tmp_path / "r.yaml")
    told = [
        next(word for word in ("q_projj", "zebra", "bad.jsonl", "worse.jsonl") if word in str(problem))
        for problem in caught.value.problems
    ]
    assert told == ["q_projj", "zebra", "bad.jsonl", "worse.jsonl"]
