"""The program in which chat templates run: a process of its own, with limits, that reads and writes lines of JSON.

It is started by path, isolated from the environment, with the folders of Jinja as arguments, and imports nothing but
the standard library and Jinja, so that it starts in a tenth of a second. What templates see is what
`apply_chat_template` of transformers 5.23 shows them (transformers/utils/chat_template_utils.py,
`_compile_jinja_template` and `render_jinja_template`), but for the clock.

The first line out says that it is ready. The first line in holds the templates and the limits; every further one
holds a batch of rows, each
`[template, messages, tools, [[number of messages, add_generation_prompt], ...]]`, and each row is answered by a line.
Of its renderings the first is written whole; one that is a beginning of the first is written as its length.
"""

from __future__ import annotations

import encodings.ascii
import encodings.latin_1
import encodings.unicode_escape  # noqa: F401  (this and others below are imported where they are needed, too late)
import json
import logging  # noqa: F401
import pprint  # noqa: F401
import resource
import sys
import textwrap  # noqa: F401
import time
from collections.abc import Callable, Mapping
from datetime import date
from typing import Any, ClassVar, NoReturn

sys.path += sys.argv[1:]  # last, so that nothing there stands before the standard library

import jinja2
import jinja2.constants
import jinja2.debug
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

_FLUSH_BYTES, _FLUSH_S = 2**16, 0.25
_MAX_MESSAGE_CHARS = 500
_FRAMES = ("<template>", "<unknown>")  # file names that Jinja gives to the frames of a template
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: what stands between is an answer; its place is noted."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.num_chars = 0  # written before the piece that is being rendered
        self.marks: list[tuple[int, int]] = []

    def parse(self, parser: Any) -> nodes.Node:
        """The tag's body, wrapped in a call."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Callable[[], str]) -> str:
        text = caller()
        self.marks.append((self.num_chars, self.num_chars + len(text)))
        return text


class TemplateDict:
    """`dict` without a way to its class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """`dict.fromkeys`."""
        return dict.fromkeys(*args, **kwargs)


class TemplateNamespace(jinja2.utils.Namespace):
    """`namespace` that takes no names with an underscore in front."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=...)` works, as in Jinja
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template cannot store {name!r} on a namespace: it begins with an underscore")


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Program:
    """The compiled templates and what they are given."""

    def __init__(self, sources: list[str], variables: Mapping[str, str], today: date, max_chars: int) -> None:
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
        )
        self._environment.filters["tojson"] = _tojson
        self._environment.globals.update(
            raise_exception=_raise_exception,
            strftime_now=today.strftime,
            dict=TemplateDict(),
            namespace=TemplateNamespace,
        )
        self._tag: GenerationTag = self._environment.extensions[GenerationTag.identifier]  # type: ignore[assignment]
        self._variables, self._max_chars = variables, max_chars
        self.facts = [self._facts(source) for source in sources]
        self._templates = [self._environment.from_string(source) for source in sources]

    def row(self, template: int, messages: list[dict[str, Any]], tools: Any, cuts: list[tuple[int, bool]]) -> list[Any]:
        """`["ok", the first rendering, its marks, the other renderings]`, or the fault of the first."""
        messages = [_as_templates_read(message) for message in messages]
        whole, marks = "", []
        others: list[Any] = []
        for index, (stop, add_generation_prompt) in enumerate(cuts):
            try:
                text = self._render(template, messages[:stop], tools, add_generation_prompt)
                text.encode()
            except MemoryError:
                raise
            except Exception as error:  # a template is a program: it may raise anything
                fault = ["fault", *_described(error)]
                if index == 0:
                    return fault
                others.append(fault)
                continue
            if len(text) > self._max_chars:
                return ["limit", f"renders {len(text):,} characters; the limit is {self._max_chars:,}"]
            if index == 0:
                whole, marks = text, self._tag.marks
            else:
                others.append(len(text) if whole.startswith(text) else text)
        return ["ok", whole, marks, others]

    def _facts(self, source: str) -> dict[str, Any]:
        """The literal text of a template, its pieces NUL-separated, and whether it marks answers."""
        tree = self._environment.parse(source)
        literals = {node.data for node in tree.find_all(nodes.TemplateData)}
        literals |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        marks = any(node.identifier == GenerationTag.identifier for node in tree.find_all(nodes.ExtensionAttribute))
        return {"literals": "\0".join(sorted(literals)), "marks": marks}

    def _render(self, template: int, messages: list[dict[str, Any]], tools: Any, add_generation_prompt: bool) -> str:
        tag = self._tag
        tag.num_chars, tag.marks = 0, []
        pieces: list[str] = []
        for piece in self._templates[template].generate(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._variables,
        ):
            pieces.append(piece)
            tag.num_chars += len(piece)
            if tag.num_chars > self._max_chars:
                break
        return "".join(pieces)


def _as_templates_read(message: dict[str, Any]) -> dict[str, Any]:
    """A message without null fields, and its reasoning under each of the names that templates know."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[name] for name in _REASONING_FIELDS if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _described(error: Exception) -> tuple[int | None, str]:
    """The line of the template in which an error arose, where that is known, and what it says."""
    line = getattr(error, "lineno", None)  # of a syntax error
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename in _FRAMES:
            line = frame.tb_lineno
        frame = frame.tb_next
    return line, f"{type(error).__name__}: {error}".encode("utf-8", "replace").decode()[:_MAX_MESSAGE_CHARS]


def _limit(kind: int, value: int) -> None:
    """Lower a limit for good, or leave it where it is lower."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _limit_resources(memory_bytes: int) -> None:
    """From here on no file can be opened or written, and no process started, whatever a template finds a way to."""
    _limit(resource.RLIMIT_AS, memory_bytes)
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE):
        _limit(kind, 0)


def _allow_seconds(seconds: float) -> None:
    """End this process if it computes for so long again without a word: its parent may be gone and not stop it."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = int(time.process_time() + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def main() -> None:
    """Answer batches until the parent closes the pipe."""
    read, write = sys.stdin.buffer, sys.stdout.buffer
    write.write(b'["ready"]\n')
    write.flush()
    setup = json.loads(read.readline())
    _limit_resources(setup["memory_bytes"])
    _allow_seconds(setup["seconds"])
    try:
        today = date.fromisoformat(setup["today"])
        program = Program(setup["templates"], setup["variables"], today, setup["max_chars"])
        answer: list[Any] = ["ok", program.facts]
    except MemoryError:
        answer = ["limit", "needs more memory than it may have"]
    except Exception as error:  # of any kind, as above
        answer = ["fault", *_described(error)]
    write.write(json.dumps(answer).encode() + b"\n")
    write.flush()
    encode = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode
    for line in read:
        _allow_seconds(setup["seconds"])
        flushed, num_bytes = time.monotonic(), 0
        for row in json.loads(line.decode("utf-8", "surrogatepass")):
            try:
                reply = encode(program.row(*row)).encode() + b"\n"
            except MemoryError:
                reply = b'["limit", "needs more memory than it may have"]\n'
            num_bytes += write.write(reply)
            if num_bytes > _FLUSH_BYTES or time.monotonic() > flushed + _FLUSH_S:
                write.flush()
                _allow_seconds(setup["seconds"])
                flushed, num_bytes = time.monotonic(), 0
        write.flush()


if __name__ == "__main__":
    main()
