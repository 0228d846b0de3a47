"""What was probably meant: names that a recipe lacks, as keys, sections and files near to them."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from qlora_train.recipe.keys_elsewhere import NOT_HERE, OLD_KEYS, OLD_SECTIONS
from qlora_train.recipe.schema import Recipe

KEYS: dict[str, tuple[str, ...]] = {
    name: tuple(field.annotation.model_fields)  # type: ignore[union-attr]  # every field of Recipe is a section
    for name, field in Recipe.model_fields.items()
}


def edit_distance(a: str, b: str) -> int:
    """Least number of inserted, deleted, replaced and swapped neighbouring letters between the two."""
    older: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        oldest, older, row = older, row, [i + 1]
        for j, y in enumerate(b):
            row.append(min(older[j + 1] + 1, row[j] + 1, older[j] + (x != y)))
            if i and j and x == b[j - 1] and a[i - 1] == y:
                row[-1] = min(row[-1], oldest[j - 1] + 1)
    return row[-1]


def nearest(word: str, names: Collection[str]) -> list[str]:
    """The names at the least edit distance from a misspelt word (at most 2 edits); else what difflib finds like it."""
    word = word.lower().replace("-", "_")
    if len(word) > 40:  # no misspelling of ours, and the time grows with the length
        return []
    likely = [name for name in names if abs(len(name) - len(word)) <= 2]
    edits = {name: edit_distance(word, name) for name in likely}
    least = min(edits.values(), default=99)
    close = [name for name in likely if edits[name] == least <= min(2, len(name))]
    return close[:3] or get_close_matches(word, names, n=2, cutoff=0.7)


def advise_key(section: str, key: str) -> tuple[str, list[str]]:
    """What to do about a key that `section` lacks, and the dotted keys that were probably meant."""
    word = key.lower().replace("-", "_")
    if word in NOT_HERE and word not in KEYS[section]:
        return NOT_HERE[word], []
    old = OLD_KEYS.get(word)
    if old:
        there, _, name = old.partition(".")
        return f"it is called {name} here" + ("" if there == section else f", in the section {there}"), [old]
    homes = [name for name, keys in KEYS.items() if word in keys and name != section]
    if word in KEYS[section]:
        return f"did you mean {word}?", [f"{section}.{word}"]
    close = nearest(key, KEYS[section])
    if homes and not (close and edit_distance(word, close[0]) == 1):
        return f"it belongs to the section {' or '.join(homes)}", [f"{home}.{word}" for home in homes]
    if close:
        return f"did you mean {' or '.join(close)}?", [f"{section}.{name}" for name in close]
    for name, keys in KEYS.items():
        close = nearest(key, keys)
        if close:
            return f"did you mean {close[0]} in the section {name}?", [f"{name}.{close[0]}"]
    return list_keys(section), []


def list_keys(section: str) -> str:
    """The advice where nothing is near."""
    return f"remove it; the keys of {section} are: {', '.join(KEYS[section])}"


def advise_section(name: str) -> tuple[str, str | None]:
    """What to do about a top-level name that is no section, and the section that was probably meant."""
    word = name.lower().replace("-", "_")
    if word in OLD_SECTIONS:
        return f"it is called {OLD_SECTIONS[word]} here", OLD_SECTIONS[word]
    if word in NOT_HERE:
        return NOT_HERE[word], None
    homes = [section for section, keys in KEYS.items() if word in keys]
    if word in OLD_KEYS or homes:
        target = OLD_KEYS.get(word) or f"{homes[0]}.{word}"
        section, _, key = target.partition(".")
        return f"it is {section}.{key} here: {key} in the section {section}", None
    close = nearest(name, KEYS)
    if close:
        return f"did you mean {' or '.join(close)}?", close[0]
    return f"remove it; the sections are: {', '.join(KEYS)}", None


def near_files(path: Path) -> str:
    """A phrase naming the files beside `path` that are called almost the same; empty if there are none."""
    try:
        names = sorted(entry.name for entry in islice(path.parent.iterdir(), 10_000))
    except (OSError, ValueError):
        return ""
    stems = get_close_matches(path.stem, {Path(name).stem for name in names}, n=3, cutoff=0.6)
    close = [name for stem in stems for name in names if Path(name).stem == stem][:3]
    return f"nearest in {path.parent}: {', '.join(close)}" if close else ""
