"""Public chat templates, written from their published descriptions, with the supervised texts written by hand."""

# ruff: noqa: RUF001  (DeepSeek's tokens have wide bars)
from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_train.data.encode import Encoder
from qlora_train.data.parity import frozen_clock
from qlora_train.data.problems import RowFault, TemplateFault
from qlora_train.data.rows import Message, MessagesRow, Tool
from qlora_train.data.table import TokenRow
from qlora_train.data.template import Renderer

pytestmark = pytest.mark.usefixtures("shared_workers")

FOLDER = Path(__file__).with_name("templates")
LOSS_ON = ("completion", "assistant", "all")

WEATHER: Tool = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
WEATHER_JSON = (
    '{"type": "function", "function": {"name": "get_weather", "description": "The weather of a city.", '
    '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}'
)


def said(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def called(name: str, **arguments: str) -> Message:
    function = {"name": name, "arguments": arguments}
    return said("assistant", "", tool_calls=[{"type": "function", "id": "abcdefghi", "function": function}])


GREETING = (said("user", "Hi"), said("assistant", "Hello."), said("user", "Bye"), said("assistant", "See you."))
BRIEF = (said("system", "Be brief."), *GREETING)
ROME = (
    said("user", "Weather in Rome?"),
    called("get_weather", city="Rome"),
    said("tool", "18", tool_call_id="abcdefghi"),
    said("assistant", "It is 18 degrees."),
)
SUMS = (
    said("user", "2+2?"),
    said("assistant", "4", reasoning_content="Two and two."),
    said("user", "3+3?"),
    said("assistant", "6"),
    said("user", "5+5?"),
    said("assistant", "10", reasoning_content="Five and five."),
)


@dataclass(frozen=True)
class Case:
    """A template, its tokens, a conversation, and what is trained for each choice of `data.loss_on`."""

    name: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    messages: tuple[Message, ...]
    assistant: list[str]  # with `completion`, the last of these
    all: str
    tools: tuple[Tool, ...] = ()
    added: tuple[str, ...] = ()  # tokens that are not special
    num_context_turns: int = 0

    @property
    def row(self) -> MessagesRow:
        return MessagesRow("train.jsonl:1", self.messages, self.tools)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token a byte, and the special ones."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(alphabet)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(list(self.special))
        backend.add_tokens(list(self.added))
        named = {"eos_token": self.eos} | ({"bos_token": self.bos} if self.bos else {})
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
        tokenizer.chat_template = (FOLDER / f"{self.name}.jinja").read_text(encoding="utf-8")
        tokenizer.name_or_path = self.name
        return tokenizer


IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
CALLS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
R1 = ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
COHERE = ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>")
MISTRAL = ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")

CHATML_BRIEF = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nSee you.<|im_end|>\n"
)
QWEN_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
MISTRAL_CALL = '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Rome"}, "id": "abcdefghi"}]</s>'

