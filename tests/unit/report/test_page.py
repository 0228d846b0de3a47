"""The page as its reader and a browser take it: its figures are those of the run folders, and nothing on it acts."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qlora_train.artifacts.layout import RunDir
from qlora_train.errors import MachineError, RecipeError
from qlora_train.report.answers import answer_groups
from qlora_train.report.facts import RunFacts, read_runs
from qlora_train.report.page import MAX_RUNS, render_page
from qlora_train.report.run import write_report
from qlora_train.report.story import Tile, comparability, sentence, tiles
from qlora_train.report.tables import Row, merge_rows
from tests.runfolders import RECIPE, evaluation, export_line, rewrite, write_run

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Visible texts, tags, and the cells of every table by their row and column headers."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[dict[str, list[str]]] = []  # row header -> cells, for each table
        self.sections: dict[str, str] = {}
        self._open: list[str] = []
        self._section = "head"
        self._header: str | None = None
        self.feed(html)
        self.close()
        assert self._open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "section":
            self._section = attributes["id"] or ""
        elif tag == "table":
            self.tables.append({})
        elif tag == "th" and attributes.get("scope") == "row":
            self._header = ""
        elif tag == "td" and self._header is not None:
            self.tables[-1].setdefault(self._header.strip(), []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "tr":
            self._header = None

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.sections[self._section] = self.sections.get(self._section, "") + data + " "
        if self._header is not None and "td" in self._open:
            self.tables[-1][self._header.strip()][-1] += data
        elif self._header is not None and "th" in self._open:
            self._header += data

    def text(self, section: str) -> str:
        return " ".join(self.sections[section].split())

    def row(self, header: str) -> list[str]:
        """The cells of the first row with this header."""
        return next(table[header] for table in self.tables if header in table)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Never write into it."""
    return write_run(tmp_path_factory.mktemp("page") / "run")


@pytest.fixture
def own(tmp_path: Path, folder: Path) -> RunDir:
    """A copy to change."""
    return RunDir(Path(shutil.copytree(folder, tmp_path / "run")))


def page_of(*folders: Path) -> Page:
    return Page(render_page(read_runs(folders)))


def facts_of(run_dir: RunDir) -> RunFacts:
    (facts,) = read_runs([run_dir.root])
    return facts


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return render_page(read_runs([folder]))


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_the_head_tells_the_story(page: Page) -> None:
    head = page.text("head")
    assert "model-a in NF4 with LoRA (r = 4, alpha = 8), trained on 117 rows. Complete: 40 steps in 10.0 s." in head
    assert "The loss on held-out rows fell from 3.250 to 1.500 nats per supervised token." in head
    for tile in ("3.250 → 1.500", "12.5 % → 75.0 %", "0.344 → 0.812", "3,840", "10.0 s", "verified"):
        assert tile in head, tile
    assert "KL from the trained model: 0.01 % of the adapter's effect" in head


def test_figures_are_those_of_the_run_folder(page: Page) -> None:
    for header, cell in {
        "Held-out loss, base → adapter": "3.250 → 1.500",
        "Measured on": "12 rows, 345 supervised tokens",
        "Supervised tokens trained": "1,620",
        "Speed": "384.0 tokens/s",
        "Peak memory": "1.50 GiB",
        "Trainable parameters": "1,234 (1.2 % of all)",
        "Merge": "accepted: KL is 0.01 % of the adapter's effect",
        "Rows in the sources": "120",
        "dropped": "3",
        "Tokens lost": "99 (2.5 %)",
        "Batches": "packed: 40 packs an epoch, 1.0 % padding",
        "whose prompt is asked in training": "1 of 12 rows",
        "KL from the trained model (nats per token)": "0.0002; adapter off: 2",
        "Loss": "1.501; adapter off: 3.250",
        "torch": "2.15.0",
        "Base: all tensors as held": "ba5eba5eba5eba5e",
    }.items():
        assert page.row(header) == [cell], header
    assert page.row("adapter.alpha") == ["8.0", "command line"]
    assert page.row("# tokens, seq_len is #") == ["dropped", "3"]


