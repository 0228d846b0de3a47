"""What happened to a run: in order, with both sides of a change, marked in the curves; else nothing is shown of it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora_train.artifacts.folders import publishing
from qlora_train.artifacts.layout import RunDir
from qlora_train.report.facts import RunFacts, read_runs
from qlora_train.report.flights import MOST_ROWS, flight_views
from qlora_train.report.happened import MOST_OF_A_KIND, Happening, ending, happenings, numbered
from qlora_train.report.page import render_page
from qlora_train.report.story import sentence
from tests.runfolders import (
    NUM_STEPS,
    clock,
    end_line,
    resume_line,
    spike,
    train_line,
    write_flight,
    write_history,
    write_lines,
    write_run,
)

HOSTILE = "</td><script>alert(1)</script>\x1b[2J\u202egnp {{ 7*7 }} https://u:geheim12@host"
SHOWN = "</td><script>alert(1)</script>\\x1b[2J\\u202egnp {{ 7*7 }} https://[secret]@host"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run to which nothing happened. Never write into it."""
    return write_run(tmp_path_factory.mktemp("happened") / "run")


@pytest.fixture
def own(tmp_path: Path, folder: Path) -> RunDir:
    """A copy to change."""
    return RunDir(Path(shutil.copytree(folder, tmp_path / "run")))


def facts_of(run_dir: RunDir) -> RunFacts:
    (facts,) = read_runs([run_dir.root])
    return facts


def end_at(run_dir: RunDir, step: int) -> None:
    """The run did not come farther than this step."""
    run_dir.summary.unlink()
    run_dir.metrics.write_text("")
    write_lines(run_dir.metrics, *map(train_line, range(1, step + 1)))


def told(rows: list[Happening]) -> list[tuple[str, str]]:
    return [(row.steps, row.what) for row in rows]


def text_of(html: str) -> str:
    """What a reader sees, but for the style sheet."""
    body = html.partition("<body>")[2]
    shown = re.sub(r"<[^>]*>", " ", body)
    for name, char in (("lt", "<"), ("gt", ">"), ("#39", "'"), ("#34", '"'), ("amp", "&")):
        shown = shown.replace(f"&{name};", char)
    return " ".join(shown.split())


def test_a_run_to_which_nothing_happened_shows_nothing(folder: Path) -> None:
    html = render_page(read_runs([folder]))
    assert 'id="happened"' not in html and 'href="#happened"' not in html and "came to no finite number" not in html
    assert "What the run ended with" not in html and "marks:" not in html


def test_everything_stands_in_its_order_with_both_sides(own: RunDir) -> None:
    """Events by step, errors and resumes by time; a refusal that came twice is one row."""
    write_history(own)
    run = facts_of(own)
    assert run.notes == ()
    rows = happenings(run)
    assert told(rows) == [
        ("7", "Loss spike"),
        ("10", "Stopped by SIGTERM"),
        ("-", "Refused (resume)"),
        ("10", "Resumed"),
        ("21", "Stopped by a number that is not finite"),
        ("20", "Forked"),
        ("30-31", "Loss spike"),
    ]
    assert rows[0].details == (
        "loss 9.5; the steps before let expect at most 2.5",
        "rows 0, 1, 2, 3 of /data/rows.jsonl; and 2 more",
    )
    assert rows[2].details == (
        "train.epochs: 1 at the checkpoint, 2 now",
        "Fix: restore it",
        "2 times, last at 2026-11-22 17:12",
    )
    assert rows[3].details == ("from the checkpoint of step 10: bit for bit the undisturbed run (D2)",)
    assert rows[5].details == (
        "from the checkpoint of step 20: another course from here on (D0)",
        "train.learning_rate: 0.01 → 0.005",
        "the training data: abababababababab → cdcdcdcdcdcdcdcd",
        "threads: 2 → 1",
    )
    assert rows[6].details[0] == "loss up to 8; the steps before let expect at most 2.5"
    assert ending(run) is None, "it went on, and ended well"


def test_the_same_end_before_and_after_a_resume_is_two(own: RunDir) -> None:
    end_at(own, 20)
    write_lines(own.errors, *(end_line("memory", 9, minute, 20, "out of memory") for minute in (10, 30)))
    write_lines(own.resumes, resume_line(10, 20))
    assert told(happenings(facts_of(own))) == [("20", "Out of memory"), ("10", "Resumed"), ("20", "Out of memory")]


