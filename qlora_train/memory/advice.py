"""Changes that make a plan fit, cheapest first; and what to spend the room on where it fits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from qlora_train.memory.budget import RERUN_FRAC, Choice
from qlora_train.memory.estimate import Request, Shallow, settle, unseen_bytes
from qlora_train.memory.formula import formula_costs, training_bytes
from qlora_train.memory.moments import WHOLE_WEIGHTS, optimizer_of
from qlora_train.memory.plan import Plan
from qlora_train.memory.trace import StepStyle
from qlora_train.model.checkpointing import Checkpointing
from qlora_train.quant.moments import EIGHT_BIT

RECOMPUTE_FRAC = 1 / 3
"""Of a step's time, what computing all layers again adds: one forward pass besides a forward and a backward one."""
DEQUANTISATION_TOKENS = 200
"""Tokens of a micro-batch at which dequantising takes as long as multiplying, by arithmetic of bandwidth and matmuls:
190 (A100), 210 (RTX 4090), 370 (H100)."""
OFFLOAD_FRAC = 0.1
"""What moving checkpoints to the host and back may add; not measured."""
LEAST_SEQ_LEN = 256
LEAST_R = 4


@dataclass(frozen=True)
class Change:
    """Keys of the recipe to change, what that saves, and what it costs."""

    overrides: Mapping[str, str]  # as on the command line: {"train.checkpointing": "full"}
    why: str  # a phrase for people: what changes
    slowdown_frac: float  # of the time of a token, by arithmetic: 0.3 is 30 % slower, -0.1 is 10 % faster
    changes_training: bool  # whether what is learnt changes, too
    saved_bytes: int  # of the peak on the device; negative where the change spends
    peak_bytes: int  # on the device, with this change
    fits: bool

    @property
    def text(self) -> str:
        """The overrides as they are typed."""
        return " ".join(f"{key}={value}" for key, value in self.overrides.items())

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "overrides": dict(self.overrides)}


@dataclass(frozen=True)
class _Option:
    """A change before its effect is known."""

    overrides: Mapping[str, str]
    why: str
    slowdown_frac: float
    request: Request
    changes_training: bool = False


def advise(plan: Plan, limit_bytes: int) -> tuple[Change, ...]:
    """What to change so that a plan fits into `limit_bytes` of its device, in the order of what it costs in speed.

    Changes of what is learnt come after those of speed alone. Each stands by itself; where none of speed alone is
    enough, the last combines as many as are needed, or all. Empty where the plan fits. Some tenths of a second each.
    """
    if plan.fits(limit_bytes):
        return ()
    scale = _Scale(plan)
    options = sorted(
        _options(plan, scale, limit_bytes), key=lambda option: (option.changes_training, option.slowdown_frac)
    )
    changes = [scale.change(option, limit_bytes) for option in options]
    useful = [change for change in changes if change.saved_bytes > 0]
    if not any(change.fits and not change.changes_training for change in useful):
        useful += [change for change in (_combined(plan, scale, limit_bytes),) if change is not None]
    return tuple(useful)


def spend(plan: Plan, limit_bytes: int) -> tuple[Change, ...]:
    """What the room is good for where a plan fits: faster steps, then longer rows. Empty where there is little."""
    scale, recipe = _Scale(plan), plan.request.recipe
    found: list[Change] = []
    for option in (*_larger_micro_batches(plan), *_less_checkpointing(plan, limit_bytes)):
        change = scale.change(option, limit_bytes)
        if change.fits and change.slowdown_frac < -0.005:
            found.append(change)
    best: dict[str, Change] = {}
    for change in found:
        key = next(iter(change.overrides))
        if key not in best or change.slowdown_frac < best[key].slowdown_frac:
            best[key] = change
    longest = None
    seq_len, limit = 2 * recipe.data.seq_len, _known_positions(plan.request)
    while seq_len <= limit:
        request = plan.request.with_changes(data={"seq_len": seq_len})
        overrides = {"data.seq_len": str(seq_len)}
        change = scale.change(
            _Option(overrides, "room for longer rows", 0.0, request, changes_training=True), limit_bytes
        )
        if not change.fits:
            break
        longest, seq_len = change, 2 * seq_len
    return (*sorted(best.values(), key=lambda change: change.slowdown_frac), *([longest] if longest else []))


