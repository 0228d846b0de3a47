"""The benchmark counts what it says it counts, and gives everyone the same job."""

from __future__ import annotations

import importlib
import io
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.packs import tiny_model

ROOT = Path(__file__).resolve().parents[3]
TOKENS, HIDDEN, WIDE, VOCABULARY, R = 8, 64, 128, 512, 4


@pytest.fixture(autouse=True)
def tools_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where `python tools/bench.py` runs."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def tool(name: str) -> Any:
    """A module of tools/."""
    return importlib.import_module(name)


def test_steps_fill_a_pack_with_whole_micro_batches_of_padded_rows() -> None:
    job = tool("contenders.job")
    lengths = np.random.default_rng(1).integers(20, 110, 400)
    options = job.Options(seq_len=1024)
    steps = job.choose_steps(lengths, options, 6)
    assert len(steps) == 6 and len({len(step) for step in steps}) == 1
    for step in steps:
        rows = lengths[list(step)]
        assert len(set(step)) == len(step) and len(step) % job.PADDED_ROWS == 0
        assert job.LEAST_FILL * 1024 <= rows.sum() <= 1024
    # As a shuffled data set gives them: sorted rows would spare padded micro-batches their padding.
    assert not all((np.diff(lengths[list(step)]) <= 0).all() for step in steps)
    assert job.choose_steps(lengths, options, 3) == steps[:3]


@pytest.mark.parametrize(("rows", "message"), [(12, "multiple"), (80, "no 80 rows"), (800, "no 800 rows")])
def test_steps_that_cannot_be_are_refused(rows: int, message: str) -> None:
    job = tool("contenders.job")
    with pytest.raises(ValueError, match=message):
        job.choose_steps(np.full(400, 50), job.Options(seq_len=1024, rows=rows), 2)


def test_everyone_starts_from_the_same_adapter() -> None:
    start_adapter = tool("contenders.job").start_adapter

    def adapter(dtype: torch.dtype) -> nn.Module:
        parts = {"lora_A": nn.Linear(HIDDEN, R, bias=False), "lora_B": nn.Linear(R, WIDE, bias=False)}
        layer = nn.ModuleDict({name: nn.ModuleDict({"default": part}) for name, part in parts.items()})
        return nn.ModuleDict({"q_proj": layer}).to(dtype)

    first, second = adapter(torch.float32), adapter(torch.bfloat16)
    start_adapter(first)
    start_adapter(second)
    weights, same = dict(first.named_parameters()), dict(second.named_parameters())
    a, b = "q_proj.lora_A.default.weight", "q_proj.lora_B.default.weight"
    assert torch.equal(weights[a].bfloat16(), same[a])
    assert 0.5 * HIDDEN**-0.5 < weights[a].abs().max() <= HIDDEN**-0.5
    assert not weights[b].any() and not same[b].any()
    with pytest.raises(ValueError, match="no adapter"):
        start_adapter(nn.Linear(HIDDEN, R))


def test_matmuls_are_counted_for_the_part_they_belong_to() -> None:
    counting = tool("contenders.counting")
    x = torch.ones(TOKENS, HIDDEN)
    down, base = torch.ones(HIDDEN, R), torch.ones(HIDDEN, WIDE)
    with counting.CountedOps({(WIDE, HIDDEN)}, VOCABULARY, HIDDEN) as counted:
        (x @ base) @ base.t()  # forward, and the gradient of the input
        (x @ down) @ down.t()
        torch.nn.functional.linear(x, torch.ones(VOCABULARY, HIDDEN))
        torch.zeros(TOKENS, HIDDEN).addmm_(torch.ones(TOKENS, 256), torch.ones(256, HIDDEN))  # a tile of the head
        torch.ones(2, TOKENS, 3) @ torch.ones(2, 3, TOKENS)
    assert counted.flops == {
        "base": 2 * 2 * TOKENS * HIDDEN * WIDE,
        "adapter": 2 * 2 * TOKENS * HIDDEN * R,
        "head": 2 * TOKENS * HIDDEN * (VOCABULARY + 256),
        "attention": 2 * 2 * TOKENS * 3 * TOKENS,
    }
    assert counted.num_dequantised == 0