def test_the_page_has_them_as_a_table_and_as_marks(own: RunDir) -> None:
    write_history(own)
    html = render_page(read_runs([own.root]))
    section = html.partition('<section id="happened">')[2].partition("</section>")[0]
    assert re.search(r'<th scope="row" class="n">6</th><td class="n">20</td><td><strong>Forked</strong>', section)
    assert "train.learning_rate: 0.01 → 0.005" in section and "2026-11-22 17:40" in section
    loss = re.search(r'aria-label="Loss over the steps.*?</svg>', html, re.DOTALL)
    assert loss and "marks: 1 at step 7, 2 at step 10, 4 at step 10, 5 at step 21" in loss[0]
    for chart in ("Loss", "Learning rate", "Gradient norm", "Tokens per second"):
        figure = re.search(rf'aria-label="{chart} over the steps.*?</svg>', html, re.DOTALL)
        assert figure and [found for found in ("1", "2, 4", "5, 6", "7") if f">{found}</text>" in figure[0]] == [
            "1",
            "2, 4",
            "5, 6",
            "7",
        ], chart
    details = re.search(r"<details[^>]*><summary>Step 21 came to no finite number", html)
    assert details and "open" not in details[0], "the run went on from there"


def test_a_run_that_died_begins_with_the_reason_and_the_way_out(own: RunDir) -> None:
    end_at(own, 20)
    write_flight(own, 21)
    what = "step 21: loss nan; recorded in /x/flight/step-000021"
    write_lines(own.errors, end_line("numerics", 7, 30, 20, what, "lower train.learning_rate"))
    run = facts_of(own)
    assert "Stopped by a number that is not finite: step 20 of 40" in sentence(run)
    assert told(happenings(run))[-1] == ("21", "Stopped by a number that is not finite")
    html = render_page([run])
    head = text_of(html).partition("Course of the training")[0]
    assert f"What the run ended with: {what} Fix: lower train.learning_rate" in head
    assert re.search(r"<details[^>]* open><summary>Step 21 came to no finite number", html)


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("signal", 143, "Stopped by SIGTERM"),
        ("memory", 9, "Out of memory"),
        ("machine", 6, "Stopped by the machine"),
        ("bug", 1, "Stopped by a fault of qlora-train"),
        ("resume", 5, "Unfinished"),
        ("unheard of", 1, "Unfinished"),
    ],
)
def test_how_it_ended_is_the_state_of_the_run(own: RunDir, kind: str, code: int, words: str) -> None:
    """A refused resume leaves the run as it was."""
    end_at(own, 12)
    write_lines(own.errors, end_line(kind, code, 30, 12, "what"))
    assert f"{words}: step 12 of 40" in sentence(facts_of(own))


def test_a_run_that_goes_on_has_not_ended(own: RunDir) -> None:
    """By a resume, or by steps that were logged since, as after a start from the beginning."""
    end_at(own, 12)
    write_lines(own.errors, end_line("signal", 143, 30, 12, "SIGTERM"))
    assert ending(facts_of(own)) is not None
    write_lines(own.metrics, train_line(13))
    assert ending(facts_of(own)) is None
    end_line_of_now = end_line("signal", 143, 31, 13, "SIGTERM")
    write_lines(own.errors, end_line_of_now)
    assert ending(facts_of(own)) is not None
    write_lines(own.resumes, resume_line(13, 32))
    assert ending(facts_of(own)) is None


def test_an_event_belongs_to_the_last_part_that_passed_its_step(own: RunDir) -> None:
    """After a resume from step 5, what came of step 8 is of the second part."""
    write_lines(own.metrics, spike(3), spike(8))
    write_lines(own.resumes, resume_line(20, 10), resume_line(5, 20))
    assert [row.steps for row in happenings(facts_of(own))] == ["3", "20", "5", "8"]


def test_a_replay_is_told_where_it_was_made_and_marks_no_curve(own: RunDir) -> None:
    """Between the stop and the resume; with both sides of what the machine has changed, and the distance."""
    end_at(own, 20)
    write_lines(own.errors, end_line("signal", 143, 10, 20, "SIGTERM"))
    write_lines(own.resumes, resume_line(20, 30))
    steps = [{"step": step, "loss_distance": step * 1e-7} for step in (19, 20)]
    threads = {"key": "threads", "old": 2, "new": 1}
    line = {"time": clock(20), "level": "D1", "from_step": 18, "steps": steps, "rounding": [threads]}
    other = {**line, "time": clock(40), "level": "D0", "steps": steps[:1], "compared_with": 19, "same_adapter": False}
    write_lines(own.replays, line, other, {**line, "steps": []})
    run = facts_of(own)
    rows = happenings(run)
    assert [(row.what, row.step, row.is_bad) for row in rows] == [
        ("Stopped by SIGTERM", 20, False),
        ("Replayed", None, False),
        ("Resumed", 20, False),
        ("Replayed otherwise", None, True),
    ]
    assert rows[1].details == (
        "steps 19 to 20 made again from the checkpoint of step 18: the same rows in the same order, with other "
        "rounding (D1)",
        "losses up to 2.0e-06 apart",
        "threads: 2 → 1",
    )
    assert "the adapter and that of the checkpoint of step 19: not equal" in rows[3].details
    assert any(note.startswith("replays.jsonl: 1 line is damaged") for note in run.notes)
    assert "steps 19 to 20 made again" in text_of(render_page([run]))


