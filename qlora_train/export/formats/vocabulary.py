"""A tokenizer as llama.cpp reads it: tokens, their kinds and scores, merges, the pre-tokenizer's id, special tokens.

Two kinds of tokenizer are known, both BPE: on bytes (GPT-2's alphabet) and on characters (SentencePiece). What
llama.cpp has no word for is refused; what it reads otherwise in rare text is a notice. The ids of real prompts are
compared with those of training when the file is served (tools/serve_check.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf import TokenType

from qlora_train.errors import ModelError

_SPACE = "\u2581"  # what SentencePiece writes for a space
# Regular expressions by which tokenizer.json cuts text into words, and llama.cpp's name for each (src/llama-vocab.cpp).
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|"
    r"\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_PHI_3 = re.compile("phi-?3", re.IGNORECASE)
_KEEPING = ("<unk>", "<s>", "<|endoftext|>")
_GPT2, _DIGITS = "GPT-2", "digits"
_END_NAMES = ("eot", "eom")  # of turn, of message: what llama.cpp stops at besides the tokenizer's own end
_PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    (_GPT2,): "gpt-2",
    (_DIGITS, _GPT2): "smollm",
    (_WORDS % "{1,3}",): "llama-bpe",
    (_WORDS % "",): "qwen2",
    (_CASED % (_SHORT, _SHORT, "{1,3}"),): "gpt-4o",
    (_CASED % ("", "", ""),): "tekken",
}
# The same words as llama-bpe's, for vocabularies whose whole words are reached by merges only.
_WITH_MERGES = {"llama-bpe": "dbrx"}


@dataclass(frozen=True)
class Vocabulary:
    """What the tokenizer section of a GGUF file holds."""

    kind: str  # gpt2 or llama
    pre_tokenizer: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]  # empty for gpt2
    merges: tuple[str, ...]  # empty for llama
    special_ids: dict[str, int]  # bos, eos, unk, pad, eot, eom
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None
    strips_right: bool = False  # special tokens take the white space after them, as Phi-3's do
    notices: tuple[str, ...] = field(default=())


def read_vocabulary(tokenizer: Any, num_rows: int, end_token_ids: Sequence[int]) -> Vocabulary:
    """The vocabulary of a fast tokenizer for an embedding of `num_rows`; ModelError for one llama.cpp cannot be told.

    Rows without a token get names that no text gives. Tokens without a row, which no model can read, are left out.
    `end_token_ids` are those at which generation stops: two that are not the tokenizer's end go in as end of turn and
    of message.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise _refused(f"is a {model['type']} tokenizer; BPE is known")
    byte_level = _is_byte_level(spec)
    by_id = {number: token for token, number in model["vocab"].items()}
    added = {token["id"]: token for token in spec["added_tokens"]}
    tokens, types = [], []
    for number in range(num_rows):
        token, kind = _token(number, by_id, added, None if byte_level else model.get("unk_token"))
        tokens.append(token)
        types.append(int(kind))
    merges = [_pair(merge) for merge in model["merges"]]
    strips_right = _strips_as_phi_3(added)
    notices = _notices(spec, {} if strips_right else added)
    if byte_level:
        pre_tokenizer, prefix = _pre_tokenizer_id(spec), False
    else:
        pre_tokenizer, prefix = "default", _adds_space_prefix(spec, notices)
    if isinstance(tokenizer.chat_template, dict):
        notices.append(
            f"the model has several chat templates ({', '.join(sorted(tokenizer.chat_template))}), and the file holds "
            "none of them: give llama-server one by --chat-template-file"
        )
    if unnamed := _other_ends(tokenizer, end_token_ids)[len(_END_NAMES) :]:
        texts = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(unnamed)))
        notices.append(f"the file has no place for every token that ends an answer: let the server stop at {texts} too")
    probe = tokenizer("a")["input_ids"]
    return Vocabulary(
        kind="gpt2" if byte_level else "llama",
        pre_tokenizer=pre_tokenizer,
        tokens=tuple(tokens),
        types=tuple(types),
        scores=() if byte_level else tuple(_scores(tokens, model["vocab"], merges)),
        merges=tuple(f"{left} {right}" for left, right in merges) if byte_level else (),
        special_ids=_special_ids(tokenizer, num_rows, end_token_ids),
        add_bos=tokenizer.bos_token_id is not None and probe[0] == tokenizer.bos_token_id,
        add_eos=len(probe) > 1 and probe[-1] == tokenizer.eos_token_id,
        add_space_prefix=prefix,
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
        strips_right=strips_right,
        notices=tuple(notices),
    )


def general_name(name: str, *, strips_right: bool) -> str:
    """A model's name for the file: llama.cpp takes from it whether special tokens take the white space after them.

    It looks for `phi-3` or `phi3` in the name, and for nothing in the tokenizer (src/llama-vocab.cpp).

    >>> general_name("my-phi3", strips_right=False), general_name("mine", strips_right=True)
    ('my-phi 3', 'mine (Phi-3 tokens)')
    """
    says_so = re.search(_PHI_3, name) is not None
    if says_so == strips_right:
        return name
    return f"{name} (Phi-3 tokens)" if strips_right else re.sub(_PHI_3, "phi 3", name)


def _strips_as_phi_3(added: dict[int, dict[str, Any]]) -> bool:
    """Whether white space is dropped after all special tokens but three, as llama.cpp does for Phi-3."""
    special = {token["content"]: token for token in added.values() if token["special"]}
    if not special.keys() > {*_KEEPING, "</s>"}:
        return False
    return all(token["rstrip"] != (name in _KEEPING) and not token["lstrip"] for name, token in special.items())


