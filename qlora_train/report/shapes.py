"""What the report reads of each file of a run folder. What is damaged fails here, by name, and not on the page."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

Number = Annotated[float, Field(allow_inf_nan=True)]
"""A number that may be none: NaN or infinity, which JSON holds as text."""


class Shape(BaseModel):
    """Checked, frozen, without NaN and infinity; keys that the report does not show may come and go."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Line(Shape):
    """Any line of metrics.jsonl."""

    kind: str


class TrainLine(Shape):
    """A logged step in metrics.jsonl. Loss in nats per supervised token; the norm is that before clipping."""

    model_config = ConfigDict(extra="allow")

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_supervised_tokens: int
    step_s: float = Field(gt=0)
    peak_memory_gib: float | None = None

    @property
    def figures(self) -> dict[str, float]:
        """Numbers that the method and its optimiser logged of their own."""
        own = {name: value for name, value in (self.model_extra or {}).items() if type(value) in (int, float)}
        return {name: float(value) for name, value in own.items() if math.isfinite(value)}


class EvalLine(Shape):
    """A held-out loss in metrics.jsonl."""

    step: int
    eval_loss: float


class EventLine(Shape):
    """An event in metrics.jsonl: something that a step should not do, in words (`text`) or in figures of its own."""

    model_config = ConfigDict(extra="allow")

    step: int
    what: str
    text: str = ""
    loss: float | None = None
    limit: float | None = None  # that the loss was expected to stay below
    rows: tuple[str, ...] = ()

    @property
    def others(self) -> dict[str, Any]:
        """What else was written down."""
        return {name: value for name, value in (self.model_extra or {}).items() if name != "kind"}


class Change(Shape):
    """One thing that was not as before when a run went on."""

    key: str
    old: Any = None
    new: Any = None


class Resume(Shape):
    """A line of resumes.jsonl: from where the run went on; train/fork.py describes the levels."""

    time: AwareDatetime
    step: int
    level: Literal["D2", "D1", "D0"]
    fork: tuple[Change, ...] = ()
    rounding: tuple[Change, ...] = ()


class ReplayedStep(Shape):
    """A step as it was logged, and as it was made again."""

    step: int
    loss_distance: float


class Replay(Shape):
    """A line of replays.jsonl: logged steps that were made again; train/replay.py describes the levels."""

    time: AwareDatetime
    level: Literal["D2", "D1", "D0"]
    from_step: int
    steps: tuple[ReplayedStep, ...] = Field(min_length=1)
    compared_with: int | None = None
    same_adapter: bool | None = None
    rounding: tuple[Change, ...] = ()


class Problem(Shape):
    """One thing that was wrong."""

    what: str
    fix: str = ""
    where: str | None = None


class End(Shape):
    """A line of errors.jsonl: what ended a process that held the run folder."""

    time: AwareDatetime
    kind: str
    exit_code: int
    step: int | None = None  # the last one logged by then
    problems: tuple[Problem, ...] = ()


class FlightRow(Shape):
    """A row of the step that came to no finite number, as it was trained on."""

    where: str
    micro_step: int
    num_tokens: int
    text: str


class Culprit(Shape):
    """What was first not finite when the step was computed once more."""

    text: str
    micro_step: int | None = None


class LastSteps(Shape):
    """The steps before, oldest first. Norms are of trained tensors by name: of gradients, and of the values."""

    step: tuple[int, ...] = ()
    loss: tuple[Number, ...] = ()
    grad_norm: tuple[Number, ...] = ()
    learning_rate: tuple[Number, ...] = ()
    grad_norm_of: dict[str, tuple[Number, ...]] = {}
    norm_of: dict[str, tuple[Number, ...]] = {}

    @model_validator(mode="after")
    def _as_many_of_each(self) -> LastSteps:
        columns = (self.loss, self.grad_norm, self.learning_rate, *self.grad_norm_of.values(), *self.norm_of.values())
        if any(len(column) != len(self.step) for column in columns):
            raise ValueError(f"a figure is not there for each of the {len(self.step)} steps")
        return self


class ThisStep(Shape):
    """Norms of the gradients of the step itself."""

    grad_norm_of: dict[str, Number] = {}


class Flight(Shape):
    """flight.json of a step that came to no finite number; train/flight.py describes it."""

    step: int
    loss: Number
    grad_norm: Number
    learning_rate: Number
    first_not_finite: Culprit | None = None
    rows: tuple[FlightRow, ...] = ()
    last_steps: LastSteps = LastSteps()
    this_step: ThisStep = ThisStep()
    repeat: str = ""  # the command that comes to the same step


class Scores(Shape):
    """Means over generated answers, each in [0, 1]."""

    num_answers: int
    exact_match: float
    first_word: float
    char_similarity: float


class Answer(Shape):
    """One generated answer beside its reference."""

    where: str
    asked: str
    reference: str
    text: str
    exact_match: float
    char_similarity: float


class Side(Shape):
    """Base or adapter on the held-out rows."""

    loss: float
    perplexity: float
    num_rows: int
    num_supervised_tokens: int
    scores: Scores | None = None
    answers: tuple[Answer, ...] = ()


class MeasuredOn(Shape):
    """What the figures of a side depend on besides the model."""

    rows: str | None = None  # fingerprint of the tokens of the held-out rows
    generate_rows: int | None = None
    max_new_tokens: int | None = None


class Evaluation(Shape):
    """eval.json."""

    measured_on: MeasuredOn = MeasuredOn()
    base: Side | None = None
    adapter: Side | None = None