def test_memory_stands_by_cause_beside_what_was_measured(page: Page) -> None:
    assert page.row("training") == ["800 MiB", "808 MiB", "+1.0 %"]
    assert page.row("evaluation") == ["300 MiB", "360 MiB", "+20.0 %"]
    assert page.row("generation (at most)") == ["400 MiB", "300 MiB", "-25.0 %"]
    assert page.row("activations") == ["500 MiB", "508 MiB", "0", "60 MiB", "100 MiB", "0"]
    assert page.row("all") == ["800 MiB", "808 MiB", "300 MiB", "360 MiB", "400 MiB", "300 MiB"]
    far = [row for row in page.of("tr") if row.get("class") == "bad"]
    assert len(far) == 1, "less than an upper bound is no miss"
    text = page.text("memory")
    assert "evaluation held 20 % more than planned" in text and "1.00 GiB more than before the model" in text
    assert "A checkpoint takes 5 MiB and 0.2 s to save." in text and "checkpoints 1.00 GiB" in text


def test_factors_that_did_not_train_are_not_called_random_at_the_start(html: str, folder: Path) -> None:
    """Of MiLoRA, AdaLoRA and others the file gives one product of two factors; of plain LoRA, what trained."""
    (run,) = read_runs([folder])
    assert run.adapter and run.adapter.trains_factors and "Random at the start of plain LoRA" in html
    folded = render_page([replace(run, adapter=replace(run.adapter, trains_factors=False))])
    assert "at the start of plain LoRA" not in folded and folded.count("what trained were others") == 2


def test_norms_are_those_of_the_adapter(page: Page, folder: Path) -> None:
    (run,) = read_runs([folder])
    assert run.adapter
    for norm in run.adapter.norms:
        cells = [f"{value:.4g}" for value in (norm.lora_A, norm.lora_B, norm.delta_weight)]
        assert page.row(norm.module) == cells
    titles = page.text("adapter")
    q_of_1 = next(norm for norm in run.adapter.norms if norm.module == "layers.1.q_proj")
    assert f"layer 1, q_proj: {q_of_1.delta_weight:.4g}" in titles, "a cell says its value when one points at it"


def test_answers_are_shown_side_by_side_with_the_losers(page: Page) -> None:
    text = page.text("answers")
    assert "Of 8 answers 6 are nearer to the reference than the base's, 1 as near, 1 farther." in text
    first, gained, lost = re.split("where the answer gained most|where the answer lost most", text)
    assert [f"question {index}" in first for index in range(8)] == [True] * 4 + [False] * 4
    assert "question 4" in gained and "question 7" not in gained
    assert re.search(r"question 7 base exact answer 7 adapter 0.25 worse reference answer 7", lost)


def test_everything_has_a_name_for_those_who_do_not_see_it(page: Page) -> None:
    labels = [figure["aria-label"] or "" for figure in page.of("svg")]
    assert len(labels) == len(set(labels)) == 8 and all(figure["role"] == "img" for figure in page.of("svg"))
    assert any("training from 5 at step 1 to 1.1, held out 3.25 at step 0, 1.5 at step 40" in label for label in labels)
    assert all(header.get("scope") in ("row", "col", "colgroup") for header in page.of("th"))
    identifiers = [identifier for _, attributes in page.tags if (identifier := attributes.get("id"))]
    assert len(identifiers) == len(set(identifiers)), "figures do not share ids"
    targets = {link["href"] for link in page.of("a")}
    assert targets <= {f"#{identifier}" for identifier in identifiers}


def test_nothing_on_the_page_acts_or_comes_from_elsewhere(html: str, page: Page) -> None:
    assert "default-src 'none'; style-src 'unsafe-inline'" in html
    assert not page.of("script") and not page.of("img") and not page.of("link") and not page.of("iframe")
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "@import" not in html and set(re.findall(r"url\((.)", html)) <= {"#"}
    assert not re.search(r"#a000\d\d", html), "every stand-in colour became one of the page's"


