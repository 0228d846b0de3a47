"""Plans: parts that add up, stages by arithmetic done here, and sensible answers for published models on cards."""

from __future__ import annotations

import json

import pytest

from qlora_train.memory.cards import find_card
from qlora_train.memory.constants import CUDA_CONTEXT, HOST_LIBRARIES
from qlora_train.memory.measure import trial_batch
from qlora_train.memory.plan import ON_DEVICE, STAGES, Plan, plan_training
from qlora_train.memory.trace import ADAPTER, GRADIENTS, OPTIMISER
from tests.unit.memory.planned import published_config, recipe_of, tiny_config

GIB = 2**30
NUM_WEIGHTS = 2 * 512 * 128 + 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128) + 9 * 128
NUM_ADAPTER = 4 * 16 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 256))


@pytest.fixture(scope="module")
def tiny_plan() -> Plan:
    recipe = recipe_of(
        data={"seq_len": 64}, train={"micro_batch_size": 2}, eval={"batch_size": 3, "max_new_tokens": 16}
    )
    return plan_training(recipe, tiny_config("llama", 4), device="cuda", limit_bytes=8 * GIB)


def test_terms_add_up_and_are_told(tiny_plan: Plan) -> None:
    for stage in STAGES:
        terms = tiny_plan.of(stage)
        assert sum(term.num_bytes for term in terms) == tiny_plan.peak_bytes(stage) > 0
        assert all(term.source and term.num_bytes >= 0 for term in terms)
        assert [t.num_bytes for t in terms] == sorted((t.num_bytes for t in terms), reverse=True)
    assert tiny_plan.device_bytes == max(map(tiny_plan.peak_bytes, ON_DEVICE)) == tiny_plan.peak_bytes("training")
    assert tiny_plan.traced_bytes() < tiny_plan.peak_bytes()
    assert {t.how for t in tiny_plan.of("training")} == {"traced", "constant"}
    assert tiny_plan.formula_bytes == pytest.approx(tiny_plan.traced_bytes(), rel=0.02)
    assert tiny_plan.fits(8 * GIB) and not tiny_plan.fits(CUDA_CONTEXT.num_bytes)


def test_it_is_plain_data(tiny_plan: Plan) -> None:
    data = json.loads(json.dumps(tiny_plan.as_dict()))
    assert data["peak_bytes"]["training"] == tiny_plan.peak_bytes()
    assert data["settings"]["micro_batch_size"] == 2 and data["settings"]["num_layers"] == 4
    assert {term["stage"] for term in data["terms"]} == set(STAGES)


def test_generation_export_and_disk_by_hand(tiny_plan: Plan) -> None:
    def term(stage: str, cause: str) -> int:
        return next(t.num_bytes for t in tiny_plan.terms if (t.stage, t.cause) == (stage, cause))

    one_layer = 2 * 3 * (64 + 16) * 2 * 32 * 2  # keys and values of 3 rows, 2 heads of 32
    assert term("generation", "keys and values") == 5 * one_layer
    assert term("generation", "attention of prompts") == 3 * 64 * 64 + 2 * 3 * 64 * 128 * 2
    assert term("export", "a model in float32") == 4 * NUM_WEIGHTS
    assert term("export", "largest tensor") == 6 * 512 * 128
    assert term("export", HOST_LIBRARIES.cause) == HOST_LIBRARIES.num_bytes
    assert term("disk", "merged model") == term("disk", "download of the base") == 2 * NUM_WEIGHTS
    assert term("disk", "adapter") == 4 * NUM_ADAPTER
    assert term("disk", "checkpoints") == 4 * (12 * NUM_ADAPTER + 4 * 4 * 7 * 2)  # keep 2, the best, a new one


def test_without_held_out_rows_nothing_is_evaluated() -> None:
    recipe = recipe_of(data={"eval": (), "seq_len": 32}, train={"grad_accum_steps": 1, "optimizer": "adamw_8bit"})
    plan = plan_training(recipe, tiny_config("llama", 2), device="cuda", longest_row=16)
    assert plan.peak_bytes("evaluation") == plan.peak_bytes("generation") == 0
    assert GRADIENTS not in {t.cause for t in plan.of("training")} or plan.peak_bytes() > 0
    assert not any("evaluation" in note for note in plan.notes)
    padded = recipe_of(data={"batching": "shuffled", "seq_len": 32}, model={"attn_implementation": "sdpa"})
    notes = plan_training(padded, tiny_config("llama", 2), device="cuda", longest_row=16).notes
    assert "16 tokens" in notes[0] and "as long as" not in notes[0]


