"""The audit page as its reader and a browser take it: parsed HTML, the texts that show, and nothing that acts."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_train.data.page import length_histogram, render_page

VOID = {"meta", "br", "line"}


class Page(HTMLParser):
    """The page's visible text, its tags, and its supervised and other tokens."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []  # the innermost tag, and the text
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.texts.append((self._open[-1], data))

    @property
    def text(self) -> str:
        return " ".join("".join(text for _, text in self.texts).split())

    def texts_in(self, tag: str) -> list[str]:
        return [text for inside, text in self.texts if inside == tag]


def preview(*tokens: tuple[str, float], **changes: Any) -> dict[str, Any]:
    return {"where": "a.jsonl:5", "tokens": tokens, "num_left_out": 0, "tail": [], "reason": "", **changes}


def split_of(**changes: Any) -> dict[str, Any]:
    split = {
        "split": "train",
        "num_rows": 1234,
        "num_trained": 1200,
        "counts": {
            "kept": 1190,
            "cut": 10,
            "dropped": 4,
            "rejected": 20,
            "duplicate": 3,
            "held_out": 7,
            "not_selected": 0,
        },
        "reasons": [
            {"fate": "rejected", "reason": "weight # is negative", "count": 20, "examples": ["a.jsonl:9: weight -1"]}
        ],
        "sources": [{"name": "a.jsonl", "format": "alpaca", "weight": 2.5, "num_rows": 1234, "num_trained": 1200}],
        "num_pieces": 1200,
        "num_tokens": 80_000,
        "num_supervised_tokens": 20_000,
        "num_lost_tokens": 2_051,
        "lost_token_frac": 0.025,
        "num_plain_specials": 31,
        "num_control_specials": 32,
        "num_context_turns": 33,
    }
    return {**split, **changes}


def page_of(*splits: dict[str, Any], **changes: Any) -> Page:
    return Page(html_of(*splits, **changes))


def html_of(*splits: dict[str, Any], **changes: Any) -> str:
    audit = {"recipe": "shell.yaml", "model": "tiny", "seq_len": 2048, "max_lost_frac": 0.05, **changes}
    return render_page(json.loads(json.dumps({**audit, "splits": splits or [split_of()]})))


def test_every_number_of_a_split_is_on_the_page() -> None:
    page = page_of()
    for part in (
        "shell.yaml for tiny, sequences of 2,048 tokens",
        "1,200 rows trained on of 1,234 in the sources",
        "80,000 tokens",
        "20,000 supervised tokens 25.0 % of the tokens",
        "2.5 % of the tokens lost 2,051 tokens; the budget is 5.0 %",
        "rejected weight # is negative a.jsonl:9: weight -1 20",
        "a.jsonl alpaca 2.5 1,234 1,200",
        "31 spelled as text, 32 taken as the tokens they spell; 33 answers are context only",
    ):
        assert part in " ".join(re.sub(r"\s+", " ", " ".join(text for _, text in page.texts)).split()), part


def test_rows_that_are_trained_in_pieces_say_in_how_many() -> None:
    assert "in the sources, in 1,450 pieces" in page_of(split_of(num_pieces=1450)).text
    assert "pieces" not in page_of().text


def test_every_fate_has_its_count_its_share_and_its_meaning() -> None:
    text = " ".join(" ".join(text for _, text in page_of().texts).split())
    assert "kept 1,190 96.4 % Used whole." in text
    assert "rejected 20 1.6 % Nothing to train on can be made of them." in text
    assert "not selected 0 0 % Left out, since the recipe asks for fewer rows." in text


@pytest.mark.parametrize(("max_lost_frac", "is_red"), [(0.05, False), (0.02, True)])
def test_a_loss_above_the_budget_is_marked(max_lost_frac: float, is_red: bool) -> None:
    page = page_of(max_lost_frac=max_lost_frac)
    assert any("bad" in (attributes.get("class") or "").split() for _, attributes in page.tags) == is_red


def test_parts_that_were_not_measured_are_not_shown() -> None:
    text = page_of().text
    for title in ("Batching", "Duplicates", "Length of the rows", "Rows to look at", "Overlap"):
        assert title not in text