CASES = [
    Case(
        name="chatml",
        special=IM,
        bos=None,
        eos="<|im_end|>",
        messages=BRIEF,
        assistant=["Hello.<|im_end|>", "See you.<|im_end|>"],
        all=CHATML_BRIEF,
    ),
    Case(
        name="chatml_generation",
        special=IM,
        bos=None,
        eos="<|im_end|>",
        messages=BRIEF,
        assistant=["Hello.<|im_end|>", "See you.<|im_end|>"],
        all=CHATML_BRIEF,
    ),
    Case(
        name="llama2",
        special=("<s>", "</s>"),
        bos="<s>",
        eos="</s>",
        messages=BRIEF,
        assistant=[" Hello. </s>", " See you. </s>"],
        all=(
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello. </s>"  # the space is the answer's
            "<s>[INST] Bye [/INST] See you. </s>"
        ),
    ),
    Case(
        name="llama31",
        special=HEADERS,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        messages=BRIEF,
        assistant=["Hello.<|eot_id|>", "See you.<|eot_id|>"],
        all=(
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
            "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nSee you.<|eot_id|>"
        ),
    ),
    Case(
        name="llama31",
        special=HEADERS,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        messages=ROME,
        tools=(WEATHER,),
        assistant=['{"name": "get_weather", "parameters": {"city": "Rome"}}<|eot_id|>', "It is 18 degrees.<|eot_id|>"],
        all=(
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
            "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n"
            "Given the following functions, please respond with a JSON for a function call.\n\n"
            + json.dumps(WEATHER, indent=4)
            + "\n\nWeather in Rome?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
            '{"name": "get_weather", "parameters": {"city": "Rome"}}<|eot_id|>'
            "<|start_header_id|>ipython<|end_header_id|>\n\n18<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nIt is 18 degrees.<|eot_id|>"
        ),
    ),
    Case(
        name="mistral",
        special=MISTRAL,
        bos="<s>",
        eos="</s>",
        messages=GREETING,
        assistant=[" Hello.</s>", " See you.</s>"],
        all="<s>[INST] Hi[/INST] Hello.</s>[INST] Bye[/INST] See you.</s>",
    ),
    Case(
        name="mistral",
        special=MISTRAL,
        bos="<s>",
        eos="</s>",
        messages=ROME,
        tools=(WEATHER,),
        assistant=[MISTRAL_CALL, " It is 18 degrees.</s>"],
        all=(
            f"<s>[AVAILABLE_TOOLS] [{WEATHER_JSON}][/AVAILABLE_TOOLS][INST] Weather in Rome?[/INST]{MISTRAL_CALL}"
            '[TOOL_RESULTS] {"content": 18, "call_id": "abcdefghi"}[/TOOL_RESULTS] It is 18 degrees.</s>'
        ),
    ),
    Case(
        name="gemma",
        special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        messages=GREETING,
        assistant=["Hello.<end_of_turn>", "See you.<end_of_turn>"],
        all=(
            "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
            "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nSee you.<end_of_turn>\n"
        ),
    ),
    Case(
        name="phi3",
        special=("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        bos="<s>",
        eos="<|endoftext|>",
        messages=BRIEF,
        assistant=["Hello.<|end|>", "See you.<|end|>"],
        all=(
            "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello.<|end|>\n"
            "<|user|>\nBye<|end|>\n<|assistant|>\nSee you.<|end|>\n<|endoftext|>"
        ),
    ),
    Case(
        name="qwen25",
        special=IM,
        added=CALLS,
        bos=None,
        eos="<|im_end|>",
        messages=ROME,
        tools=(WEATHER,),
        assistant=[QWEN_CALL, "It is 18 degrees.<|im_end|>"],
        all=(
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n# Tools\n\n"
            "You may call one or more functions to assist with the user query.\n\nYou are provided with function "
            f"signatures within <tools></tools> XML tags:\n<tools>\n{WEATHER_JSON}\n</tools>\n\nFor each function "
            "call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
            '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
            "<|im_start|>user\nWeather in Rome?<|im_end|>\n"
            f"<|im_start|>assistant\n{QWEN_CALL}\n"
            "<|im_start|>user\n<tool_response>\n18\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\nIt is 18 degrees.<|im_end|>\n"
        ),
    ),
    Case(
        name="qwen3",
        special=IM,
        added=CALLS,
        bos=None,
        eos="<|im_end|>",
        messages=SUMS,
        assistant=["6<|im_end|>", "<think>\nFive and five.\n</think>\n\n10<|im_end|>"],
        all=(
            "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
            "<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n6<|im_end|>\n"
            "<|im_start|>user\n5+5?<|im_end|>\n"
            "<|im_start|>assistant\n<think>\nFive and five.\n</think>\n\n10<|im_end|>\n"
        ),
        num_context_turns=1,
    ),
    Case(
        name="qwen3",
        special=IM,
        added=CALLS,
        bos=None,
        eos="<|im_end|>",
        messages=(*ROME, said("user", "Thanks."), said("assistant", "<think>Polite.</think>Any time.")),
        tools=(WEATHER,),
        assistant=[
            QWEN_CALL,
            "It is 18 degrees.<|im_end|>",
            "<think>\nPolite.\n</think>\n\nAny time.<|im_end|>",
        ],
        all=(
            f"<|im_start|>system\n# Tools\n\n<tools>\n{WEATHER_JSON}\n</tools><|im_end|>\n"
            f"<|im_start|>user\nWeather in Rome?<|im_end|>\n<|im_start|>assistant\n{QWEN_CALL}\n"
            "<|im_start|>user\n<tool_response>\n18\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\nIt is 18 degrees.<|im_end|>\n<|im_start|>user\nThanks.<|im_end|>\n"
            "<|im_start|>assistant\n<think>\nPolite.\n</think>\n\nAny time.<|im_end|>\n"
        ),
    ),
    Case(
        name="deepseek_r1",
        special=R1,
        added=("<think>", "</think>"),
        bos=R1[0],
        eos=R1[3],
        messages=(
            *BRIEF[:2],
            said("assistant", "<think>\nGreet.\n</think>\n\nHello."),
            *BRIEF[3:],
        ),
        assistant=["See you.<｜end▁of▁sentence｜>"],
        all=(
            "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>\n\nHello.<｜end▁of▁sentence｜>"
            "<｜User｜>Bye<｜Assistant｜>See you.<｜end▁of▁sentence｜>"
        ),
        num_context_turns=1,
    ),
    Case(
        name="zephyr",
        special=("<s>", "</s>"),
        bos="<s>",
        eos="</s>",
        messages=BRIEF,
        assistant=["Hello.</s>", "See you.</s>"],
        all=(
            "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello.</s>\n"
            "<|user|>\nBye</s>\n<|assistant|>\nSee you.</s>\n"
        ),
    ),
    Case(
        name="command_r",
        special=(*COHERE, "<|CHATBOT_TOKEN|>"),
        bos=COHERE[0],
        eos="<|END_OF_TURN_TOKEN|>",
        messages=BRIEF,
        assistant=["Hello.<|END_OF_TURN_TOKEN|>", "See you.<|END_OF_TURN_TOKEN|>"],
        all=(
            "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Hello.<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Bye<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>See you.<|END_OF_TURN_TOKEN|>"
        ),
    ),
]
Open = Callable[[str, str], tuple[Any, Renderer]]
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name + ("-tools" if case.tools else ""))


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.fixture(scope="module")
def opened() -> Iterator[Open]:
    """The tokenizer of a template and its renderer, each started once."""
    with ExitStack() as stack:

        @cache
        def _open(name: str, loss_on: str) -> tuple[Any, Renderer]:
            tokenizer = case_named(name).tokenizer()
            return tokenizer, stack.enter_context(Renderer(tokenizer, loss_on))

        yield _open