class _Scale:
    """Estimates laid upon a plan: the plan's own peaks, and what a change adds to the estimate or takes from it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._peaks: dict[str, tuple[int, int]] = {}
        self._evaluations: dict[str, int] = {}
        self._training = training_bytes(plan.request, plan.choice)
        self._evaluation = self._evaluation_of(plan.request, plan.choice.resident_layers)

    def peaks_of(self, request: Request, choice: Choice | None = None) -> tuple[int, int]:
        """Peaks of training, and of what is done without gradients, with other settings."""
        choice = choice or self._choice(request)
        key = f"{request.recipe.model_dump_json()} {choice}"
        if key not in self._peaks:
            self._peaks[key] = self._training_with(request, choice), max(self._evaluations_with(request, choice))
        return self._peaks[key]

    def peak_of(self, request: Request, choice: Choice | None = None) -> int:
        """Most on the device with other settings."""
        return max(self.peaks_of(request, choice))

    def excess(self, request: Request, limit_bytes: int) -> int:
        """How much is too much, over both."""
        return sum(max(0, peak - limit_bytes) for peak in self.peaks_of(request))

    def change(self, option: _Option, limit_bytes: int) -> Change:
        """An option with its effect."""
        peak = self.peak_of(option.request)
        return Change(
            overrides=option.overrides,
            why=option.why,
            slowdown_frac=round(option.slowdown_frac, 3),
            changes_training=option.changes_training,
            saved_bytes=self.plan.device_bytes - peak,
            peak_bytes=peak,
            fits=peak <= limit_bytes,
        )

    def _choice(self, request: Request) -> Choice | None:
        """The plan's own policy and resident layers, unless the request fixes others."""
        own, then = request.recipe.train, self.plan.request.recipe.train
        keys = ("checkpointing", "checkpoint_every", "offload_checkpoints", "resident_layers")
        return self.plan.choice if all(getattr(own, key) == getattr(then, key) for key in keys) else None

    def _training_with(self, request: Request, choice: Choice | None) -> int:
        return self.plan.peak_bytes("training") + training_bytes(request, choice) - self._training

    def _evaluations_with(self, request: Request, choice: Choice | None) -> tuple[int, int]:
        """Peaks of the held-out loss and of generation."""
        if not self.plan.peak_bytes("evaluation"):
            return 0, 0
        resident = choice.resident_layers if choice else 0
        more = self._evaluation_of(request, resident) - self._evaluation
        # Keys, values and masks go with the rows; the square of the prompt is left out.
        tokens, tokens_now = (one.recipe.eval.batch_size * one.row_tokens for one in (request, self.plan.request))
        by_formula = sum(t.num_bytes for t in self.plan.terms if t.stage == "generation" and t.how == "formula")
        generation = self.plan.peak_bytes("generation")
        fewer = int(by_formula * (1 - tokens / tokens_now))
        return self.plan.peak_bytes("evaluation") + more, generation + more - fewer if generation else 0

    def _evaluation_of(self, request: Request, resident_layers: int) -> int:
        """The held-out loss by a trace; 0 where there is none."""
        recipe = request.recipe
        if not recipe.data.holds_out:
            return 0
        sizes = (recipe.eval.batch_size, request.row_tokens, recipe.adapter.r, resident_layers)
        key = f"{sizes} {optimizer_of(recipe)}"
        if key not in self._evaluations:
            style = StepStyle(optimizer=optimizer_of(recipe), resident_layers=resident_layers)
            found = Shallow(request).evaluation(style)
            unseen = unseen_bytes(request.device, found.held_bytes, found.peak_bytes)
            self._evaluations[key] = found.peak_bytes + unseen
        return self._evaluations[key]