def test_duplicates_overlap_and_batching_are_shown_with_examples() -> None:
    pair = {"first": "a.jsonl:1", "second": "a.jsonl:8", "similarity": 0.857}
    near = {"num_compared": 900, "num_near": 45, "num_too_short": 12, "sampled": True, "examples": [pair]}
    exact = {"num_rows": 1234, "num_duplicates": 3, "examples": [{**pair, "second": "a.jsonl:7", "similarity": 1.0}]}
    batching = {"kind": "packed", "num_lines": 41, "num_steps": 63, "padding_frac": 0.0112, "unfilled_frac": 0.02}
    page = page_of(
        split_of(duplicates=exact, near_duplicates=near, batching=batching),
        overlap={
            "num_eval_rows": 50,
            "num_rows": 2,
            "num_prompts": 5,
            "row_examples": [{"first": "a.jsonl:3", "second": "eval.jsonl:4", "similarity": 1.0}],
            "prompt_examples": [],
        },
    )
    assert "3 of 1,234 rows are exactly as an earlier one." in page.text
    assert "45 of 900 compared rows are much like an earlier one (a random sample of the set). 12 rows" in page.text
    assert "packed: 41 packs in the first epoch, 1.1 % of the positions are padding (2.0 % if each" in page.text
    assert "63 optimiser steps in all" in page.text
    assert "2 of 50 validation rows (4.0 %) are trained on word for word." in page.text
    assert "5 of them (10.0 %) have a prompt that occurs in training" in page.text
    cells = page.texts_in("td")
    assert {"a.jsonl:8", "85.7 %", "a.jsonl:7", "100 %", "eval.jsonl:4"} <= set(cells)


def test_tokens_are_marked_by_whether_they_are_trained() -> None:
    page = page_of(split_of(previews=[preview(("ask", 0), (" an", 1), ("swer", 0.5), reason="2 tokens, median 9")]))
    assert page.texts_in("i") == ["Grey", "ask"] and page.texts_in("b") == ["Green, underlined", " an", "swer"]
    assert [attributes["title"] for tag, attributes in page.tags if tag == "b" and "title" in attributes] == [
        "weight 0.5"
    ]
    assert "a.jsonl:5 2 tokens, median 9" in page.text


def test_a_row_cut_by_the_preview_says_how_much_is_left_out() -> None:
    row = preview(("first", 0), num_left_out=999_400, tail=[("last", 1)])
    page = page_of(split_of(previews=[row]))
    assert "first 999,400 tokens left out last" in " ".join(" ".join(text for _, text in page.texts).split())


def test_each_length_has_a_bar_and_seq_len_a_line() -> None:
    page = page_of(split_of(histogram={"edges": [0, 100, 200, 300], "counts": [5, 0, 20]}), seq_len=150)
    bars = [attributes for tag, attributes in page.tags if tag == "rect"]
    assert [float(bar["height"] or 0) for bar in bars] == [50.0, 0.0, 200.0]
    assert page.texts_in("title")[1:] == [
        "0 to 99 tokens: 5 rows",
        "100 to 199 tokens: 0 rows",
        "200 to 299 tokens: 20 rows",
    ]
    # Bins are 240 wide, and 150 lies in the middle of the second.
    (limit,) = [attributes for tag, attributes in page.tags if attributes.get("class") == "limit"]
    assert limit["x1"] == limit["x2"] == "360.0" and "seq_len 150" in page.text


def test_a_limit_beside_the_chart_is_told_in_words() -> None:
    page = page_of(split_of(histogram={"edges": [0, 100], "counts": [5]}), seq_len=4096)
    assert not [tag for tag, attributes in page.tags if attributes.get("class") == "limit"]
    assert "seq_len (4,096 tokens)" in page.text


HOSTILE = "</div><script>alert(1)</script><img src=x onerror=alert(1)>\"'{{ 7 * 7 }}\x1b[2J\u202e\u2028\x00\ud800"