def _refused(what: str) -> ModelError:
    return ModelError(f"the tokenizer {what}: llama.cpp would read text otherwise", fix="export safetensors instead")


def _token(
    number: int, by_id: dict[int, str], added: dict[int, dict[str, Any]], unknown: str | None
) -> tuple[str, TokenType]:
    """Text and kind of one token."""
    if number in added:
        token = added[number]
        if token["special"]:
            is_unknown = token["content"] == unknown
            return token["content"], TokenType.UNKNOWN if is_unknown else TokenType.CONTROL
        return token["content"].replace(_SPACE, " "), TokenType.USER_DEFINED
    if number not in by_id:
        return f"[PAD{number}]", TokenType.UNUSED
    text = by_id[number]
    if text == unknown:
        return text, TokenType.UNKNOWN
    is_byte = unknown is not None and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return text, TokenType.BYTE if is_byte else TokenType.NORMAL


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _scores(tokens: Sequence[str], vocab: dict[str, int], merges: Sequence[tuple[str, str]]) -> list[float]:
    """Scores that make llama.cpp, which joins the neighbours of highest score, join what the merges join first.

    llama.cpp knows joined pieces, not pairs: that is the same order if the pairs of each piece follow each other, which
    they do in whatever was converted from SentencePiece. ModelError otherwise.
    """
    order: dict[str, int] = {}
    last = ""
    for left, right in merges:
        piece = left + right
        if piece in order and piece != last:
            raise _refused(f"joins {piece!r} at several places of its list of merges")
        order.setdefault(piece, len(order))
        last = piece
    unjoined = -float(len(order) + 1)
    return [-float(order[token]) if token in order else unjoined for token in tokens]


def _is_byte_level(spec: dict[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(spec["pre_tokenizer"], "pretokenizers"))


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A pre-tokenizer or normalizer as the list of its steps."""
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _pre_tokenizer_id(spec: dict[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer."""
    steps: list[str] = []
    for step in _steps(spec["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "ByteLevel":
            if step["add_prefix_space"]:
                raise _refused("puts a space before every text")
            steps += [_GPT2] if step["use_regex"] else []
        elif step["type"] == "Digits" and step["individual_digits"]:
            steps.append(_DIGITS)
        elif step["type"] == "Split" and "Regex" in step["pattern"] and step["behavior"] in ("Isolated", "Removed"):
            steps.append(step["pattern"]["Regex"])
        else:
            raise _refused(f"cuts text by a step of type {step['type']}")
    found = _PRE_TOKENIZERS.get(tuple(steps))
    if found is None:
        raise _refused(f"cuts text into words by {' then '.join(steps) or 'nothing'}, which has no name there")
    return found if spec["model"].get("ignore_merges") else _WITH_MERGES.get(found, found)


def _adds_space_prefix(spec: dict[str, Any], notices: list[str]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before the text."""
    if not spec["model"].get("byte_fallback"):
        raise _refused("has no tokens for single bytes")
    normal = [_plain_step(step) for step in _steps(spec["normalizer"], "normalizers")]
    cuts = _steps(spec["pre_tokenizer"], "pretokenizers")
    replace = ("Replace", " ")
    # Once spaces are replaced, there is none to split at.
    cut_at_space = [("Split", "MergedWithPrevious")]
    if [(step["type"], step.get("behavior")) for step in cuts] in ([], cut_at_space) and normal[-1:] == [replace]:
        if normal == [("Prepend", _SPACE), replace]:
            return True
        if normal == [replace]:
            return False
    if not normal and len(cuts) == 1 and cuts[0]["type"] == "Metaspace" and cuts[0]["replacement"] == _SPACE:
        scheme = cuts[0]["prepend_scheme"]
        if scheme == "first":
            notices.append(
                "the tokenizer puts a space before the first word only, llama.cpp before every text that follows a "
                "special token: hold golden_prompts.json against the server"
            )
        return bool(scheme != "never")
    raise _refused("prepares text in a way that SentencePiece does not")


def _plain_step(step: dict[str, Any]) -> tuple[str, str]:
    pattern = step.get("pattern") or {}
    return step["type"], str(step.get("prepend") or pattern.get("String") or "")


def _notices(spec: dict[str, Any], added: dict[int, dict[str, Any]]) -> list[str]:
    """What llama.cpp leaves out."""
    notices = []
    if any(step["type"] == "NFC" for step in _steps(spec["normalizer"], "normalizers")):
        notices.append("llama.cpp does not compose characters (NFC) before it reads them, as the tokenizer does")
    stripping = [token["content"] for token in added.values() if token["lstrip"] or token["rstrip"]]
    if stripping:
        notices.append(f"llama.cpp keeps white space beside {stripping[0]} and such, which the tokenizer drops")
    return notices


def _special_ids(tokenizer: Any, num_rows: int, end_token_ids: Sequence[int]) -> dict[str, int]:
    found = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    found |= dict(zip(_END_NAMES, _other_ends(tokenizer, end_token_ids), strict=False))
    return {name: number for name, number in found.items() if number is not None and number < num_rows}


def _other_ends(tokenizer: Any, end_token_ids: Sequence[int]) -> list[int]:
    return [number for number in end_token_ids if number != tokenizer.eos_token_id]