def test_a_record_that_no_error_tells_of_is_told(own: RunDir) -> None:
    """As where errors.jsonl is lost: before the resume that made the step anew."""
    write_flight(own, 21)
    write_lines(own.resumes, resume_line(10, 10), resume_line(20, 20))
    assert told(happenings(facts_of(own)))[1] == ("21", "Stopped by a number that is not finite")
    end_at(own, 20)
    assert told(happenings(facts_of(own)))[-1] == ("21", "Stopped by a number that is not finite")


def test_of_many_few_are_shown(own: RunDir) -> None:
    write_lines(own.metrics, *(spike(step) for step in range(1, 201, 2)))
    write_lines(own.resumes, resume_line(10, 10))
    rows = happenings(facts_of(own))
    spikes = [row for row in rows if row.what == "Loss spike"]
    assert len(spikes) == MOST_OF_A_KIND + 1 == len(rows) - 1
    hidden = spikes[MOST_OF_A_KIND // 2]
    assert (hidden.steps, hidden.details) == ("13-187", ("and 87 more of these",))
    assert (spikes[0].step, spikes[-1].step) == (1, 199)


def test_events_of_a_method_are_told_in_their_own_words(own: RunDir) -> None:
    lines = [
        {"kind": "event", "step": 4, "what": "dead adapter", "text": "no gradient reached 2 of the 14 layers"},
        {"kind": "event", "step": 9, "what": "ranks", "num_triplets": 12, "by_layer": {"q": 3}},
    ]
    write_lines(own.metrics, *lines)
    dead, ranks = happenings(facts_of(own))
    assert (dead.what, dead.details) == ("Dead adapter", ("no gradient reached 2 of the 14 layers",))
    assert (ranks.what, ranks.details) == ("Ranks", ("num triplets: 12", 'by layer: {"q": 3}'))


def test_the_norms_of_a_flight_name_what_grew(own: RunDir) -> None:
    """Both factors of a module are one; the median is over the steps kept."""
    write_flight(own, 21)
    (view,) = flight_views(facts_of(own))
    assert [(row.module, row.usual, row.last, row.now, row.value, row.grown) for row in view.modules] == [
        ("layers.1.q_proj", "4.24", "42.4", "nan", "8.49", "+50 %"),
        ("layers.0.q_proj", "4.24", "4.24", "nan", "8.49", "+50 %"),
    ]
    assert [row.step for row in view.steps] == ["18", "19", "20", "21"]
    assert (view.steps[-1].loss, view.steps[-1].grad_norm) == ("nan", "inf")
    assert [row.where[-1] for row in view.rows] == list("13579024"), "the micro-batch in which it was found comes first"
    assert (len(view.rows), view.num_more_rows) == (MOST_ROWS, 2)


def test_finite_gradients_come_after_the_others(own: RunDir) -> None:
    names = [f"layers.{layer}.q_proj.lora_{factor}" for layer in (0, 1) for factor in "AB"]
    write_flight(own, 21, this_step={"grad_norm_of": dict.fromkeys(names, 1.0) | {names[1]: "inf"}})
    (view,) = flight_views(facts_of(own))
    assert [(row.module, row.now) for row in view.modules] == [("layers.0.q_proj", "inf"), ("layers.1.q_proj", "1.41")]


def test_the_first_step_has_none_before_it(own: RunDir) -> None:
    write_flight(own, 1, first_not_finite=None)
    (view,) = flight_views(facts_of(own))
    assert view.num_before == 0 and {row.now for row in view.modules} == {"nan"}
    assert view.first == "" and len(view.steps) == 1


def test_hostile_texts_do_nothing(own: RunDir) -> None:
    row = {"where": HOSTILE, "micro_step": 0, "num_tokens": 3, "text": HOSTILE}
    norms = {"step": [], "loss": [], "grad_norm": [], "learning_rate": []}
    first = {"text": HOSTILE, "micro_step": 0}
    now = {"grad_norm_of": {HOSTILE: 1.0}}
    write_flight(own, 21, rows=[row], repeat=HOSTILE, first_not_finite=first, last_steps=norms, this_step=now)
    write_lines(own.metrics, {"kind": "event", "step": 9, "what": HOSTILE, "text": HOSTILE, HOSTILE: HOSTILE})
    own.summary.unlink()
    write_lines(own.errors, end_line("machine", 6, 30, NUM_STEPS, HOSTILE, HOSTILE))
    write_lines(own.resumes, resume_line(20, 10, fork={HOSTILE: (HOSTILE, [HOSTILE])}))
    html = render_page([facts_of(own)])
    assert "<script" not in html and not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", html)
    assert "geheim12" not in html and "49" not in re.findall(r"gnp (\S+)", text_of(html))
    assert text_of(html).count(SHOWN) >= 10


@pytest.mark.parametrize("name", ["resumes", "errors"])
@pytest.mark.parametrize(
    "line", ["[]", "{}", '{"time": "2026-11-22T17:00:00", "step": 1, "level": "D2", "kind": "k", "exit_code": 1}', "{"]
)
def test_damaged_lines_are_noted_and_left_out(own: RunDir, name: str, line: str) -> None:
    """A time without its zone is damage too: it has no place among the others."""
    write_history(own)
    path: Path = getattr(own, name)
    path.write_text(line + "\n" + path.read_text())
    run = facts_of(own)
    assert len(run.notes) == 1 and run.notes[0].startswith(f"{path.name}: 1 line is damaged and left out")
    assert len(happenings(run)) == 7


@pytest.mark.parametrize(
    "damage",
    [
        lambda flight: (flight / "flight.json").write_text("{}"),
        lambda flight: (flight / "flight.json").unlink(),
        lambda flight: (flight / "MANIFEST.json").unlink(),
    ],
)
def test_a_damaged_flight_record_is_noted(own: RunDir, damage: Any) -> None:
    write_flight(own, 21)
    damage(own.flight(21))
    run = facts_of(own)
    assert run.flights == () and run.notes[0].startswith("flight/step-000021 is damaged: "), run.notes
    assert happenings(run) == [] and flight_views(run) == []


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"{}", "step: Field required"),
        (b"\xff", "valid"),
        (b'{"step": 1, "loss": 1, "grad_norm": 1, "learning_rate": 1, "last_steps": {"step": [1]}}', "steps"),
    ],
)
def test_a_flight_record_of_another_shape_is_noted(own: RunDir, content: bytes, what: str) -> None:
    with publishing(own.flight(21), manifest={}) as folder:
        (folder / "flight.json").write_bytes(content)
    (note,) = facts_of(own).notes
    assert note.startswith("flight/step-000021 is damaged: ") and what in note


