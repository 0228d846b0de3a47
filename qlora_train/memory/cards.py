"""Common cards, and the memory that torch sees on them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from qlora_train.errors import RecipeError

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A card. A desktop that is drawn on it takes some of its memory besides."""

    name: str
    nominal_gb: int  # as it is sold
    total_gib: float  # as `torch.cuda.get_device_properties` gives it
    is_recent: bool = True  # Ampere or later: bfloat16, and the attention kernel that plans assume

    @property
    def total_bytes(self) -> int:
        """What CUDA can give to all processes together."""
        return int(self.total_gib * GIB)


# The "total capacity" of torch's out-of-memory messages on Linux, as public reports quote it; the smaller where several
# are quoted. Where none was found, the share of the card nearest in kind.
CARDS = (
    Card("RTX 3070", 8, 7.66),
    Card("RTX 4060", 8, 7.62),
    Card("RTX 4060 Ti 8GB", 8, 7.62),
    Card("RTX 3080", 10, 9.64),
    Card("RTX 2080 Ti", 11, 10.75, is_recent=False),
    Card("RTX 3060", 12, 11.74),
    Card("RTX 4070", 12, 11.72),
    Card("T4", 16, 14.56, is_recent=False),
    Card("V100 16GB", 16, 15.77, is_recent=False),
    Card("RTX 4060 Ti 16GB", 16, 15.60),
    Card("RTX 4080", 16, 15.57),
    Card("RTX 5080", 16, 15.47),
    Card("L4", 24, 21.95),
    Card("A10G", 24, 21.97),
    Card("RTX 3090", 24, 23.57),
    Card("RTX 4090", 24, 23.52),
    Card("V100 32GB", 32, 31.73, is_recent=False),
    Card("RTX 5090", 32, 31.34),
    Card("A100 40GB", 40, 39.38),
    Card("L40S", 48, 44.34),
    Card("RTX A6000", 48, 47.40),
    Card("RTX 6000 Ada", 48, 47.27),
    Card("A100 80GB", 80, 79.14),
    Card("H100 80GB", 80, 79.10),
    Card("RTX PRO 6000", 96, 94.97),
    Card("H200", 141, 139.72),
)
SIZES_GB = (8, 12, 16, 24, 48, 80)
"""Sizes of cards that the table of plans shows where none are named."""

_UNITS = {"": GIB, "g": GIB, "gib": GIB, "gb": 10**9, "mib": 2**20, "m": 2**20, "mb": 10**6}


def find_card(name: str) -> Card:
    """The card of a name as people write it: "rtx4090", "NVIDIA GeForce RTX 4090". RecipeError names near ones.

    >>> find_card("nvidia geforce rtx 4090").total_gib, find_card("a100-80g").name, find_card("A100").name
    (23.52, 'A100 80GB', 'A100 40GB')
    """
    wanted = _words(name)
    known = {card: _words(card.name) for card in CARDS}
    for card, words in known.items():
        if words == wanted or _without_units(words) == _without_units(wanted):
            return card
    holding = [card for card, words in known.items() if wanted and _parts(wanted) <= _parts(words)]
    if holding:
        return holding[0]
    names = {"".join(words): card.name for card, words in known.items()}
    close = get_close_matches("".join(wanted), names, n=4, cutoff=0.4)
    near = ", ".join(names[key] for key in close) or ", ".join(card.name for card in CARDS)
    raise RecipeError(f"--gpu: no card {name!r} is known", fix=f"name one of {near}; or give its memory: --vram 24GiB")


def parse_memory(text: str) -> int:
    """Bytes of "24GiB", "24 GB", "24g" or "24" (GiB). RecipeError for anything else.

    >>> parse_memory("24GiB") == parse_memory("24") == 24 * 2**30, parse_memory("24GB")
    (True, 24000000000)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS or not float(match[1]):
        raise RecipeError(f"--vram: {text!r} is no amount of memory", fix="write it as 24GiB, 24GB or 24576MiB")
    return int(float(match[1]) * _UNITS[match[2]])


def size_card(gigabytes: int) -> Card:
    """The recent card with the least memory among those that are sold with so much: what fits there, fits on all."""
    fitting = (card for card in CARDS if card.nominal_gb == gigabytes and card.is_recent)
    return min(fitting, key=lambda card: card.total_gib)


def _words(name: str) -> list[str]:
    """Lower-case words and numbers, makers and families left out."""
    words = re.findall(r"[a-z]+\d*[a-z]*|\d+[a-z]*", re.sub(r"[_\-/]", " ", name.lower()))
    joined = re.sub(r"\brtx(\d)", r"rtx \1", " ".join(words))
    return [word for word in joined.split() if not re.fullmatch(r"nvidia|geforce|tesla|graphics|pcie|sxm\d?", word)]


def _without_units(words: list[str]) -> list[str]:
    return [re.sub(r"(?<=\d)(gib|gb|g)$", "", word) for word in words if word != "rtx"]


def _parts(words: list[str]) -> set[str]:
    return set(_without_units(words))
