"""Text from elsewhere, made fit for a terminal and for logs: it can steer nothing, and no secret is in it."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping

REDACTED = "[secret]"
LEAST_SECRET_CHARS = 8  # a shorter value is more likely a word of a message than a secret
_SECRET_NAME = re.compile(r"(?:^|_)(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(?:$|_)")
_SECRET_TEXT = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|\bsk-(?:proj-|ant-\w+-)?[A-Za-z0-9]{20,}"  # OpenAI, Anthropic
    r"|\bgh[pousr]_[A-Za-z0-9]{30,}"  # GitHub
    r"|\bAKIA[A-Z0-9]{16}\b"  # Amazon
    r"|(?<=://)[^/@\s:]+:[^/@\s]+(?=@)"  # user:password of an address
)


def printable(text: str) -> str:
    r"""The text with what could steer a terminal written as escapes: controls, direction marks, line separators.

    >>> printable("a\x1b[2Jb\n")
    'a\\x1b[2Jb\\n'
    """
    return "".join(char if _is_plain(char) else char.encode("unicode_escape").decode("ascii") for char in text)


def printable_lines(text: str) -> str:
    r"""As `printable`, line by line: line ends stay what they are.

    >>> printable_lines("a\x1b[2Jb\nc")
    'a\\x1b[2Jb\nc'
    """
    return "\n".join(printable(line) for line in text.split("\n"))


def find_secret(text: str) -> re.Match[str] | None:
    """The first thing in a text that has the form of an access token or of a password in an address."""
    return _SECRET_TEXT.search(text)


def without_secrets(text: str, environ: Mapping[str, str] | None = None) -> str:
    """The text without tokens: what has the form of one, and the values of variables such as HF_TOKEN or WANDB_API_KEY.

    >>> without_secrets("401 for hf_abcdefghijklmnopqrstuvwxyz and qwertyuiop", {"WANDB_API_KEY": "qwertyuiop"})
    '401 for [secret] and [secret]'
    """
    environ = os.environ if environ is None else environ
    values = {value for name, value in environ.items() if _SECRET_NAME.search(name.upper())}
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= LEAST_SECRET_CHARS:
            text = text.replace(value, REDACTED)
    return _SECRET_TEXT.sub(REDACTED, text)


def fit_to_show(text: str) -> str:
    """What a message becomes before it is printed: no secrets, no escapes, its lines kept."""
    return printable_lines(without_secrets(text))


def _is_plain(char: str) -> bool:
    """Letters, marks, numbers, punctuation, symbols and the plain space: not C* (controls, formats), Zl or Zp."""
    category = unicodedata.category(char)
    return category[0] != "C" and category not in ("Zl", "Zp")