def test_a_4bit_layer_is_one_matmul_and_a_dequantisation_each_way() -> None:
    counting = tool("contenders.counting")
    from bitsandbytes.nn import Linear4bit

    counting.register_gemm_4bit()
    layer = Linear4bit(HIDDEN, WIDE, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer = layer.to("cpu").requires_grad_(False)
    x = torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    with counting.CountedOps({(WIDE, HIDDEN)}, VOCABULARY, HIDDEN) as counted:
        layer(x).sum().backward()
    assert counted.flops == {"base": 2 * 2 * TOKENS * HIDDEN * WIDE}
    assert counted.num_dequantised == 2


def test_saved_bytes_are_distinct_storages_without_parameters() -> None:
    counting = tool("contenders.counting")
    layer = nn.Linear(HIDDEN, WIDE)
    saved = counting.SavedBytes(layer)
    x = torch.ones(TOKENS, HIDDEN)
    with saved.active():
        y = layer(x)  # saves x for the weight's gradient
        (torch.tanh(y) * y[:, :1]).sum()  # saves tanh's result, for both, and y through its view
    assert saved.num_bytes == 4 * TOKENS * (HIDDEN + 2 * WIDE)


def test_the_step_counter_agrees_with_the_formulas() -> None:
    """A bare model without checkpointing: two matmuls per weight and token, one layer's bytes times the layers."""
    counting = tool("contenders.counting")
    model = tiny_model("llama", attention="eager").train()
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    decoder = model.model
    linears = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
    counter = counting.StepCounter(model, decoder, {(m.out_features, m.in_features) for m in linears})
    counter.start()
    decoder(input_ids=torch.arange(TOKENS)[None] + 3, use_cache=False).last_hidden_state.sum().backward()
    counts = counter.stop()
    assert counts.flops["base"] == 4 * TOKENS * sum(m.weight.numel() for m in linears)
    assert counts.positions == TOKENS and counts.num_dequantised == 0
    assert 1.9 * counts.layer_saved_bytes < counts.saved_bytes < 2.2 * counts.layer_saved_bytes
    assert "forward" not in vars(decoder)

    decoder.layers[1].requires_grad_(False)
    model.activation_checkpointing_enable({"use_reentrant": False})
    counter = counting.StepCounter(model, decoder, {(m.out_features, m.in_features) for m in linears})
    counter.start()
    decoder(input_ids=torch.arange(TOKENS)[None] + 3, use_cache=False).last_hidden_state.sum().backward()
    again = counter.stop()
    assert again.layer_saved_bytes == counts.layer_saved_bytes
    assert 2 * 4 * TOKENS * 128 < again.saved_bytes < counts.saved_bytes / 4


def test_the_heads_clock_runs_between_decoder_and_gradient() -> None:
    counting = tool("contenders.counting")
    clock = counting.HeadClock(counting.Meter("cpu"))

    class Decoder(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            time.sleep(0.05)
            return type("Output", (), {"last_hidden_state": x * 2})()

    decoder = Decoder()
    clock.watch(decoder)
    started = time.perf_counter()
    hidden = decoder(torch.ones(2, requires_grad=True)).last_hidden_state
    time.sleep(0.1)
    hidden.sum().backward()
    assert 0.1 <= clock.seconds < time.perf_counter() - started - 0.05


def test_the_peak_begins_again() -> None:
    meter = tool("contenders.counting").Meter("cpu")
    size = 200 * 2**20
    torch.ones(size, dtype=torch.uint8)
    assert meter.peak() >= size
    meter.settle()
    meter.reset()
    before = meter.in_use()
    assert meter.peak() < before + size / 4
    torch.ones(size, dtype=torch.uint8)
    assert meter.peak() >= before + 0.9 * size


def test_on_a_card_time_waits_and_memory_is_the_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    meter, waited = tool("contenders.counting").Meter("cuda"), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 9)
    assert meter.now() <= time.perf_counter() and waited
    assert (meter.in_use(), meter.peak()) == (5, 9)


def test_device_and_model_reach_every_contender(tmp_path: Path) -> None:
    job = tool("contenders.job")
    options = job.Options(device="cuda", model=str(tmp_path))
    recipe = job.recipe_of("shell", options)
    assert (recipe.model.device, recipe.model.path) == ("cuda", str(tmp_path))
    assert job.recipe_of("shell", job.Options()).model.device == "cpu"
    bench = tool("bench")
    assert bench.parse(["--device", "cuda", "--model", str(tmp_path)]).threads == (1,)
    with pytest.raises(SystemExit):
        bench.parse(["--device", "cuda", "--scaling"])


def heard(losses: list[float | None], **loaded: Any) -> Any:
    """Three steps of 100 tokens or more, of which 10 supervised; they take 2, 4, 5 and 1 s, half of it the head."""
    measure = tool("contenders.measure")
    counts = {
        "flops": {"base": 5000, "head": 400},
        "num_dequantised": 8,
        "saved_bytes": 6000,
        "layer_saved_bytes": 900,
        "positions": 50,
    }
    answers = [
        {"loss": loss, "seconds": seconds, "head_s": seconds / 2, "peak_bytes": 1000 + number, "counts": None}
        for number, (loss, seconds) in enumerate(zip(losses, (2.0, 4.0, 5.0, 1.0), strict=False))
    ]
    answers[0]["counts"] = counts
    steps = len(losses)
    about = {"num_tokens": [100] * steps, "num_supervised": [10] * steps, "num_rows": 8, "num_micro_batches": 2}
    facts = {"loaded_bytes": 400, "num_quantised": 2, "num_layers": 3, **loaded}
    return measure._Heard(facts, about, [1] * steps, answers)


def test_a_result_is_the_best_timed_step_and_never_the_counted_one() -> None:
    measure = tool("contenders.measure")
    records = {
        "ours": heard([2.0, 1.5, 1.0]),
        "peft_loop": heard([2.0, 1.25, 1.0]),
        "ceiling": heard([None] * 3, num_quantised=0),
        "ours_bf16": heard([1.0, 0.5, 0.0], num_quantised=0),
    }
    result = measure._result("peft_loop", "shell", 1, 2700.0, records)
    assert (result.tokens_per_s, result.supervised_per_s, result.body_tokens_per_s) == (25.0, 2.5, 50.0)
    assert result.peak_bytes == 1001 - 400
    assert result.flops_per_token == {"base": 50.0, "adapter": 0.0, "attention": 0.0, "head": 4.0}
    assert result.head_flops_per_supervised == 40.0 and result.dequantisations == 2.0
    assert result.saved_bytes == 40.0 and result.layer_saved_bytes == 18.0
    assert result.matmul_frac == 54 * 25 / 2700
    assert result.loss_gap == 0.25 and not result.agrees
    assert measure._result("ours", "shell", 1, 2700.0, records).agrees
    for name in ("ceiling", "ours_bf16"):  # nothing to compare: no loss, and another base's
        other = measure._result(name, "shell", 1, 2700.0, records)
        assert other.loss_gap is None and other.agrees and other.dequantisations == 0.0
    records["trl_packed"] = heard([2.0, math.nan, 1.0])
    assert not measure._result("trl_packed", "shell", 1, 2700.0, records).agrees


def test_a_ratio_is_of_the_best_of_equally_many_repeats() -> None:
    """Whoever makes more steps has a better best one: that must not decide a ratio."""
    measure = tool("contenders.measure")
    records = {"ours": heard([2.0, 1.5, 1.0, 1.0]), "peft_loop": heard([2.0, 1.5, 1.0])}
    ours, peft = (measure._result(name, "shell", 1, 2700.0, records) for name in records)
    assert ours.tokens_per_s == 100.0 and peft.tokens_per_s == 25.0
    assert ours.ratio(peft) == ours.ratio(peft, head=False) == peft.ratio(ours) == 1.0 and ours.agrees and peft.agrees
    assert measure._common_rows(records, 3) == {"num_rows": 8, "num_tokens": [100] * 3, "num_supervised": [10] * 3}
    records["peft_loop"].about["num_tokens"][1] = 99
    with pytest.raises(RuntimeError, match="peft_loop had other rows than ours"):
        measure._common_rows(records, 3)
    two = measure._Heard({}, {}, [2, 2, 2, 1, 1, 2, 1], [])
    assert two.timed(2) == [1, 2, 5] and two.timed(1) == [3, 4, 6]


def test_a_ratio_between_different_losses_stands_in_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    measure, bench = tool("contenders.measure"), tool("bench")
    from rich.console import Console

    records = {"ours": heard([2.0, 1.5, 1.0]), "peft_loop": heard([2.0, 1.25, 1.0]), "trl_packed": heard([2, 1.5, 1])}
    results = [measure._result(name, "shell", 1, 2700.0, records) for name in records]
    steps = {"shell": {"num_rows": 8, "num_tokens": [100] * 3, "num_supervised": [10] * 3}}
    measured = measure.Measured(results, {"ours": {"base": "nf4"}}, [(8, 4)], 2, {1: 2700.0}, steps)
    bench.show(measured, Console(width=200))
    lines = capsys.readouterr().out.splitlines()
    speeds = {line.split("│")[1].strip(): line for line in reversed(lines) if line.count("│") == 11}
    assert "(1.00)" in speeds["PEFT, plain loop"]
    assert "(1.00)" not in speeds["TRL, packed"] and " 1.00 " in speeds["TRL, packed"]
    assert any("2.0000" in line and "1.2500" in line for line in lines)


def test_turns_answer_step_by_step_and_announce_a_set_when_it_can_begin() -> None:
    worker = tool("contenders.worker")
    model = tiny_model("llama", attention="eager")
    loaded = worker.Loaded(model, model.model, {}, lambda rows, turns: None, lambda rows: 1)
    commands = [{"threads": 1, "count": False, "settle": settle} for settle in (False, True)]
    answers = io.StringIO()
    heard = io.StringIO("".join(json.dumps(command) + "\n" for command in commands))
    turns = worker.Turns(heard, answers, loaded, tool("contenders.counting").Meter("cpu"))
    turns.open({"num_tokens": [5, 6]})
    assert answers.getvalue() == ""
    for loss in (1.5, None):
        turns.begin()
        time.sleep(0.01)
        turns.end(loss)
    facts, *steps = map(json.loads, answers.getvalue().splitlines())
    assert facts == {"num_tokens": [5, 6]}
    assert [step["loss"] for step in steps] == [1.5, None]
    assert all(step["seconds"] >= 0.01 and step["head_s"] == 0 and step["counts"] is None for step in steps)
    assert all(step["peak_bytes"] > 2**20 for step in steps)
    with pytest.raises(SystemExit):  # the other end is gone
        turns.begin()


def test_loss_gap() -> None:
    gap = tool("contenders.measure").loss_gap
    assert gap((2.0, 1.5), (2.25, 1.5)) == 0.25
    assert math.isnan(gap((2.0, math.nan, 1.0), (1.0, 1.0, 1.0)))
    assert gap((1.0,), (1.0, 2.0)) == 0.0, "a step that only one has made is nobody's difference"


def test_predicted_memory_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = tool("contenders.scaling")
    monkeypatch.setattr(scaling, "CHUNK_BYTES", {"cpu": 5000})
    monkeypatch.setattr(scaling, "BLOCK_BYTES", {"cpu": 100})
    shape = scaling.Shape(num_layers=2, hidden=4, layer_shapes=[(4, 4), (8, 4)], layer_saved_bytes=100.0)
    adapter, weights, inputs = 12 * 3 * 2 * 20, 2 * 48, 2 * 10 * 4 * 2
    assert scaling.predicted_bytes(shape, 10, 3, 20) == adapter + weights + inputs + 2 * 10 * 100
    head = 5000 + 2 * 100 + 6 * 10 * 4
    assert scaling.predicted_bytes(shape, 10, 3, 2000) == adapter + weights + inputs + head


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contenders", "ours,theirs"], "'theirs'"),
        (["--sets", "poems"], "'poems'"),
        (["--threads", "two"], "'two'"),
        (["--repeats", "0"], "--repeats"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tool("bench").parse(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tool("bench").parse(["--help"])
    assert ended.value.code == 0 and "filled to 99% or more" in capsys.readouterr().out


@pytest.mark.slow
def test_a_contender_that_dies_says_why() -> None:
    processes, job = tool("contenders.processes"), tool("contenders.job")
    with (
        processes.Worker("nobody", job.Options(), 1) as worker,
        pytest.raises(RuntimeError, match=r"(?s)nobody ended.*No module named 'contenders.nobody'"),
    ):
        worker.wait_until_loaded()


@pytest.mark.slow
@pytest.mark.real
def test_peers_lose_what_we_lose_at_every_step(tmp_path: Path) -> None:
    """The same rows, the same adapter, the same optimiser: TRL padded and packed, and PEFT, agree with us."""
    names = "ours,trl_padded,trl_packed,peft_loop"
    command = [sys.executable, "tools/bench.py", "--threads", "1", "--sets", "shell", "--repeats", "1"]
    figures = tmp_path / "figures.json"
    command += ["--seq-len", "512", "--contenders", names, "--json", str(figures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = {result["contender"]: result for result in json.loads(figures.read_text())["results"]}
    assert set(results) == set(names.split(","))
    # Ours is quick, and makes some more steps than the peers.
    assert {name: len(result["losses"]) for name, result in results.items() if name != "ours"} == dict.fromkeys(
        ("trl_padded", "trl_packed", "peft_loop"), 2
    )
    assert len(results["ours"]["losses"]) > 2
    tolerance = tool("contenders.results").LOSS_TOLERANCE
    assert all(result["loss_gap"] <= tolerance for result in results.values()), results
    assert results["ours"]["losses"][0] - results["ours"]["losses"][1] > 2 * tolerance  # they learn
