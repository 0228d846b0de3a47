"""Scores of an answer, and answers that do not depend on how questions meet in a batch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_train.evaluate.tasks import (
    Question,
    answer,
    end_token_ids,
    generate_texts,
    mean_scores,
    padded_left,
    sampled,
    score,
)
from qlora_train.model.skeleton import load_tokenizer
from qlora_train.model.source import Source
from tests.loading import tiny_base


def question(prompt: str, reference: str = "", tokenizer: Any = None) -> Question:
    ids = tuple(tokenizer(prompt)["input_ids"]) if tokenizer else ()
    return Question(where="f:1", asked=prompt, prompt_ids=ids, reference=reference)


@pytest.mark.parametrize(
    ("text", "reference", "exact", "first", "similarity"),
    [
        ("ls -l", "ls -l", 1, 1, 1.0),
        ("  ls -l\n", "ls -l ", 1, 1, 1.0),
        ("ls  -l", "ls -l", 0, 1, 10 / 11),
        ("LS -l", "ls -l", 0, 0, 6 / 10),
        ("ls", "ls -l", 0, 1, 4 / 7),
        ("du -h", "ls -l", 0, 0, 4 / 10),
        ("", "ls", 0, 0, 0.0),
        ("", "", 1, 1, 1.0),
        (" \n", "", 1, 1, 1.0),
        ("é", "é", 1, 1, 1.0),
    ],
)
def test_scores_of_one_answer(text: str, reference: str, exact: float, first: float, similarity: float) -> None:
    found = score(question("?", reference), text)
    assert (found.exact_match, found.first_word) == (exact, first)
    assert found.char_similarity == pytest.approx(similarity) and found.text == text.strip()


def test_similarity_does_not_ignore_frequent_characters() -> None:
    """difflib's automatic junk rule starts at 200 characters."""
    assert score(question("?", "a" * 300), "a" * 299 + "b").char_similarity == pytest.approx(299 / 300)


def test_mean_scores() -> None:
    answers = [score(question("?", "ls -l"), text) for text in ("ls -l", "ls", "", "du")]
    means = mean_scores(answers)
    assert (means.num_answers, means.exact_match, means.first_word) == (4, 0.25, 0.5)
    assert means.char_similarity == pytest.approx(sum(a.char_similarity for a in answers) / 4)
    assert mean_scores([]).num_answers == 0 and mean_scores([]).exact_match == 0


@pytest.mark.parametrize(
    ("configured", "expected"), [(None, [2]), (2, [2]), (7, [2, 7]), ([7, 0], [0, 2, 7]), ([], [2])]
)
def test_end_token_ids(configured: object, expected: list[int]) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=configured))
    assert end_token_ids(model, SimpleNamespace(eos_token_id=2)) == expected


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir: Path) -> Any:
    return load_tokenizer(Source("tiny", tiny_llama_dir))


PROMPTS = (
    "List the files of the current directory, newest first, with their sizes.",
    "df",
    "Which command shows how much space is left on the disk?",
    "user",
    "The quick brown fox jumps over the lazy dog while 0123456789 numbers are counted.",
    "Copy the folder",
)


@pytest.mark.parametrize("training", [False, True])
def test_answers_keep_their_order_whatever_the_batch_size(training: bool, tokenizer: Any, tiny_llama_dir: Path) -> None:
    model = tiny_base(tiny_llama_dir).model.train(training)
    questions = [question(prompt, tokenizer=tokenizer) for prompt in PROMPTS]
    runs = [answer(model, tokenizer, questions, max_new_tokens=6, batch_size=size) for size in (1, 4, 100)]
    for found in runs:
        assert [a.question for a in found] == questions
        assert [a.text for a in found] == [a.text for a in runs[0]]
    texts = [a.text for a in runs[0]]
    assert len(set(texts)) > 3 and any(texts), "negative control: the prompts have different answers"
    swapped = answer(model, tokenizer, questions[::-1], max_new_tokens=6, batch_size=2)
    assert [a.text for a in swapped] == texts[::-1]
    assert model.training == training
    assert answer(model, tokenizer, [], max_new_tokens=6, batch_size=4) == []


def test_answers_are_greedy_whatever_the_generation_config_asks(tokenizer: Any, tiny_llama_dir: Path) -> None:
    model = tiny_base(tiny_llama_dir, quant_type="none").model.eval()
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    plain = generate_texts(model, tokenizer, prompts, 8)
    asked = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 1, "min_new_tokens": 8, "suppress_tokens": [5]}
    model.generation_config.update(**asked, do_sample=True, temperature=0.7, top_k=20, top_p=0.8)
    assert generate_texts(model, tokenizer, prompts, 8) == plain
    inputs = padded_left(prompts, tokenizer.pad_token_id, "cpu")
    shaped = model.generate(**inputs, do_sample=False, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    assert tokenizer.batch_decode(shaped, skip_special_tokens=True) != plain, "negative control: the penalty acts"


def test_what_is_sampled_is_drawn_from_the_whole_distribution(tokenizer: Any, tiny_llama_dir: Path) -> None:
    model = tiny_base(tiny_llama_dir, quant_type="none").model.eval()
    model.generation_config.update(top_k=1, top_p=0.01, repetition_penalty=1.5, min_p=0.9)
    inputs = padded_left([tokenizer(PROMPTS[0])["input_ids"]] * 32, tokenizer.pad_token_id, "cpu")
    drawn = model.generate(**inputs, **sampled(1.0), max_new_tokens=1)[:, -1]
    assert len(set(drawn.tolist())) > 1


def test_the_mode_is_restored_after_a_failure(tokenizer: Any, tiny_llama_dir: Path) -> None:
    model = tiny_base(tiny_llama_dir, quant_type="none").model.train()
    with pytest.raises(IndexError):
        answer(model, tokenizer, [Question("f:1", "a", (10**6,), "")], max_new_tokens=1, batch_size=2)
    assert model.training


def test_prompts_are_padded_on_the_left_with_a_mask() -> None:
    inputs = padded_left([(5, 6, 7), (8,)], 2, "cpu")
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [2, 2, 8]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