def test_hostile_texts_are_shown_and_do_nothing(own: RunDir) -> None:
    hostile = "</style><script>alert(1)</script>\x1b[2J\u202egnp.exe\x00 $x_1$ {{ 7*7 }} https://u:geheim12@host"
    texts = evaluation()
    texts["adapter"]["answers"][0]["text"] = hostile
    texts["base"]["answers"][0]["asked"] = texts["adapter"]["answers"][0]["asked"] = hostile
    own.evaluation.write_text(json.dumps(texts))
    own.recipe.write_text(RECIPE.replace("tiny/model-a", json.dumps(hostile)), encoding="utf-8")
    rewrite(own.base, source={"name": hostile})
    split = {**json.loads(own.data.read_text())["splits"][0]}
    split["reasons"] = [{"fate": "dropped", "reason": hostile, "count": 3}]
    split["sources"] = [{**split["sources"][0], "name": hostile}]
    rewrite(own.data, splits=[split], files=[{"name": hostile, "sha256": "ab" * 32}])
    html = render_page(read_runs([own.root]))
    page = Page(html)
    assert not page.of("script")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", html), "no character that acts"
    assert "[secret]@host" in page.text("head") and "alert(1)</script>" in page.text("recipe")
    for section in ("answers", "data", "evidence"):
        assert "alert(1)</script>\\x1b[2J\\u202egnp.exe\\x00 $x_1$ {{ 7*7 }} https://[secret]@host" in page.text(
            section
        )


def test_long_answers_are_cut_and_say_so(own: RunDir) -> None:
    texts = evaluation()
    texts["adapter"]["answers"][0]["text"] = "x" * 5_000
    own.evaluation.write_text(json.dumps(texts))
    (first, *_), *_ = (group.shown for group in answer_groups([facts_of(own)]))
    assert first.written[1].text == "x" * 1_200 + "... (3,800 characters more)"


def test_thousands_of_steps_make_no_large_page(own: RunDir) -> None:
    """Spikes stay: the highest gradient norm of 20,000 steps is on the curve."""
    lines = [json.loads(line) for line in own.metrics.read_text().splitlines()][:1]
    many = [{**lines[0], "step": step, "grad_norm": 1.0 + (step == 12_345) * 9} for step in range(1, 20_001)]
    own.metrics.write_text("".join(json.dumps(line) + "\n" for line in many))
    html = render_page(read_runs([own.root]))
    assert len(html) < 200_000
    curve = re.search(r'aria-label="Gradient norm.*?</svg>', html, re.DOTALL)
    assert curve
    heights = [float(y) for path in re.findall(r' d="(M[^"]*)"', curve[0]) for y in re.findall(r"[ML] \S+ (\S+)", path)]
    assert min(heights) < 40 < 150 < max(heights), "of 220 units"


@pytest.mark.parametrize("keep", [("recipe",), ("recipe", "metrics", "data"), ("recipe", "metrics", "evaluation")])
def test_an_unfinished_run_gets_a_page_that_names_what_is_missing(own: RunDir, keep: tuple[str, ...]) -> None:
    kept = {getattr(own, name) for name in keep}
    for path in own.root.iterdir():
        if path not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if own.evaluation in kept:
        rewrite(own.evaluation, adapter=None)
    page = page_of(own.root)
    head = page.text("head")
    assert "run.json is absent: the run has not ended" in head and "there is no adapter yet" in head
    assert ("Unfinished: step 40 of 40" in head) == (own.data in kept)
    assert ("metrics.jsonl holds no step" in head) == (own.metrics not in kept)
    assert ("fell from 3.250 to 1.500 nats per supervised token at step 40" in head) == (own.evaluation in kept)
    assert len(page.of("svg")) == (4 if own.metrics in kept else 0)
    assert "There is no adapter to read." in page.text("adapter")


def test_memory_that_ran_out_heads_the_page(own: RunDir) -> None:
    own.summary.unlink()
    failed = {
        "where": "at step 7 of 40",
        "phase": "training",
        "requested": 2**30,
        "held": 2**31,
        "message": "bad_alloc",
    }
    rewrite(own.memory, out_of_memory=failed, phases=[])
    page = page_of(own.root)
    assert "Out of memory: step 40 of 40" in page.text("head")
    memory = "Memory ran out at step 7 of 40: 2.00 GiB were in use, and 1.00 GiB more were asked for. bad_alloc"
    assert memory in page.text("memory")


def test_a_refused_merge_is_bad_news(own: RunDir) -> None:
    sha256 = json.loads(own.exports.read_text())["adapter_sha256"]
    own.exports.write_text(json.dumps(export_line(sha256, accepted=False)) + "\n")
    facts = facts_of(own)
    assert merge_rows([facts])[0] == Row("Verdict", ("refused: nothing was published",))
    note = "KL from the trained model: 25 % of the adapter's effect, more than 1 %"
    assert tiles(facts)[-1] == Tile("refused", "merge", note, bad=True)