def test_every_template_has_a_case() -> None:
    names = {path.stem for path in FOLDER.glob("*.jinja")}
    assert names == {case.name for case in CASES} and len(names) >= 10


@by_name
@pytest.mark.parametrize("loss_on", LOSS_ON)
def test_supervised_texts(case: Case, loss_on: str, opened: Open) -> None:
    expected = {"completion": case.assistant[-1:], "assistant": case.assistant, "all": [case.all]}[loss_on]
    tokenizer, renderer = opened(case.name, loss_on)
    rendered = renderer.render_one(case.row)
    assert rendered.text == case.all
    assert [rendered.text[span.start : span.stop] for span in rendered.spans] == expected
    assert rendered.num_context_turns == (case.num_context_turns if loss_on == "assistant" else 0)
    (row,) = Encoder(tokenizer).encode([rendered])
    assert isinstance(row, TokenRow)
    texts = [tokenizer.decode(row.ids[start:stop]) for start, stop in zip(row.span_starts, row.span_stops, strict=True)]
    if loss_on == "all":  # whose first token is never trained
        expected = [case.all[len(tokenizer.decode(row.ids[:1])) :]]
    assert texts == expected


@by_name
def test_text_and_ids_are_those_of_transformers(case: Case, opened: Open) -> None:
    tokenizer, renderer = opened(case.name, "all")
    whole, prompt = renderer.render_one(case.row), renderer.prompt(case.messages[:-1], case.tools)
    for rendered, messages in ((whole, case.messages), (prompt, case.messages[:-1])):
        inputs = {"conversation": list(messages), "tools": list(case.tools) or None}
        with frozen_clock():
            text = tokenizer.apply_chat_template(**inputs, tokenize=False, add_generation_prompt=rendered is prompt)
        assert rendered.text == text
        assert Encoder(tokenizer).ids(rendered) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_marks_are_those_of_transformers() -> None:
    case = next(case for case in CASES if case.name == "chatml_generation")
    _, (marks,) = render_jinja_template(
        [list(case.messages)], chat_template=case.tokenizer().chat_template, return_assistant_tokens_mask=True
    )
    assert [case.all[start:stop] for start, stop in marks] == case.assistant


@pytest.mark.parametrize(
    ("name", "messages", "says"),
    [
        ("gemma", BRIEF, "System role not supported"),
        ("llama2", GREETING[1:], "roles must alternate"),
        ("mistral", (*GREETING[:2], *GREETING[1:]), "roles must alternate"),
    ],
)
def test_what_templates_refuse(name: str, messages: tuple[Message, ...], says: str, opened: Open) -> None:
    with pytest.raises(TemplateFault, match=says):
        opened(name, "assistant")[1].render_one(MessagesRow("a:1", messages))


