"""What a run folder says of its run. What is absent or damaged becomes a note: every run gets a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import ValidationError

from qlora_train.adapters.state import load_adapter_config
from qlora_train.artifacts.folders import manifest_faults, read_manifest
from qlora_train.artifacts.layout import RunDir
from qlora_train.errors import RecipeError, UserError
from qlora_train.report import shapes
from qlora_train.report.norms import ModuleNorm, module_norms
from qlora_train.report.words import plain

DEFAULT = "default"
_LINES: dict[str, type[shapes.Shape]] = {"train": shapes.TrainLine, "eval": shapes.EvalLine, "event": shapes.EventLine}
_S = TypeVar("_S", bound=shapes.Shape)


@dataclass(frozen=True)
class Setting:
    """One key of the recipe with its value as YAML, and where the value came from."""

    key: str
    value: str
    origin: str

    @property
    def is_default(self) -> bool:
        """Whether nobody set it."""
        return self.origin == DEFAULT


@dataclass(frozen=True)
class Adapter:
    """The published adapter, or that of the newest checkpoint where the run has not ended."""

    step: int
    is_published: bool
    sha256: str  # of its weights
    norms: tuple[ModuleNorm, ...]
    trains_factors: bool = True  # A and B of the norms are what trained, not an update folded into two factors


@dataclass(frozen=True)
class RunFacts:
    """Everything that is read of one run. None, or empty: absent or damaged, and then `notes` says so."""

    run_dir: RunDir
    name: str  # unique among the runs of a page
    settings: tuple[Setting, ...]
    steps: tuple[shapes.TrainLine, ...]
    evals: tuple[shapes.EvalLine, ...]
    events: tuple[shapes.EventLine, ...]
    resumes: tuple[shapes.Resume, ...]
    replays: tuple[shapes.Replay, ...]
    ends: tuple[shapes.End, ...]
    flights: tuple[shapes.Flight, ...]
    environment: shapes.Environment | None
    base: shapes.Base | None
    data: shapes.Data | None
    evaluation: shapes.Evaluation | None
    memory: shapes.Memory | None
    summary: shapes.Summary | None
    adapter: Adapter | None
    exports: tuple[shapes.Export, ...]
    notes: tuple[str, ...]

    def setting(self, key: str) -> str:
        """The value of a recipe key as YAML; empty where the recipe does not hold it."""
        return next((setting.value for setting in self.settings if setting.key == key), "")

    @property
    def num_planned_steps(self) -> int | None:
        """Steps that the run was to make."""
        train = self.data.split("train") if self.data else None
        return train.batching.num_steps if train and train.batching else None

    @property
    def last_step(self) -> int:
        """The last logged step; 0 where none is."""
        return self.steps[-1].step if self.steps else 0

    @property
    def export(self) -> shapes.Export | None:
        """The newest export of the adapter that the folder holds now."""
        if self.adapter is None:
            return None
        return next((e for e in reversed(self.exports) if e.adapter_sha256 == self.adapter.sha256), None)


def read_runs(folders: Sequence[Path]) -> tuple[RunFacts, ...]:
    """The facts of each run; RecipeError for folders that are no run folders, all of them at once."""
    names = [plain(name) for name in _unique_names(folders)]
    return tuple(read_run(folder, name) for folder, name in zip(folders, names, strict=True))


def read_run(folder: Path, name: str) -> RunFacts:
    """The facts of one run folder. RecipeError where it is none."""
    run_dir = RunDir(folder)
    if not run_dir.recipe.is_file():
        raise RecipeError(_why_no_run(run_dir), fix="name the run.dir of a recipe that was trained")
    read = _Reader()
    logged = read.metrics(run_dir)
    return RunFacts(
        run_dir=run_dir,
        name=name,
        settings=read.settings(run_dir.recipe),
        steps=tuple(line for line in logged if isinstance(line, shapes.TrainLine)),
        evals=tuple(line for line in logged if isinstance(line, shapes.EvalLine)),
        events=tuple(line for line in logged if isinstance(line, shapes.EventLine)),
        resumes=read.lines(run_dir.resumes, shapes.Resume.model_validate_json),
        replays=read.lines(run_dir.replays, shapes.Replay.model_validate_json),
        ends=read.lines(run_dir.errors, shapes.End.model_validate_json),
        flights=read.flights(run_dir),
        environment=read.file(run_dir.environment, shapes.Environment, "versions and device are not known"),
        base=read.file(run_dir.base, shapes.Base, "the base's fingerprint is not known"),
        data=read.file(run_dir.data, shapes.Data, "there is no account of the data"),
        evaluation=read.file(run_dir.evaluation, shapes.Evaluation, "held-out rows were not measured"),
        memory=read.file(run_dir.memory, shapes.Memory, "there is no memory plan to compare with"),
        summary=read.file(run_dir.summary, shapes.Summary, "the run has not ended"),
        adapter=read.adapter(run_dir),
        exports=read.lines(run_dir.exports, shapes.Export.model_validate_json),
        notes=tuple(read.notes),
    )


def _why_no_run(run_dir: RunDir) -> str:
    """What a folder is instead of a run folder."""
    root = run_dir.root
    if not root.is_dir():
        return f"{root} {'is a file, not a run folder' if root.exists() else 'does not exist'}"
    if run_dir.data.is_file():
        return f"{root} holds the account of its data ({run_dir.audit_page.name}), and no training yet"
    return f"{root} is not a run folder: it holds no {run_dir.recipe.name}"


def _unique_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of their parents as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        twice = next(folder for folder, own in zip(folders, parts, strict=True) if parts.count(own) > 1)
        raise RecipeError(f"{twice} is named twice", fix="name each run once")
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            break
    return names


class _Reader:
    """Reads files of one run folder; what cannot be read is noted and left out."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def file(self, path: Path, shape: type[_S], consequence: str) -> _S | None:
        """A JSON file of this shape."""
        try:
            return shape.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            self.notes.append(f"{path.name} is absent: {consequence}")
        except (OSError, ValidationError) as error:
            self.notes.append(f"{path.name} is damaged: {_reason(error)}")
        return None

    def lines(self, path: Path, parse: Callable[[bytes], _S]) -> tuple[_S, ...]:
        """The lines of a JSON Lines file that can be read; the others are counted."""
        found, faults = [], []
        for number, line in enumerate(_lines_of(path), 1):
            try:
                found.append(parse(line))
            except ValidationError as error:
                faults.append(f"line {number}: {_reason(error)}")
        if faults:
            how_many = "1 line is" if len(faults) == 1 else f"{len(faults):,} lines are"
            self.notes.append(f"{path.name}: {how_many} damaged and left out, first {faults[0]}")
        return tuple(found)

    def metrics(self, run_dir: RunDir) -> tuple[shapes.Shape, ...]:
        """The logged steps, held-out losses and events, in their order."""

        def parse(line: bytes) -> shapes.Shape:
            other = shapes.Line.model_validate_json(line)
            return _LINES.get(other.kind, shapes.Line).model_validate_json(line)

        found = self.lines(run_dir.metrics, parse)
        if not any(isinstance(line, shapes.TrainLine) for line in found):
            self.notes.append(f"{run_dir.metrics.name} holds no step: training has not begun")
        return found

    def flights(self, run_dir: RunDir) -> tuple[shapes.Flight, ...]:
        """What was written down of steps that came to no finite number, by step."""
        found = []
        for folder in run_dir.flight_steps().values():
            try:
                _refuse_damaged(folder)
                found.append(shapes.Flight.model_validate_json((folder / "flight.json").read_bytes()))
            except (OSError, ValueError, UserError) as error:
                self.notes.append(f"{run_dir.flights.name}/{folder.name} is damaged: {_reason(error)}")
        return tuple(found)

    def settings(self, path: Path) -> tuple[Setting, ...]:
        """The keys of the resolved recipe, in its order."""
        try:
            return tuple(_settings(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, yaml.YAMLError) as error:
            self.notes.append(f"{path.name} is damaged: {_reason(error)}")
            return ()

    def adapter(self, run_dir: RunDir) -> Adapter | None:
        """The published adapter, else that of the newest checkpoint that verifies."""
        checkpoints = run_dir.checkpoint_steps()
        for folder in (run_dir.adapter, *reversed(checkpoints.values())):
            if not folder.is_dir():
                continue
            try:
                return _read_adapter(folder, is_published=folder == run_dir.adapter)
            except (OSError, ValueError, KeyError, UserError) as error:
                self.notes.append(f"{folder.name} is damaged: {_reason(error)}")
        found = (
            "no adapter of this run verifies" if checkpoints or run_dir.adapter.is_dir() else "there is no adapter yet"
        )
        self.notes.append(f"{found}: its norms are not known")
        return None


def _read_adapter(folder: Path, *, is_published: bool) -> Adapter:
    _refuse_damaged(folder)
    manifest = shapes.AdapterManifest.model_validate(read_manifest(folder))
    sha256 = manifest.files["adapter_model.safetensors"].sha256
    is_plain = load_adapter_config(folder).method.form == "plain"
    return Adapter(manifest.step, is_published, sha256, module_norms(folder), is_plain)


def _refuse_damaged(folder: Path) -> None:
    """ValueError unless a published folder is what its manifest says."""
    if faults := manifest_faults(folder):
        raise ValueError("; ".join(faults))


def _settings(text: str) -> Iterator[Setting]:
    """`key: value  # origin`, below `section:` but for a few, one line each, as recipe.load.resolved_yaml writes it."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("it holds no mapping of sections")
    lines = text.splitlines()
    for name, body in root.value:
        entries = body.value if isinstance(body, yaml.MappingNode) else [(None, body)]
        for key, value in entries:
            line, start, end = value.start_mark.line, value.start_mark.column, value.end_mark.column
            dotted = f"{name.value}.{key.value}" if key else name.value
            yield Setting(dotted, lines[line][start:end], lines[line][end:].partition("#")[2].strip())


def _lines_of(path: Path) -> list[bytes]:
    """The lines of a file, none where it cannot be read."""
    try:
        return [line for line in path.read_bytes().splitlines() if line.strip()]
    except OSError:
        return []


def _reason(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
    return " ".join(str(error).split())