class Summary(Shape):
    """run.json. The rates are over the seconds that steps took, in all parts of a resumed run."""

    num_steps: int
    best_step: int | None
    num_trainable: int
    trainable_frac: float
    num_supervised_tokens: int
    supervised_tokens_per_s: float = Field(gt=0)
    tokens_per_s: float = Field(gt=0)
    peak_memory_bytes: int
    wall_s: float

    @property
    def train_s(self) -> float:
        """Seconds of all steps."""
        return self.num_supervised_tokens / self.supervised_tokens_per_s

    @property
    def num_tokens(self) -> int:
        """Tokens of all steps, supervised or only read."""
        return round(self.tokens_per_s * self.train_s)


class Reason(Shape):
    """One kind of reason for which rows are not trained on whole."""

    fate: str
    reason: str
    count: int


class SourceRows(Shape):
    """One source of a split."""

    name: str
    format: str
    weight: float
    num_rows: int
    num_trained: int


class Duplicates(Shape):
    """Rows that repeat an earlier one word for word."""

    num_duplicates: int


class NearDuplicates(Shape):
    """Rows much like an earlier one."""

    num_compared: int
    num_near: int


class Batching(Shape):
    """How the rows of the first epoch meet."""

    kind: str
    num_lines: int
    num_steps: int
    padding_frac: float
    num_unreached_rows: int = 0


class Split(Shape):
    """The account of one split in data.json."""

    split: str
    counts: dict[str, int]
    reasons: tuple[Reason, ...]
    sources: tuple[SourceRows, ...]
    num_rows: int
    num_trained: int
    num_pieces: int | None = None
    num_tokens: int
    num_supervised_tokens: int
    num_lost_tokens: int
    lost_token_frac: float
    num_plain_specials: int = 0
    duplicates: Duplicates | None = None
    near_duplicates: NearDuplicates | None = None
    batching: Batching | None = None


class Overlap(Shape):
    """Held-out rows that are trained on too, or that ask what a training row asks."""

    num_eval_rows: int
    num_rows: int
    num_prompts: int


class DataFile(Shape):
    """One source file, by content."""

    name: str
    sha256: str


class Data(Shape):
    """data.json."""

    seq_len: int
    max_lost_frac: float
    splits: tuple[Split, ...]
    overlap: Overlap | None = None
    files: tuple[DataFile, ...] = ()

    def split(self, name: str) -> Split | None:
        """The split of this name, where there is one."""
        return next((split for split in self.splits if split.split == name), None)


class BaseSource(Shape):
    """Where the base came from."""

    name: str
    commit: str | None = None
    file_sha256: str | None = None


class BaseTensor(Shape):
    """One tensor of the base as it was held."""

    dtype: str
    num_bytes: int


class Base(Shape):
    """base.json."""

    source: BaseSource
    digest: str
    quant: dict[str, Any] | None = None
    tensors: dict[str, BaseTensor] = {}


class Environment(Shape):
    """environment.json."""

    python: str
    system: str
    cpu_capability: str = ""
    cpu_count: int | None = None
    threads: int | None = None
    cuda: str | None = None
    cuda_devices: tuple[str, ...] = ()
    versions: dict[str, str] = {}
    code_sha256: str = ""


class Distance(Shape):
    """How far a model is from the trained one. KL in nats per token, losses per supervised token."""

    num_tokens: int
    mean_kl: float
    top1_agreement: float
    reference_nll: float
    candidate_nll: float


class Export(Shape):
    """A line of exports.jsonl: one merge and the verdict on it."""

    folder: str
    export_dtype: str
    merged_onto: str = "dequantized"  # any other base makes another model than the trained one
    adapter_sha256: str
    accepted: bool
    num_rows: int
    split: str
    max_kl_frac: float
    merged: Distance
    adapter_off: Distance

    @property
    def kl_frac(self) -> float | None:
        """KL of the merged model as a share of the adapter's whole effect; None where it has no effect."""
        return self.merged.mean_kl / self.adapter_off.mean_kl if self.adapter_off.mean_kl > 0 else None


class Term(Shape):
    """One cause of memory in one stage of the plan."""

    stage: str
    cause: str
    num_bytes: int
    how: str  # traced, formula or constant
    source: str = ""


class Plan(Shape):
    """The terms of the memory plan."""

    terms: tuple[Term, ...] = ()


class Phase(Shape):
    """Planned and measured bytes of tensors in one phase."""

    name: str
    planned: int | None = None
    measured: int | None = None
    reserved: int | None = None  # by torch's allocator on a card
    planned_by_cause: dict[str, int] = {}
    measured_by_cause: dict[str, int] = {}  # empty on a card

    @property
    def difference_frac(self) -> float | None:
        """Measured against planned: 0.1 is 10 % more than planned."""
        return self.measured / self.planned - 1 if self.measured is not None and self.planned else None


class Resident(Shape):
    """Resident memory of the process, before the model was loaded and at most."""

    before: int | None = None
    peak: int | None = None


class Rehearsal(Shape):
    """What saving one checkpoint took before step 1."""

    checkpoint_bytes: int | None = None
    checkpoint_s: float | None = None


class Exhaustion(Shape):
    """The moment at which memory ran out."""

    where: str
    requested: int | None = None
    held: int | None = None
    message: str = ""


class Memory(Shape):
    """memory.json; train/memory.py describes it."""

    device: str
    settings: dict[str, Any] | None = None
    plan: Plan | None = None
    phases: tuple[Phase, ...] = ()
    peak: int | None = None
    resident: Resident = Resident()
    rehearsal: Rehearsal | None = None
    warnings: tuple[str, ...] = ()
    out_of_memory: Exhaustion | None = None


class AdapterFile(Shape):
    """A file in a manifest."""

    sha256: str


class AdapterManifest(Shape):
    """MANIFEST.json of the published adapter or of a checkpoint."""

    step: int
    files: dict[str, AdapterFile]
