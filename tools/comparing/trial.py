"""One run of the comparison: trained by the library call that `qlora-train train` makes, measured, and put away."""

from __future__ import annotations

import gc
import hashlib
import json
import random
import shutil
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from comparing.entrants import RECIPES, Entrant

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "runs" / "compare"
Stage = Literal["search", "final", "spelling", "expert"]


class OverTime(Exception):
    """A run took longer than a run of the comparison may."""


class Failed(Exception):
    """A run has no result; the message says why."""


@dataclass(frozen=True)
class Scale:
    """How much of the data a comparison takes. Rows are training rows; the held-out ones are those of the recipe."""

    name: str
    search_rows: int  # of the training rows: what the rates are tried on
    choose_rows: int  # others of the training rows: what a rate is chosen by, so that no held-out row is looked at
    final_rows: int | None  # None: all
    held_out_rows: int | None
    seeds: tuple[int, ...]
    answers: int  # 0: none are generated
    spelling_rows: int
    spelling_answers: int


FULL = Scale("full", 300, 150, None, None, (0, 1), 64, 1600, 500)
SAMPLE = Scale("sample", 60, 30, 96, 32, (0,), 0, 300, 50)


@dataclass(frozen=True)
class Trial:
    """What is asked of one run."""

    stage: Stage
    entrant: Entrant
    learning_rate: float
    seed: int
    scale: Scale
    threads: int
    work: Path = WORK  # where runs and their rows are kept
    shared: tuple[str, ...] = ()  # recipe keys that every entrant gets
    experts: tuple[Path, ...] = ()
    half: int | None = None  # of the rows, for an expert
    for_search: bool = False  # the expert is one of a search: its rows are among those that rates are tried on

    @property
    def name(self) -> str:
        """For people, and for the run folder."""
        half = "" if self.half is None else f"-half{self.half}{'-search' if self.for_search else ''}"
        return f"{self.stage}-{self.entrant.name}-{self.learning_rate:.3g}-seed{self.seed}{half}"

    @property
    def run_dir(self) -> Path:
        """Where it is trained."""
        return self.work / "runs" / self.scale.name / self.name

    @property
    def recipe(self) -> Path:
        """The recipe that it changes; its adapter is left to the entrant."""
        name = "spelling.yaml" if self.stage == "spelling" else "quickstart.yaml"
        return without_adapter(RECIPES / name, self.work)

    def overrides(self) -> list[str]:
        """What is changed in the recipe, but for the run folder."""
        said = [
            *self.entrant.overrides,
            f"train.learning_rate={self.learning_rate!r}",
            "train.checkpointing=none",
            "train.resident_layers=0",  # so that memory is the method's, not what is spent for speed
            "train.compile=false",
            "train.save_every=0",
            "eval.every=0",
            "eval.generate_rows=0",  # answers come later, from the adapter as it was saved
            f"run.seed={self.seed}",
            f"run.threads={self.threads}",
        ]
        if self.experts:
            said.append(f"adapter.experts={json.dumps([str(folder) for folder in self.experts])}")
        return [*said, *self._data(), *self.shared]

    def _data(self) -> list[str]:
        if self.stage == "spelling":
            return [f"data.max_train_rows={self.scale.spelling_rows}"]
        if self.stage == "search":
            train, choose = search_files(self.scale, self.work)
            return [f"data.train=[{json.dumps(str(train))}]", f"data.eval=[{json.dumps(str(choose))}]"]
        files = []
        if self.half is not None:
            rows = half_file(self.half, self.work, self.scale.search_rows if self.for_search else None)
            files = [f"data.train=[{json.dumps(str(rows))}]"]
        most = {"max_train_rows": self.scale.final_rows, "max_eval_rows": self.scale.held_out_rows}
        return files + [f"data.{key}={count}" for key, count in most.items() if count is not None]

    def settings(self) -> dict[str, Any]:
        """What the figures depend on besides the code: the key of the ledger."""
        from qlora_train.artifacts.files import sha256_file

        train = RECIPES / "data" / ("spelling" if self.stage == "spelling" else "shell") / "train.jsonl"
        return {
            "stage": self.stage,
            "entrant": self.entrant.name,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "half": self.half,
            "for_search": self.for_search,
            "scale": {key: value for key, value in asdict(self.scale).items() if key != "seeds"},
            "threads": self.threads,
            "keys": [*self.entrant.overrides, *self.shared],
            "rows": sha256_file(train)[:16],
            "recipe": _recipe_digest(self.recipe),
        }


def without_adapter(recipe: Path, work: Path) -> Path:
    """A copy of a recipe that says nothing of the adapter: methods refuse keys that they do not read."""
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    del settings["adapter"]
    for key in ("train", "eval"):
        settings["data"][key] = [str(recipe.parent / path) for path in settings["data"][key]]
    return _written(work / "recipes" / recipe.name, yaml.safe_dump(settings, sort_keys=False))


