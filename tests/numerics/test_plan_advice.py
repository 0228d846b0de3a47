"""Advice: what each change saves is true, the order is that of its cost, and the last one fits."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from qlora_train.memory.advice import _smaller_moments, advise, spend
from qlora_train.memory.estimate import Request
from qlora_train.memory.plan import Plan, plan_training
from qlora_train.recipe.schema import Recipe
from tests.unit.memory.planned import recipe_of

MIB = 2**20
CONFIG = LlamaConfig(
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=12,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=8192,
    max_position_embeddings=4096,
)


def planned(**sections: Any) -> Plan:
    given: dict[str, Any] = {
        "data": {"seq_len": 2048, "eval": ()},
        "train": {"micro_batch_size": 4, "checkpointing": "none"},
    }
    for name, values in sections.items():
        given[name] = {**given.get(name, {}), **values}
    return plan_training(recipe_of(**given), CONFIG, device="cuda")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned()


def changed(recipe: Recipe, overrides: Any) -> Recipe:
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        old = getattr(getattr(recipe, section), name)
        new = value if isinstance(old, str) else value == "true" if isinstance(old, bool) else int(value)
        part = getattr(recipe, section).model_copy(update={name: new})
        recipe = recipe.model_copy(update={section: part})
    return recipe


def test_nothing_to_change_where_it_fits(plan: Plan) -> None:
    assert advise(plan, plan.device_bytes) == ()


def test_what_a_change_promises_is_what_it_gives(plan: Plan) -> None:
    limit = int(0.7 * plan.device_bytes)
    changes = advise(plan, limit)
    keys = [next(iter(change.overrides)) for change in changes]
    assert {"train.micro_batch_size", "train.checkpointing", "train.optimizer", "data.seq_len"} <= set(keys)
    for change in changes:
        again = plan_training(changed(plan.request.recipe, change.overrides), CONFIG, device="cuda")
        assert change.peak_bytes == pytest.approx(again.device_bytes, rel=0.02), change.text
        assert change.saved_bytes == plan.device_bytes - change.peak_bytes > 0
        assert change.fits == (change.peak_bytes <= limit)


def test_moments_in_8_bit_are_advised_on_a_card_alone() -> None:
    """On a CPU their step takes 15 times as long."""
    offered = {kind: list(_smaller_moments(Request(recipe_of(), CONFIG, kind))) for kind in ("cuda", "cpu")}
    assert [dict(option.overrides) for option in offered["cuda"]] == [{"train.optimizer": "adamw_8bit"}]
    assert offered["cpu"] == []


def test_the_order_is_that_of_lost_speed(plan: Plan) -> None:
    changes = [c for c in advise(plan, int(0.7 * plan.device_bytes)) if not c.changes_training]
    costs = [change.slowdown_frac for change in changes]
    assert costs == sorted(costs) and costs[0] < 0.1 and max(costs) > 0.2
    full = next(c for c in changes if c.overrides == {"train.checkpointing": "full"})
    assert 0.25 < full.slowdown_frac < 1 / 3


def test_where_no_single_change_is_enough_they_combine(plan: Plan) -> None:
    least = planned(train={"micro_batch_size": 1, "checkpointing": "full", "optimizer": "adamw_8bit"})
    last = advise(plan, least.device_bytes + 20 * MIB)[-1]
    assert last.fits and len(last.overrides) > 1
    assert 0.3 < last.slowdown_frac < 0.6  # recomputing, and smaller micro-batches
    hopeless = advise(plan, 400 * MIB)  # less than CUDA itself takes
    assert not hopeless[-1].fits and "does not fit" in hopeless[-1].why
    assert hopeless[-1].peak_bytes == min(change.peak_bytes for change in hopeless)


def test_a_large_evaluation_batch_is_named_first() -> None:
    held_out = {"eval": ({"path": "others"},)}
    large = planned(data=held_out, train={"micro_batch_size": 1, "checkpointing": "full"}, eval={"batch_size": 64})
    assert large.tightest != "training"
    first = advise(large, large.peak_bytes("training"))[0]
    assert list(first.overrides) == ["eval.batch_size"] and first.fits and first.slowdown_frac == 0


def test_room_is_spent_on_speed_then_on_length() -> None:
    lean = planned(train={"micro_batch_size": 1, "grad_accum_steps": 4, "checkpointing": "full"})
    changes = spend(lean, 4 * lean.device_bytes)
    keys = [next(iter(change.overrides)) for change in changes]
    assert set(keys) == {"train.micro_batch_size", "train.checkpointing", "data.seq_len"} and keys[-1] == "data.seq_len"
    assert all(change.fits for change in changes)
    assert all(change.slowdown_frac < 0 for change in changes[:-1])
    assert changes[-1].overrides == {"data.seq_len": "4096"}  # all that the model knows
    packs = next(c for c in changes if "train.micro_batch_size" in c.overrides).overrides
    assert int(packs["train.micro_batch_size"]) * int(packs["train.grad_accum_steps"]) == 4
    assert spend(lean, lean.device_bytes) == ()
