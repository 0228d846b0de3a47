"""Ollama's Modelfile: the chat template in Go's language, derived from the model's own and checked by Go itself.

The model's template is asked to render conversations of marks; what it writes between the marks is the template:

    system | no system   H1 S M0  |  H0          before the first question
    question             U, then M1 before an answer, T at the end
    answer               A, then M2 before the next question

That holds for every template that writes turns one after the other, as ChatML, Llama 3, Gemma, Mistral and Phi do, and
is refused for any other. What Go renders is compared with the golden prompts, text for text.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_train.data.parity import Golden
from qlora_train.data.problems import RowFault
from qlora_train.data.template import Renderer
from qlora_train.errors import ModelError

MODELFILE = "Modelfile"
_PROGRAM = Path(__file__).with_name("render.go")
_GO_S = 120
_BEFORE_QUESTION = "\n\n"  # after what the system says, where a template has no place for it
_DEFAULT_CONTEXT = 4096  # the least that Ollama gives a model that asks for nothing
_MARKS = {"system": "qSYSTEMq", "user": "qUSER{}q", "assistant": "qANSWER{}q"}
_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")


@dataclass(frozen=True)
class Checked:
    """What became of the template: how many prompts Go rendered as training did."""

    num_prompts: int  # golden prompts that are conversations waiting for an answer, without tools
    num_equal: int
    differing: tuple[str, ...]  # what those that differ have in common, or their first words
    program: bool  # whether Go was there

    @property
    def words(self) -> str:
        """For the Modelfile and the terminal."""
        if not self.program:
            return "unverified: no `go` on PATH to render the template with"
        if not self.num_prompts:
            return "unverified: no golden prompt is a conversation that waits for an answer"
        if self.num_equal == self.num_prompts:
            return f"verified: Go renders all {self.num_prompts} golden prompts as training did"
        some = "; ".join(self.differing)
        return f"Go renders {self.num_equal} of {self.num_prompts} golden prompts as training did; otherwise: {some}"


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around what is said."""

    before_system: str
    after_system: str
    before_question: str  # where nothing was said by the system
    after_question: str  # and before an answer that is known
    after_answer: str  # and before the next question
    prompt: str  # after the last question: asks for the answer

    def go_template(self) -> str:
        """In Go's text/template with Ollama's variables."""
        return (
            f"{{{{- if .System }}}}{_go(self.before_system)}{{{{ .System }}}}{_go(self.after_system)}"
            f"{{{{- else }}}}{_go(self.before_question)}{{{{- end }}}}\n"
            "{{- range $i, $_ := .Messages }}\n"
            "{{- $last := eq (len (slice $.Messages $i)) 1 }}\n"
            '{{- if eq .Role "user" }}{{ .Content }}'
            f"{{{{- if $last }}}}{_go(self.prompt)}{{{{- else }}}}{_go(self.after_question)}{{{{- end }}}}\n"
            '{{- else if eq .Role "assistant" }}{{ .Content }}'
            f"{{{{- if not $last }}}}{_go(self.after_answer)}{{{{- end }}}}\n"
            "{{- end }}\n"
            "{{- end }}"
        )


def read_turns(tokenizer: Any) -> Turns:
    """What the tokenizer's chat template writes between turns. ModelError where that depends on more than the turn."""
    with Renderer(tokenizer, "all") as renderer:
        one = _parts(renderer, "user")
        three = _parts(renderer, "user", "assistant", "user")
        five = _parts(renderer, "user", "assistant", "user", "assistant", "user")
        system = _parts(renderer, "system", "user")
    if one is None or three is None or five is None:
        raise _inseparable("it does not render a conversation of three questions")
    turns = Turns(
        *((system[0], system[1]) if system else (one[0], _BEFORE_QUESTION)),
        before_question=one[0],
        after_question=three[1],
        after_answer=three[2],
        prompt=one[1],
    )
    expected = [
        one[0],
        turns.after_question,
        turns.after_answer,
        turns.after_question,
        turns.after_answer,
        turns.prompt,
    ]
    if three[0] != one[0] or three[3] != turns.prompt or five != expected or (system and system[2] != turns.prompt):
        raise _inseparable("it writes a turn otherwise where another follows")
    return turns