def test_hostile_text_shows_and_does_nothing() -> None:
    split = split_of(
        split=HOSTILE,
        reasons=[{"fate": HOSTILE, "reason": HOSTILE, "count": 1, "examples": [HOSTILE]}],
        sources=[{"name": HOSTILE, "format": HOSTILE, "weight": 1.0, "num_rows": 1, "num_trained": 1}],
        duplicates={
            "num_rows": 2,
            "num_duplicates": 1,
            "examples": [{"first": HOSTILE, "second": HOSTILE, "similarity": 1.0}],
        },
        previews=[preview((HOSTILE, 1.0), (HOSTILE, 0.5), where=HOSTILE, reason=HOSTILE)],
        counts={HOSTILE: 1},
    )
    html = html_of(split, recipe=HOSTILE, model=HOSTILE)
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object", "link", "base", "form"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 12 and "{{ 7 * 7 }}" in page.text
    assert not set(html) & set("\x1b\u202e\u2028\x00\ud800") and "\\x1b[2J\\u202e\\u2028\\x00\\ud800" in html
    html.encode()


def test_nothing_is_loaded_from_elsewhere() -> None:
    page = page_of(split_of(previews=[preview(("https://example.com/x.js", 1))]))
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert links and all((link or "").startswith("#") for link in links)
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


@pytest.mark.parametrize("text", ["a" * 10_000, '"' * 2000, "漢" * 300, "&", "\u202e" * 1000])
def test_the_page_stays_below_a_megabyte(text: str) -> None:
    many = min(300, 1_000_000 // len(text))
    split = split_of(
        reasons=[{"fate": "dropped", "reason": text, "count": 1, "examples": [text] * 3}] * 50,
        sources=[{"name": text, "format": text, "weight": 1.0, "num_rows": 1, "num_trained": 1}] * 1000,
        previews=[preview(*[(text, 0.5)] * many, tail=[("a" * 100_000, 1)], num_left_out=7, where=text)] * 15,
    )
    html = html_of(split, split)
    assert len(html.encode()) < 1_000_000
    assert "... and 20 rarer reasons" in html and "... and 970 more sources" in html


def test_tokens_that_do_not_fit_are_counted_as_left_out() -> None:
    page = page_of(split_of(previews=[preview(*[("x" * 1000, 1)] * 600)]))
    shown = len([text for text in page.texts_in("b") if text.startswith("x")])
    assert 200 < shown < 300  # 300 kB, a little more than 1 kB each
    assert f"{600 - shown} tokens left out" in page.text


def test_the_histogram_has_round_edges() -> None:
    lengths = np.array([3, 12, 18, 19, 41], dtype=np.int32)
    assert length_histogram(lengths, 4096) == {
        "edges": [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42],
        "counts": [1, 0, 0, 0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
    }


def test_a_few_giant_rows_share_the_last_bin() -> None:
    lengths = np.array([10, 11, 12, 13] * 250 + [1_000_000], dtype=np.int32)
    assert length_histogram(lengths, 2048) == {
        "edges": [10, 11, 12, 13, 14, 1_000_001],
        "counts": [250, 250, 250, 250, 1],
    }


def test_seq_len_is_on_the_chart_where_rows_come_near_it() -> None:
    lengths = np.array([30, 40, 50], dtype=np.int32)
    assert length_histogram(lengths, 64)["edges"][-1] == 66
    assert length_histogram(lengths, 4096)["edges"][-1] == 51


def test_no_rows_make_an_empty_histogram() -> None:
    histogram = length_histogram(np.empty(0, np.int32), 64)
    assert sum(histogram["counts"]) == 0
    page_of(split_of(histogram=histogram))


@given(st.lists(st.integers(0, 2_000_000), min_size=1, max_size=300), st.integers(1, 1_000_000))
def test_every_row_is_in_one_of_few_bins(lengths: list[int], seq_len: int) -> None:
    histogram = length_histogram(np.array(lengths, np.int32), seq_len)
    edges, counts = histogram["edges"], histogram["counts"]
    assert sum(counts) == len(lengths) and 1 <= len(counts) <= 26
    assert edges == sorted(set(edges)) and edges[0] <= min(lengths) and max(lengths) < edges[-1]
