"""Generated answers against reference answers: exact match, first word, character similarity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch

from qlora_train.model.load import with_end_tokens

# What a generation_config may ask for beside the model's own probabilities, as Qwen2.5-Instruct's does with a
# repetition_penalty: switched off, since `generate` takes from there what it is not told (transformers 5.23).
_RESHAPING = (
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
    "min_length",
    "min_new_tokens",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "guidance_scale",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "watermarking_config",
)
_UNSHAPED: dict[str, Any] = {
    **dict.fromkeys(_RESHAPING),
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
}
GREEDY: dict[str, Any] = {**_UNSHAPED, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def sampled(temperature: float) -> dict[str, Any]:
    """Arguments of `generate` that draw from softmax(logits / temperature), whole: no top_p, no top_k, no penalty."""
    return {**_UNSHAPED, "do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}


@dataclass(frozen=True)
class Question:
    """What the model is asked and what the data set answers."""

    where: str
    asked: str  # in the words of the row
    prompt_ids: tuple[int, ...]  # as the model is given it
    reference: str


@dataclass(frozen=True)
class Answer:
    """One generated answer with its scores in [0, 1]."""

    question: Question
    text: str
    exact_match: float
    first_word: float
    char_similarity: float


@dataclass(frozen=True)
class TaskScores:
    """Means over all answers."""

    num_answers: int
    exact_match: float
    first_word: float
    char_similarity: float


def score(question: Question, text: str) -> Answer:
    """Compare one answer with its reference, both without surrounding white space.

    char_similarity is difflib's ratio: twice the matching characters over the characters of both.

    >>> score(Question("f:1", "?", (), "git status"), " git stash\\n").first_word
    1.0
    """
    got, want = text.strip(), question.reference.strip()
    got_first, want_first = got.split()[:1], want.split()[:1]
    return Answer(
        question,
        text=got,
        exact_match=float(got == want),
        first_word=float(got_first == want_first),
        char_similarity=SequenceMatcher(None, got, want, autojunk=False).ratio(),
    )


def mean_scores(answers: Sequence[Answer]) -> TaskScores:
    """The mean of each score."""
    count = max(len(answers), 1)
    return TaskScores(
        num_answers=len(answers),
        exact_match=sum(a.exact_match for a in answers) / count,
        first_word=sum(a.first_word for a in answers) / count,
        char_similarity=sum(a.char_similarity for a in answers) / count,
    )


@torch.inference_mode()
def answer(
    model: Any, tokenizer: Any, questions: Sequence[Question], *, max_new_tokens: int, batch_size: int
) -> list[Answer]:
    """Greedy answers in batches with a KV cache, in the order of the questions; the model's mode is restored.

    Questions of like length meet in a batch. Prompts are padded on the left, with a mask.
    """
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt_ids))
    texts: dict[int, str] = {}
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            prompts = [questions[i].prompt_ids for i in chosen]
            texts |= dict(zip(chosen, generate_texts(model, tokenizer, prompts, max_new_tokens), strict=True))
    finally:
        model.train(was_training)
    return [score(question, texts[i]) for i, question in enumerate(questions)]


def generate_texts(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    """The most likely token each time, whatever the model's generation_config asks for, up to an end token."""
    inputs = padded_left(prompts, tokenizer.pad_token_id, model.device)
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        **GREEDY,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_token_ids(model, tokenizer),
    )
    new_tokens = output[:, inputs["input_ids"].shape[1] :]
    return [str(text) for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


def padded_left(prompts: Sequence[Sequence[int]], pad_token_id: int, device: Any) -> dict[str, torch.Tensor]:
    """Prompts as `input_ids` and `attention_mask`, each ending where its answer is to begin."""
    length = max(map(len, prompts))
    ids = [[pad_token_id] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's and those of the generation config."""
    return with_end_tokens(model.generation_config.eos_token_id, [tokenizer.eos_token_id])