def test_mistral_shows_the_system_prompt_only_where_the_question_is_last(opened: Open) -> None:
    """Trained on such a rendering, the model would never have seen what it is asked with."""
    with pytest.raises(RowFault, match="does not begin with its own generation prompt"):
        opened("mistral", "completion")[1].render_one(MessagesRow("a:1", BRIEF))


@pytest.mark.parametrize(
    "answer",
    [said("assistant", "<think>Greet.</think>Hello."), said("assistant", "Hello.", reasoning_content="Greet.")],
)
def test_last_answer_whose_reasoning_is_dropped_is_refused(answer: Message, opened: Open) -> None:
    with pytest.raises(RowFault, match=r"does not show the reasoning of messages\[1\]"):
        opened("deepseek_r1", "completion")[1].render_one(MessagesRow("a:1", (GREETING[0], answer)))


def test_steps_with_tools_lose_their_reasoning_when_the_user_goes_on(opened: Open) -> None:
    call = {**called("get_weather", city="Rome"), "reasoning_content": "Look it up."}
    steps = (ROME[0], call, ROME[2], said("assistant", "It is 18 degrees.", reasoning_content="Read it."))
    _, renderer = opened("qwen3", "assistant")
    alone = renderer.render_one(MessagesRow("a:1", steps))
    followed = renderer.render_one(MessagesRow("a:1", (*steps, GREETING[0], GREETING[1])))
    assert [alone.text[span.start : span.stop] for span in alone.spans] == [
        f"<think>\nLook it up.\n</think>\n\n{QWEN_CALL}",
        "<think>\nRead it.\n</think>\n\nIt is 18 degrees.<|im_end|>",
    ]
    assert [followed.text[span.start : span.stop] for span in followed.spans] == [
        "<think>\n\n</think>\n\nHello.<|im_end|>"
    ]
    assert (alone.num_context_turns, followed.num_context_turns) == (0, 2)


LITERALS = ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|im_end", "assistant", "user\n", " ")
contents = st.lists(
    st.one_of(st.sampled_from(LITERALS), st.text(st.characters(exclude_categories=["Cs"]), max_size=8)), max_size=5
).map("".join)
answers = contents.filter(str.strip)


@pytest.mark.parametrize("name", ["chatml", "chatml_generation", "llama31"])
@settings(max_examples=40, deadline=None, print_blob=False)
@given(asked=st.tuples(contents, contents), answered=st.tuples(answers, answers))
def test_whatever_is_said(name: str, asked: tuple[str, str], answered: tuple[str, str], opened: Open) -> None:
    case, (tokenizer, renderer) = case_named(name), opened(name, "assistant")
    special = re.compile("|".join(map(re.escape, case.special)))
    turns = list(zip(asked, answered, strict=True))
    messages = [entry for question, answer in turns for entry in (said("user", question), said("assistant", answer))]
    try:
        rendered = renderer.render_one(MessagesRow("a:1", tuple(messages)))
    except RowFault:
        nothing_but_a_token = any(special.fullmatch(answer.strip()) for answer in answered)
        assert nothing_but_a_token or any(mark in text for mark in "\ufdd0\ufdd1" for text in asked + answered)
        return
    (row,) = Encoder(tokenizer).encode([rendered])
    assert isinstance(row, TokenRow)
    trained = [
        tokenizer.decode(row.ids[start:stop]) for start, stop in zip(row.span_starts, row.span_stops, strict=True)
    ]
    words = [answer.strip() if name == "llama31" else answer for answer in answered]
    assert trained == [answer + case.eos for answer in words]

    # Control tokens are those that the template writes around empty messages; whatever is said is text.
    empty = [said(message["role"], "") for message in messages]
    by_template = special.findall(tokenizer.apply_chat_template(empty, tokenize=False))
    ids = {tokenizer.convert_tokens_to_ids(token): token for token in case.special}
    assert sorted(ids[token] for token in row.ids.tolist() if token in ids) == sorted(by_template)
    assert rendered.num_control_specials == 0
    assert rendered.num_plain_specials == sum(len(special.findall(text)) for text in (*asked, *words))
    with frozen_clock():
        oracle = tokenizer.apply_chat_template(messages, sanitize_control_tokens=True)
    assert row.ids.tolist() == oracle["input_ids"]