def _inseparable(why: str) -> ModelError:
    return ModelError(
        f"the chat template cannot be written in Ollama's language: {why}",
        fix="write the Modelfile's TEMPLATE by hand, or serve with llama-server, which reads the template itself",
    )


def _parts(renderer: Renderer, *roles: str) -> list[str] | None:
    """What stands before, between and after the marks of a conversation; None where it is refused or rearranged."""
    messages, marks = [], []
    for number, role in enumerate(roles):
        marks.append(_MARKS[role].format(number))
        messages.append({"role": role, "content": marks[-1]})
    try:
        rest = renderer.prompt(tuple(messages), ()).text
    except RowFault:
        return None
    parts = []
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found or mark in rest:
            return None
        parts.append(before)
    return [*parts, rest]


def _go(text: str) -> str:
    """A text as Go writes it out, to the character; nothing for none."""
    if not text:
        return ""
    return '{{ "' + text.translate(_ESCAPES) + '" }}'


_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"})


def without_bos(turns: Turns, bos: str | None, adds_bos: bool) -> Turns:
    """The turns without the token that the server puts in front of every prompt by itself."""
    if not bos or not adds_bos:
        return turns
    fields = dict(turns.__dict__)
    for name in ("before_system", "before_question"):
        fields[name] = fields[name].removeprefix(bos)
    return Turns(**fields)


def check_template(template: str, golden: Sequence[Golden], front: str) -> Checked:
    """Render the golden prompts with Go. `front`: what the server puts in front of every prompt."""
    asked = [g for g in golden if g.get("generation_prompt") and not g.get("tools") and _plain_chat(g["messages"])]
    if shutil.which("go") is None:
        return Checked(len(asked), 0, (), program=False)
    texts = render_with_go(template, [g["messages"] for g in asked])
    wrong = [g for g, text in zip(asked, texts, strict=True) if front + text != g["text"]]
    stripped = [g for g in wrong if any(m["content"] != m["content"].strip() for m in g["messages"])]
    words = [f"{len(stripped)} with white space around a message"] if stripped else []
    words += [repr(g["messages"][-1]["content"][:40]) for g in wrong if g not in stripped]
    return Checked(len(asked), len(asked) - len(wrong), tuple(words[:5]), program=True)


def _plain_chat(messages: Sequence[dict[str, Any]]) -> bool:
    return all(isinstance(message.get("content"), str) and len(message) == 2 for message in messages)


def render_with_go(template: str, conversations: Sequence[Sequence[dict[str, str]]]) -> list[str]:
    """The conversations as Ollama would render them. ModelError when Go refuses the template or is too slow."""
    asked = json.dumps({"template": template, "conversations": list(conversations)})
    with tempfile.TemporaryDirectory() as folder:
        program = shutil.copy(_PROGRAM, folder)
        command = ["go", "run", program]
        try:
            done = subprocess.run(
                command, input=asked, capture_output=True, text=True, timeout=_GO_S, check=False, cwd=folder
            )
        except subprocess.TimeoutExpired as error:
            raise ModelError(f"Go does not render the template within {_GO_S} s", fix="export again") from error
    if done.returncode:
        raise ModelError(f"Go does not render the template: {done.stderr.strip()[:500]}", fix="report this")
    found: list[str] = json.loads(done.stdout)
    return found


def modelfile(
    model: str, template: str | None, stops: Sequence[str], generation: dict[str, Any], context: int, remark: str
) -> str:
    """Content of a Modelfile for a GGUF file beside it."""
    lines = [f"# Template {remark}.", f"FROM ./{model}"]
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f'PARAMETER stop "{stop.translate(_ESCAPES)}"' for stop in stops]
    for name in _SAMPLING if generation.get("do_sample") else ():
        if (value := generation.get(name)) is not None:
            lines.append(f"PARAMETER {'repeat_penalty' if name == 'repetition_penalty' else name} {value}")
    if context < _DEFAULT_CONTEXT:
        lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n"