def _recipe_digest(recipe: Path) -> str:
    """Of what a recipe says, wherever its rows lie, which have a digest of their own."""
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    settings["data"] |= {key: [Path(path).name for path in settings["data"][key]] for key in ("train", "eval")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def search_files(scale: Scale, work: Path) -> tuple[Path, Path]:
    """Rows of the training set to try rates on, and others of it to choose one by; written where they are missing."""
    rows = _shuffled_rows()
    cut, end = scale.search_rows, scale.search_rows + scale.choose_rows
    return _rows_file(rows[:cut], work), _rows_file(rows[cut:end], work)


def half_file(half: int, work: Path, num_rows: int | None = None) -> Path:
    """One half of the training set, or of its first `num_rows`, which are those of `search_files`."""
    return _rows_file(_shuffled_rows()[:num_rows][half::2], work)


def _shuffled_rows() -> list[str]:
    """The lines of the training set of `shell` in an order of seed 0."""
    lines = (RECIPES / "data" / "shell" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(lines)
    return lines


def _rows_file(lines: list[str], work: Path) -> Path:
    text = "\n".join(lines) + "\n"
    name = f"{len(lines)}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
    return _written(work / "data" / name, text)


def _written(path: Path, text: str) -> Path:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path


class _Deadline:
    """A reporter that says nothing, and ends a run that takes too long."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s, self._started = limit_s, time.perf_counter()
        self.warnings: list[str] = []

    def message(self, text: str) -> None:
        """Nothing."""

    def warning(self, text: str) -> None:
        """Kept."""
        self.warnings.append(text)

    def evaluation(self, step: int, loss: float) -> None:
        """Nothing."""

    def step(self, progress: Any) -> None:
        """Raise OverTime where the run is over its time."""
        if (took := time.perf_counter() - self._started) > self._limit_s:
            raise OverTime(f"{took:.0f} s at step {progress.step} of {progress.num_steps}")


def run_trial(trial: Trial, *, limit_s: float) -> dict[str, Any]:
    """Train and measure. Failed where the run diverged, was refused, or took longer than `limit_s`.

    A search is judged by the loss alone. The others are loaded again from their folder; `final` answers and exports.
    """
    from qlora_train import api
    from qlora_train.errors import MachineError, NumericsError, UserError

    shutil.rmtree(trial.run_dir, ignore_errors=True)
    reporter = _Deadline(limit_s)
    overrides = [*trial.overrides(), f"run.dir={json.dumps(str(trial.run_dir))}"]
    try:
        trained = api.train(trial.recipe, overrides, reporter=reporter)
        assert trained.base is not None and trained.adapter is not None
        result: dict[str, Any] = {
            "loss": trained.adapter.loss,
            "base_loss": trained.base.loss,
            "num_steps": trained.num_steps,
            "num_trainable": trained.num_trainable,
            "memory_bytes": trained.measured_memory_bytes,
            "wall_s": trained.wall_s,
            "warnings": reporter.warnings,
        }
        if trial.stage in ("final", "spelling"):
            result |= _answers(trial)
        if trial.stage == "final" and trial.seed == trial.scale.seeds[0]:
            result |= _export(trial)
    except NumericsError as error:
        raise Failed(f"diverged: {error}") from error
    except MachineError as error:  # disk, memory, a lock: no fault of the method
        raise Failed(f"machine: {error}") from error
    except UserError as error:
        raise Failed(f"refused: {error}") from error
    except OverTime as error:
        raise Failed(f"over time: {error}") from error
    except Exception as error:  # of one method: the others are still compared, and the table says so
        raise Failed(crash_text(error)) from error
    finally:
        gc.collect()
        if trial.stage != "expert":
            shutil.rmtree(trial.run_dir, ignore_errors=True)
    return result


def crash_text(error: Exception) -> str:
    """What a method broke with, and the last place of ours that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    last = next((frame for frame in reversed(frames) if "qlora_train" in frame.filename), frames[-1])
    return f"crashed: {type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"


def _answers(trial: Trial) -> dict[str, Any]:
    """Generated answers of the adapter as it was saved, against the references."""
    from qlora_train.evaluate.sides import questions_of, score_side
    from qlora_train.evaluate.validation import Validation
    from qlora_train.model.causal import CausalModel
    from qlora_train.model.trained import load_trained, open_run

    count = trial.scale.spelling_answers if trial.stage == "spelling" else trial.scale.answers
    if not count:
        return {"scores": None}
    run = open_run(trial.run_dir, [f"eval.generate_rows={count}"], sections=("eval",))
    trained = load_trained(run)
    split = run.load_split("eval", trained.tokenizer)
    questions = questions_of(split, trained.tokenizer, count)
    known = Validation(0.0, 1.0, 0, 0)  # the loss was measured by the run
    section = run.recipe.eval
    scores = score_side(
        CausalModel(trained.model), trained.tokenizer, split, section, validation=known, questions=questions
    ).scores
    return {"scores": None if scores is None else asdict(scores)}


def _export(trial: Trial) -> dict[str, Any]:
    """How far the merged model is from the trained one; the reason where it cannot be merged."""
    from qlora_train import api
    from qlora_train.errors import UserError

    target = trial.run_dir.with_name(f"{trial.name}-export")
    shutil.rmtree(target, ignore_errors=True)
    try:
        verdict = api.export(trial.run_dir, target).verdict
    except UserError as error:
        return {"export": {"refused": str(error)}}
    except Exception as error:  # what was trained is measured by now
        return {"export": {"crashed": crash_text(error)}}
    finally:
        shutil.rmtree(target, ignore_errors=True)
    merged, effect = verdict.merged, verdict.adapter_off.mean_kl
    return {"export": {"kl": merged.mean_kl, "effect_kl": effect, "top1_agreement": merged.top1_agreement}}
