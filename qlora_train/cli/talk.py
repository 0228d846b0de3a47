"""The conversation on a terminal."""

from __future__ import annotations

import contextlib
import sys

from qlora_train.api import ChatSession
from qlora_train.errors import UserError
from qlora_train.printable import fit_to_show, printable

HELP = "/adapter NAME, /base, /clear, /exit"
_COMMANDS = ("/adapter", "/base", "/clear", "/exit", "/quit")


def talk(session: ChatSession, *, once: str | None, max_new_tokens: int, temperature: float, seed: int) -> None:
    """Answer one message, or all that are typed until the end of the input."""

    def answer(text: str) -> None:
        reply = session.reply(text, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        with contextlib.closing(reply):
            for piece in reply:
                # A model can be taught to write terminal escapes; line breaks are all it may do.
                print("\n".join(printable(part) for part in piece.split("\n")), end="", flush=True)
        print()

    if once is not None:
        answer(once)
        return
    with contextlib.suppress(ImportError):  # `input` lets lines be edited and brought back where it is loaded
        import readline  # noqa: F401
    print(f"{session.active} answers. {HELP}; Ctrl-C ends an answer", file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line in ("/exit", "/quit"):
            return
        try:
            if line.partition(" ")[0] in _COMMANDS:
                _command(session, line)
            elif line:  # also one that begins with a path
                answer(line)
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except UserError as error:  # of this line: what was said before it stands
            print(fit_to_show(str(error)), file=sys.stderr)


def _command(session: ChatSession, line: str) -> None:
    name, _, argument = line.partition(" ")
    if argument and name != "/adapter":
        print(f"{name} stands alone: {HELP}", file=sys.stderr)
    elif name == "/clear":
        session.clear()
    else:
        session.switch("base" if name == "/base" else argument.strip())
        print(f"{session.active} answers", file=sys.stderr)