def test_the_split_of_a_step_is_settled_with_the_rest() -> None:
    sections = {"data": {"seq_len": 256, "eval": ()}, "train": {"micro_batch_size": 1, "grad_accum_steps": 8}}
    config = tiny_config("llama", 4)
    fixed = plan_training(recipe_of(**sections), config, device="cuda", limit_bytes=8 * GIB)
    sections["train"]["memory"] = "auto"
    roomy = plan_training(recipe_of(**sections), config, device="cuda", limit_bytes=8 * GIB)
    assert fixed.settings()["micro_batch_size"] == 1 and roomy.settings()["micro_batch_size"] == 8
    sections["train"]["memory_limit_gib"] = 1.1 * fixed.traced_bytes() / GIB
    tight = plan_training(recipe_of(**sections), config, device="cuda", limit_bytes=8 * GIB)
    assert tight.settings()["micro_batch_size"] < 8 and tight.settings()["checkpointing"] == "none"


@pytest.mark.parametrize(
    ("rows", "new_tokens", "kept"), [(6, 0, 4), (7, 0, 1), (100, 0, 0), (2, 64, 4), (2, 2_840, 2), (2, 4_000, 0)]
)
def test_resident_layers_leave_room_for_what_is_held_out(rows: int, new_tokens: int, kept: int) -> None:
    """An evaluation may take more than a step does: `auto` keeps no layer dense in the room that it needs."""
    config, evaluation = tiny_config("llama", 4), {"batch_size": rows, "generate_rows": 2 if new_tokens else 0}
    sections = {"data": {"seq_len": 256}, "eval": evaluation | ({"max_new_tokens": new_tokens} if new_tokens else {})}
    train = {"micro_batch_size": 1, "checkpointing": "none", "resident_layers": 4}
    limit = plan_training(recipe_of(**sections, train=train), config, device="cpu").choice.peak_bytes
    train |= {"resident_layers": "auto", "memory_limit_gib": limit / GIB}
    plan = plan_training(recipe_of(**sections, train=train), config, device="cpu")
    held_out = [sum(t.num_bytes for t in plan.of(stage) if t.how != "constant") for stage in ON_DEVICE[1:]]
    assert plan.choice.resident_layers == kept
    assert kept == 0 or max(held_out) <= limit


def test_the_formula_is_no_cross_check_of_a_runs_own_batch() -> None:
    recipe, config = recipe_of(data={"seq_len": 64, "eval": ()}), tiny_config("llama", 2)
    batch = trial_batch(1, 64, 16, packed=True)
    assert plan_training(recipe, config, device="cuda", training_batch=batch).formula_bytes is None


def test_on_a_cpu_there_is_no_card() -> None:
    plan = plan_training(recipe_of(data={"seq_len": 64}), tiny_config("neox", 2), device="cpu")
    causes = {t.cause for t in plan.of("training")}
    assert HOST_LIBRARIES.cause in causes and CUDA_CONTEXT.cause not in causes
    assert plan.formula_bytes is None


@pytest.mark.parametrize(
    ("name", "rank", "seq_len", "fits", "too_small"),
    [
        ("smollm2-135m", 16, 1024, "RTX 3070", None),
        ("llama-3.1-8b", 16, 1024, "RTX 3060", "RTX 3070"),
        ("qwen3-32b", 8, 512, "L4", "RTX 4080"),
        ("llama-3.3-70b", 16, 1024, "RTX A6000", "A100 40GB"),
    ],
)
def test_published_models_on_common_cards(name: str, rank: int, seq_len: int, fits: str, too_small: str | None) -> None:
    """With the settings of this repository's recipes: on the cards that they name, and not on smaller ones."""
    recipe = recipe_of(
        adapter={"r": rank},
        data={"seq_len": seq_len},
        train={"micro_batch_size": 1, "checkpointing": "full", "resident_layers": 0},
        eval={"batch_size": 1},
    )
    plan = plan_training(recipe, published_config(name), device="cuda", limit_bytes=80 * GIB)
    assert plan.choice.checkpointing.kind == "full" and plan.choice.resident_layers == 0
    optimiser = next(t.num_bytes for t in plan.of("training") if t.cause == OPTIMISER)
    adapter = next(t.num_bytes for t in plan.of("training") if t.cause == ADAPTER)
    assert optimiser == pytest.approx(2 * adapter, rel=1e-3)
    assert plan.fits(find_card(fits).total_bytes)
    assert too_small is None or not plan.fits(find_card(too_small).total_bytes)
    assert plan.formula_bytes == pytest.approx(plan.traced_bytes(), rel=0.01)
