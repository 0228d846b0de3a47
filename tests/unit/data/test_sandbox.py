"""Chat templates render as transformers renders them, within limits, in a process that does not outlive its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_train.data import sandbox
from qlora_train.data.parity import frozen_clock
from qlora_train.data.sandbox import Sandbox
from qlora_train.data.specials import to_json
from qlora_train.errors import MachineError, ModelError, SecurityError

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "<b>Be & brief</b>", "name": None},
    {"role": "user", "content": "Hi 'you' é \U0001f600"},
    {"role": "assistant", "content": "Hello.", "thinking": "Greet."},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": [1.5, None, True, "<>"]}}}]


def request(
    messages: list[dict[str, Any]] = MESSAGES, tools: Any = None, cuts: Any = ((3, False),), template: int = 0
) -> str:
    return to_json([template, messages, tools, cuts])


def worker_pid(box: Sandbox) -> int:
    return box._worker._process.pid


def replies(template: str, *requests: str) -> list[Any]:
    with Sandbox([template], {"bos_token": "<s>"}, "tiny", None) as box:
        return box.collect(box.submit(requests, [f"a:{number + 1}" for number in range(len(requests))]))


TEMPLATES = [
    "{% for m in messages %}\n    {% if m.role == 'user' %}\n  {{ m.content }}\n    {% endif %}\n{% endfor %}\n",
    "{{ tools | tojson }}{{ tools | tojson(indent=2) }}{{ messages[0].content | tojson(ensure_ascii=True) }}",
    "{{ tools | tojson(sort_keys=True, separators=(',', ':')) }}{{ documents }}{{ add_generation_prompt }}",
    "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{% continue %}{% endfor %}{{ bos_token }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ nope }}",
    "{% for m in messages %}{{ m.name is defined }}{{ m.reasoning_content }}{{ m.thinking }}{{ m|length }}{% endfor %}",
    "{{ strftime_now('%d %b %Y') }}{{ dict(a=1) }}{{ dict.fromkeys(['a'], 2) }}{{ cycler('a', 'b').next() }}",
    "{{ messages[1].content | upper | urlencode }}{{ messages | map(attribute='role') | join(',') | title }}",
    "{{ messages[0].content | escape }}{{ messages | pprint }}{{ 'a b c' | wordwrap(1) }}{{ [1, 2] | sum }}",
    "{{ 'https://a.b' | urlize }}{{ 'x' | indent }}{{ '%s' | format(1) }}{{ 3.14159 | round(2) }}{{ 'é' | lower }}",
    "{{ [3, 1]|sort }}{{ {'b': 1, 'a': 2} | dictsort }}{{ messages | groupby('role') }}{{ 'abcdefghijk'|truncate(4) }}",
    "{{ range(3) | list }}{{ messages[0].content.encode('ascii') }}{{ 'a-b'.split('-') }}{{ 'é'.encode('latin-1') }}",
    "{% macro m(x) %}[{{x}}]{% endmacro %}{{ m('a') }}{% filter upper %}b{% endfilter %}{% set c %}d{% endset %}{{c}}",
    "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}!",
]


FORBIDDEN = [
    "{{ messages.__class__ }}",
    "{{ messages.append(1) }}",
    "{{ namespace(_a=1) }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ dict.__init__ }}",
    "{{ range(10**6) }}",
    "{{ cycler.__init__.__globals__ }}",
]


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    """One worker for all of these templates."""
    with Sandbox([*TEMPLATES, *FORBIDDEN], {"bos_token": "<s>"}, "tiny", None) as opened:
        yield opened


def reply_of(box: Sandbox, template: str, tools: Any = None) -> Any:
    asked = request(tools=tools, template=[*TEMPLATES, *FORBIDDEN].index(template))
    (reply,) = box.collect(box.submit([asked], ["a:1"]))
    return reply


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_renders_as_transformers_does(template: str, tools: Any, box: Sandbox) -> None:
    with frozen_clock():
        (expected,), marks = render_jinja_template(
            [[{key: value for key, value in m.items() if value is not None} for m in MESSAGES]],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask="generation" in template,
            bos_token="<s>",
        )
    assert reply_of(box, template, tools) == ["ok", expected, [list(mark) for mark in marks[0]] if marks else [], []]


def test_other_renderings_are_lengths_where_they_are_beginnings() -> None:
    template = "{% for m in messages %}{{ m.role[0] }}{% endfor %}{{ '!' if add_generation_prompt }}"
    cuts = [(3, False), (2, False), (2, True), (9, False)]
    assert replies(template, request(cuts=cuts)) == [["ok", "sua", [], [2, "su!", 3]]]


@pytest.mark.parametrize("template", FORBIDDEN)
def test_what_the_sandbox_forbids_fails_or_shows_nothing(template: str, box: Sandbox) -> None:
    reply = reply_of(box, template)
    assert reply[0] == "fault" or reply[1] == "", reply


def test_the_worker_can_open_no_file_and_knows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with Sandbox(["a"], {}, "tiny", None) as box:
        process = Path(f"/proc/{worker_pid(box)}")
        environment = (process / "environ").read_bytes()
        limits = {line[:25].strip(): line[25:].split()[0] for line in (process / "limits").read_text().splitlines()}
    assert b"secret" not in environment and b"HOME" not in environment
    assert (limits["Max open files"], limits["Max file size"], limits["Max core file size"]) == ("0", "0", "0")
    assert limits["Max address space"] == str(512 * 2**20)


ENDLESS = (
    "{% macro spin() %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endmacro %}"
    "{% if 'loop' in messages[0].content %}{{ spin() }}{% endif %}ok"
)


def saying(text: str) -> str:
    return request([{"role": "user", "content": text}], cuts=((1, False),))


@pytest.mark.parametrize("before", [0, 2])
def test_a_row_that_takes_too_long_is_named(monkeypatch: pytest.MonkeyPatch, before: int) -> None:
    monkeypatch.setattr(sandbox, "ROW_SECONDS", 0.6)
    with pytest.raises(SecurityError, match=r"'tiny' (takes|computes for) more than 0.6 s for one row") as caught:
        replies(ENDLESS, *[saying("quick")] * before, saying("loop"), saying("quick"))
    assert caught.value.problems[0].where == f"a:{before + 1}" and caught.value.exit_code == 8


@pytest.mark.parametrize("expression", ["'a' * 10**9", "'%999999999d' | format(1)", "[0] * 10**9"])
def test_memory_is_limited(expression: str) -> None:
    with pytest.raises(SecurityError, match="'tiny' needs more memory than it may have") as caught:
        replies("{% if 'big' in messages[0].content %}{{ " + expression + " }}{% endif %}", saying("a"), saying("big"))
    assert caught.value.problems[0].where == "a:2"


def test_length_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_CHARS", 10)
    assert replies("{{ messages[0].content }}", saying("0123456789"))[0][0] == "ok"
    with pytest.raises(SecurityError, match="renders 11 characters; the limit is 10"):
        replies("{{ messages[0].content }}", saying("0123456789a"))


def test_size_is_limited() -> None:
    assert replies("é" * 2**15, saying("a"))[0][1] == "é" * 2**15
    with pytest.raises(SecurityError, match="is 65,538 bytes long; the limit is 65,536"):
        replies("é" * (2**15 + 1), saying("a"))


def test_endless_recursion_is_the_templates_own_fault() -> None:
    assert replies("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", saying("a"))[0][0] == "fault"


def test_template_that_does_not_compile() -> None:
    with pytest.raises(ModelError, match="fails at line 2: TemplateSyntaxError"):
        Sandbox(["a\n{% if %}"], {}, "tiny", "a:1")


def test_a_worker_that_was_killed_is_replaced() -> None:
    with Sandbox(["{{ messages[0].content }}"], {}, "tiny", None) as box:
        os.kill(worker_pid(box), signal.SIGKILL)
        ticket = box.submit([saying("a"), saying("b")], ["a:1", "a:2"])
        assert [reply[1] for reply in box.collect(ticket)] == ["a", "b"]
        ticket = box.submit([saying("c"), saying("d")], ["a:3", "a:4"])
        assert [reply[1] for reply in box.collect(ticket)] == ["c", "d"]


def test_batches_larger_than_a_pipe() -> None:
    with Sandbox(["{{ messages[0].content }}"], {}, "tiny", None) as box:
        tickets = [box.submit([saying(text * 2**20) for text in texts], list(texts)) for texts in ("abc", "de")]
        assert [reply[1][0] for ticket in tickets for reply in box.collect(ticket)] == list("abcde")


def test_the_largest_row_fits() -> None:
    """A line of 16 MiB, the longest that is read from a file, whose characters take four bytes each in memory."""
    text = "\U0001f600" + "a" * (16 * 2**20 - 200)
    (reply,) = replies("{{ messages[0].content }}", request([{"role": "user", "content": text}], cuts=[[1, False]] * 3))
    assert reply == ["ok", text, [], [len(text), len(text)]]


def test_jinja_is_found_where_the_worker_s_own_python_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where it is installed for one user, or on PYTHONPATH, which the worker is kept from."""
    venv.create(tmp_path / "bare", symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    assert replies("{{ messages[2].content }}", request())[0][0] == "ok"
    monkeypatch.setattr(sandbox, "_library_folders", list)
    with pytest.raises(MachineError, match=r"does not start: .*No module named 'jinja2'"):
        replies("x", request())


def test_a_worker_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "worker.py"
    broken.write_text("import no_such_module\n")
    monkeypatch.setattr(sandbox, "_WORKER", broken)
    with pytest.raises(MachineError, match=r"does not start: .*No module named 'no_such_module'"):
        Sandbox(["x"], {}, "tiny", None)
    broken.write_text("raise SystemExit(3)\n")
    with pytest.raises(MachineError, match="ends with code 3 and says nothing"):
        Sandbox(["x"], {}, "tiny", None)


def test_works_from_a_thread_and_from_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    (tmp_path / "json.py").write_text("raise SystemExit")
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(replies("ok", saying("a"))))
    thread.start()
    thread.join()
    assert found == [["ok", "ok", [], []]]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_closing_ends_the_worker() -> None:
    with Sandbox(["a"], {}, "tiny", None) as box:
        pid = worker_pid(box)
        assert is_running(pid)
    assert not is_running(pid)


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[str]]:
    code = (
        "import time\nfrom qlora_train.data.sandbox import Sandbox\nbox = Sandbox(['a'], {}, 'tiny', None)\n"
        "print(box._worker._process.pid, flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_the_worker_ends_with_a_parent_that_is_killed(parent: subprocess.Popen[str]) -> None:
    assert parent.stdout
    pid = int(parent.stdout.readline())
    assert is_running(pid)
    parent.kill()
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(pid)