def test_an_adapter_that_made_it_worse_is_not_praised(own: RunDir) -> None:
    texts = evaluation()
    texts["adapter"]["loss"] = 4.0
    own.evaluation.write_text(json.dumps(texts))
    facts = facts_of(own)
    assert "The loss on held-out rows rose from 3.250 to 4.000" in sentence(facts)
    assert [tile.label for tile in tiles(facts) if tile.bad] == ["held-out loss"]


def test_runs_stand_side_by_side(own: RunDir, folder: Path, tmp_path: Path) -> None:
    other = own.root.rename(tmp_path / "other")
    (other / "memory.json").unlink()
    (other / "recipe.resolved.yaml").write_text(RECIPE.replace("0.01", "0.02"), encoding="utf-8")
    rewrite(other / "data.json", files=[{"name": "x", "sha256": "cd" * 32}])
    rewrite(other / "environment.json", versions={"torch": "2.16.0"})
    page = page_of(folder, other)
    head = page.text("head")
    assert "2 runs side by side" in head and "do not compare" not in head, "the same rows"
    assert "Training losses are over different rows" in head
    assert re.search("why: other memory.json is absent", head), (
        "what is missing is said of the run that it is missing of"
    )
    assert page.row("Held-out loss, base → adapter") == ["3.250 → 1.500"] * 2
    assert page.row("train.learning_rate") == ["0.01", "0.02"]
    assert next(table for table in page.tables if "train.learning_rate" in table).keys() == {"train.learning_rate"}
    assert page.row("torch") == ["2.15.0", "2.16.0"] and page.row("peft") == ["0.21.2", "-"]
    assert re.search("question 0 base 0.25 nothing run exact answer 0 other exact answer 0", page.text("answers"))
    loss = next(figure["aria-label"] or "" for figure in page.of("svg"))
    assert "run: training from 5" in loss and "other: training from 5" in loss


@pytest.mark.parametrize(
    ("measured_on", "expected"),
    [
        (
            {"rows": "beef" * 16},
            "Held-out figures do not compare.*run on rows f00df00df00df00d; other on rows beefbeef",
        ),
        ({}, "Held-out figures do not compare.*other on rows that were not recorded"),
        ({"rows": "f00d" * 16, "generate_rows": 4}, "Exact match and similarity do not compare"),
    ],
)
def test_runs_on_other_rows_are_marked(
    own: RunDir, folder: Path, tmp_path: Path, measured_on: dict[str, Any], expected: str
) -> None:
    rewrite(own.evaluation, measured_on=measured_on)
    rewrite(own.data, files=[{"name": "x", "sha256": "cd" * 32}])
    figures, files = comparability(read_runs([folder, own.root.rename(tmp_path / "other")]))
    assert re.search(expected, figures)
    assert "Training losses are over different rows" in files


def test_the_page_lies_in_the_run_folder_and_is_written_again(own: RunDir) -> None:
    result = write_report([own.root], None)
    assert result.page == own.report_page and result.num_bytes == own.report_page.stat().st_size
    (run,) = result.runs
    assert (run.base_loss, run.adapter_loss, run.merge_accepted, run.is_complete) == (3.25, 1.5, True, True)
    assert write_report([own.root], None).page.read_bytes() == own.report_page.read_bytes()


def test_a_file_that_is_no_page_of_ours_stays(own: RunDir, tmp_path: Path) -> None:
    target = tmp_path / "notes.html"
    target.write_text("<html>mine</html>")
    with pytest.raises(RecipeError, match="no report page"):
        write_report([own.root], target)
    assert target.read_text() == "<html>mine</html>"
    with pytest.raises(RecipeError, match="is a folder"):
        write_report([own.root], tmp_path)
    with pytest.raises(MachineError, match="cannot write"):
        write_report([own.root], tmp_path / "missing" / "page.html")


def test_more_runs_than_can_be_told_apart_are_refused(own: RunDir) -> None:
    with pytest.raises(RecipeError, match=f"at most {MAX_RUNS}"):
        write_report([own.root] * (MAX_RUNS + 1), None)
    with pytest.raises(RecipeError, match="no run was named"):
        write_report([], None)