def _options(plan: Plan, scale: _Scale, limit_bytes: int) -> Iterator[_Option]:
    request, recipe = plan.request, plan.request.recipe
    if max(plan.peak_bytes("evaluation"), plan.peak_bytes("generation")) > limit_bytes:
        for size in (recipe.eval.batch_size // 2**k for k in range(1, recipe.eval.batch_size.bit_length())):
            smaller = request.with_changes(eval={"batch_size": size})
            if size == 1 or scale.peaks_of(smaller, plan.choice)[1] <= limit_bytes:
                yield _Option({"eval.batch_size": str(size)}, "fewer rows at a time in evaluation", 0.0, smaller)
                break
    if plan.choice.resident_layers:
        share = plan.choice.resident_layers / plan.costs.num_layers
        request_0 = request.with_changes(train={"resident_layers": 0})
        cost = share * DEQUANTISATION_TOKENS / (DEQUANTISATION_TOKENS + _tokens(request))
        yield _Option({"train.resident_layers": "0"}, "no layer stays dense", cost, request_0)
    yield from _smaller_moments(request)
    yield from _smaller_micro_batch(plan, scale, limit_bytes)
    yield from _more_checkpointing(plan)
    if recipe.adapter.r > LEAST_R:
        r = max(LEAST_R, recipe.adapter.r // 2)
        smaller = request.with_changes(adapter={"r": r})
        yield _Option({"adapter.r": str(r)}, "a smaller adapter", 0.0, smaller, changes_training=True)
    seq_len = recipe.data.seq_len
    while seq_len > LEAST_SEQ_LEN:
        seq_len //= 2
        smaller = request.with_changes(data={"seq_len": seq_len})
        if seq_len <= LEAST_SEQ_LEN or scale.peak_of(smaller) <= limit_bytes:
            why = "shorter packs; longer rows go as data.overlong says"
            yield _Option({"data.seq_len": str(seq_len)}, why, 0.0, smaller, changes_training=True)
            break


def _smaller_moments(request: Request) -> Iterator[_Option]:
    """Moments of A and B in place of whole weights', or in 8 bit: on a card alone, for on a CPU those take 15 times as
    long (quant/moments.py)."""
    if optimizer_of(request.recipe) == WHOLE_WEIGHTS:
        factor = request.with_changes(adapter={"rule_mode": "factor"})
        why = "moments of A and B, not of whole weights"
        yield _Option({"adapter.rule_mode": "factor"}, why, 0.0, factor, changes_training=True)
    elif request.device == "cuda" and request.recipe.train.optimizer not in EIGHT_BIT:
        name = f"{request.recipe.train.optimizer}_8bit"
        smaller = request.with_changes(train={"optimizer": name})
        yield _Option({"train.optimizer": name}, "8-bit moments", 0.01, smaller)


def _tokens(request: Request) -> int:
    """Tokens of a micro-batch."""
    return request.recipe.train.micro_batch_size * request.recipe.data.seq_len


def _speed(tokens: int) -> float:
    """Time of a token, relative to one in an endless micro-batch: weights are dequantised once for all of them."""
    return 1 + DEQUANTISATION_TOKENS / tokens


def _with_micro_batch(request: Request, size: int) -> _Option:
    """The same packs a step, so many at a time."""
    train = request.recipe.train
    steps = train.micro_batch_size * train.grad_accum_steps // size
    values = {"micro_batch_size": size, "grad_accum_steps": steps}
    changed = request.with_changes(train=values)
    slowdown = _speed(_tokens(changed)) / _speed(_tokens(request)) - 1
    overrides = {f"train.{key}": str(value) for key, value in values.items()}
    kind = "fewer" if size < train.micro_batch_size else "more"
    return _Option(overrides, f"{kind} packs at a time, as many a step", slowdown, changed)


def _smaller_micro_batch(plan: Plan, scale: _Scale, limit_bytes: int) -> Iterator[_Option]:
    train = plan.request.recipe.train
    packs = train.micro_batch_size * train.grad_accum_steps
    sizes = [size for size in range(train.micro_batch_size - 1, 0, -1) if packs % size == 0]
    for size in sizes:
        option = _with_micro_batch(plan.request, size)
        if size == sizes[-1] or scale.peak_of(option.request) <= limit_bytes:
            yield option
            return


def _larger_micro_batches(plan: Plan) -> Iterator[_Option]:
    train = plan.request.recipe.train
    packs = train.micro_batch_size * train.grad_accum_steps
    for size in range(train.micro_batch_size + 1, packs + 1):
        if packs % size == 0:
            yield _with_micro_batch(plan.request, size)


def _rerun_frac(policy: Checkpointing, num_layers: int) -> float:
    """Of a step's time without checkpointing, what computing again adds."""
    return RECOMPUTE_FRAC * RERUN_FRAC[policy.kind] * policy.num_recomputed(num_layers) / num_layers


def _with_policy(plan: Plan, policy: Checkpointing, why: str) -> _Option:
    values: dict[str, Any] = {
        "checkpointing": policy.kind,
        "checkpoint_every": policy.every,
        "offload_checkpoints": policy.offload,
    }
    then, num_layers = plan.choice.checkpointing, plan.costs.num_layers
    now = 1 + _rerun_frac(policy, num_layers) + (OFFLOAD_FRAC if policy.offload else 0)
    before = 1 + _rerun_frac(then, num_layers) + (OFFLOAD_FRAC if then.offload else 0)
    train = plan.request.recipe.train
    overrides = {f"train.{key}": str(value).lower() for key, value in values.items() if getattr(train, key) != value}
    return _Option(overrides, why, now / before - 1, plan.request.with_changes(train=values))


def _more_checkpointing(plan: Plan) -> Iterator[_Option]:
    policy = plan.choice.checkpointing
    if plan.costs.num_layers < 2:
        return
    if policy.kind == "none":
        yield _with_policy(plan, Checkpointing("selective"), "all but attention is computed again")
    if policy.kind != "full" or policy.every > 1:
        yield _with_policy(plan, Checkpointing("full"), "layers are computed again in the backward pass")
    if plan.request.device == "cuda" and not policy.offload:
        why = "layers are computed again, and their inputs wait in host memory"
        yield _with_policy(plan, Checkpointing("full", offload=True), why)


def _less_checkpointing(plan: Plan, limit_bytes: int) -> Iterator[_Option]:
    if plan.choice.checkpointing.kind == "none":
        return
    request = replace(plan.request, limit_bytes=limit_bytes).with_changes(
        train={"checkpointing": "auto", "checkpoint_every": 1, "offload_checkpoints": False}
    )
    costs = formula_costs(request) or Shallow(request).costs()
    policy = settle(request, costs).checkpointing
    before, now = (1 + _rerun_frac(p, plan.costs.num_layers) for p in (plan.choice.checkpointing, policy))
    again = policy.num_recomputed(plan.costs.num_layers)
    why = f"fewer layers are computed again: {again} of {plan.costs.num_layers} ({policy.kind})"
    yield _Option({"train.checkpointing": "auto"}, why, now / before - 1, request)


def _combined(plan: Plan, scale: _Scale, limit_bytes: int) -> Change | None:
    """One change on top of the other until it fits: those of speed alone, then shorter packs, then a smaller r."""
    request = plan.request
    overrides: dict[str, str] = {}
    slower: dict[str, float] = {}  # a stronger policy stands in for a weaker one
    changed = False
    steps: list[_Option] = [o for o in _options(plan, scale, limit_bytes) if not o.changes_training]
    for option in sorted(steps, key=lambda option: option.slowdown_frac):
        further = _merged(request, option, plan.request)
        if scale.excess(further, limit_bytes) >= scale.excess(request, limit_bytes):
            continue
        request = further
        overrides |= dict(option.overrides)
        first = next(iter(option.overrides))
        slower["policy" if "checkpoint" in first else first] = 1 + option.slowdown_frac
    peak = scale.peak_of(request)
    while peak > limit_bytes and (smaller := _leaner(request)) is not None:
        request, key, value = smaller
        overrides[key] = value
        changed, peak = True, scale.peak_of(request)
    if len(overrides) < 2:
        return None
    why = "together" if peak <= limit_bytes else "together: even this does not fit"
    slowdown_frac = round(math.prod(slower.values()) - 1, 3)
    return Change(overrides, why, slowdown_frac, changed, plan.device_bytes - peak, peak, peak <= limit_bytes)


def _merged(request: Request, option: _Option, before: Request) -> Request:
    """A request with those values that an option changed."""
    changes: dict[str, dict[str, Any]] = {}
    for section in ("train", "eval", "data", "adapter"):
        then, now = getattr(before.recipe, section), getattr(option.request.recipe, section)
        changes[section] = {
            key: getattr(now, key) for key in type(now).model_fields if getattr(now, key) != getattr(then, key)
        }
    return request.with_changes(**changes)


def _leaner(request: Request) -> tuple[Request, str, str] | None:
    """Moments of A and B alone; then half the packs' length, down to a limit; then half of r."""
    recipe = request.recipe
    if optimizer_of(recipe) == WHOLE_WEIGHTS:
        return request.with_changes(adapter={"rule_mode": "factor"}), "adapter.rule_mode", "factor"
    if recipe.data.seq_len > LEAST_SEQ_LEN:
        value = max(LEAST_SEQ_LEN, recipe.data.seq_len // 2)
        return request.with_changes(data={"seq_len": value}), "data.seq_len", str(value)
    if recipe.adapter.r > LEAST_R:
        value = max(LEAST_R, recipe.adapter.r // 2)
        return request.with_changes(adapter={"r": value}), "adapter.r", str(value)
    return None


def _known_positions(request: Request) -> int:
    return int(
        getattr(request.config.get_text_config(), "max_position_embeddings", 0) or 2 * request.recipe.data.seq_len
    )
