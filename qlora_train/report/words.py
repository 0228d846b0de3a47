"""Figures and texts as a reader of the page wants them."""

from __future__ import annotations

from qlora_train.printable import fit_to_show

MAX_TEXT = 1200  # characters of an answer, a path or a value


def plain(text: str, most: int = MAX_TEXT) -> str:
    """A text without secrets and without characters that act; line ends stay, and what is too long is cut.

    >>> plain("a\\x1b[2Jb\\nc")
    'a\\\\x1b[2Jb\\nc'
    """
    shown = fit_to_show(text)
    left_out = len(shown) - most
    return f"{shown[:most]}... ({left_out:,} characters more)" if left_out > 0 else shown


def duration(seconds: float) -> str:
    """A time in its two largest units.

    >>> duration(4.26), duration(282), duration(7500), duration(200_000)
    ('4.3 s', '4 min 42 s', '2 h 05 min', '2 d 07 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24:02d} h"


def small_share(frac: float) -> str:
    """A share that may be tiny, to two digits.

    >>> small_share(0.00010965), small_share(0.0123)
    ('0.011 %', '1.2 %')
    """
    return f"{100 * frac:.2g} %"


def loss(value: float) -> str:
    """Nats per supervised token."""
    return f"{value:.3f}"


def short(digest: str) -> str:
    """The first characters of a hash: enough to tell two apart."""
    return digest[:16]