def test_runs_side_by_side_are_numbered_on(own: RunDir, folder: Path, tmp_path: Path) -> None:
    other = RunDir(Path(shutil.copytree(folder, tmp_path / "other")))
    quiet = RunDir(Path(shutil.copytree(folder, tmp_path / "quiet")))
    write_history(own)
    write_lines(other.resumes, resume_line(20, 10))
    runs = read_runs([own.root, quiet.root, other.root])
    first, none, last = numbered(runs)
    assert [row.number for row in first] == list(range(1, 8)) and none == () and [row.number for row in last] == [8]
    html = render_page(runs)
    section = html.partition('<section id="happened">')[2].partition("</section>")[0]
    assert section.count("<table") == 2 + 2, "of two runs, and of the flight record of one"
    assert "run: Step 21 came" in section and "quiet" not in section
    loss = re.search(r'aria-label="Loss over the steps.*?</svg>', html, re.DOTALL)
    assert loss and "8 at step 20" in loss[0] and ">5, 6, 8</text>" in loss[0]


def test_a_run_without_steps_has_the_table_alone(own: RunDir) -> None:
    end_at(own, 0)
    write_lines(own.errors, end_line("data", 3, 5, 0, "no rows"))
    html = render_page([facts_of(own)])
    assert "Refused (data)" in html and "upright lines" not in html
    assert json.loads(own.errors.read_text())["step"] == 0
    assert happenings(facts_of(own))[0].steps == "-"


def test_what_a_method_logs_has_curves_of_its_own(own: RunDir) -> None:
    """Gates share a chart; what is no number has none."""
    own.metrics.write_text("")
    figures = [
        {"num_triplets": 40 - step, "gate_0": 0.5, "gate_1": 0.25, "learning_rates": {"B": 1}, "odd<": float("nan")}
        for step in range(1, 21)
    ]
    write_lines(own.metrics, *({**train_line(step), **own} for step, own in enumerate(figures, 1)))
    html = render_page([facts_of(own)])
    labels = re.findall(r'aria-label="(Triplets left|Gates|Odd|Learning rates)', html)
    assert labels == ["Triplets left", "Gates"]
    assert "run: num_triplets from 39 to 20" in html and "run: gate_1 from 0.25 to 0.25" in html
