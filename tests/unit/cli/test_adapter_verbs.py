"""`qlora-train adapter` and `analyze` on tiny runs: what they write is taken by everything that takes a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_train.adapters.fold import Delta, read_deltas
from qlora_train.adapters.state import CONFIG, WEIGHTS
from qlora_train.artifacts.folders import MANIFEST, manifest_faults, publishing
from tests.commandline import run_cli, write_recipe

IDS = torch.arange(3, 40)[None, :]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """A folder with the runs `a` (r = 4, four steps) and `b` (r = 8 on fewer modules, another seed, one step)."""
    folder = tmp_path_factory.mktemp("adapters")
    common = {"data__eval": [], "eval__generate_rows": 0, "adapter__dropout": 0.0}
    recipe = write_recipe(folder, tiny_llama_dir, **common)
    assert run_cli("train", recipe, f"run.dir={folder / 'a'}", "train.max_steps=4").code == 0
    changes = ["adapter.r=8", "run.seed=1", "train.max_steps=1", "adapter.target_modules=[q_proj, up_proj]"]
    assert run_cli("train", recipe, f"run.dir={folder / 'b'}", *changes).code == 0
    return folder


def call(*arguments: str | Path) -> Any:
    """The result of a verb that must succeed."""
    outcome = run_cli(*arguments, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def dense(folder: Path) -> dict[str, torch.Tensor]:
    return {name: delta.dense(torch.device("cpu")) for name, delta in read_deltas(folder / "adapter").items()}


def logits(run: Path) -> torch.Tensor:
    from qlora_train.model.trained import load_trained, open_run

    with torch.no_grad():
        found: torch.Tensor = load_trained(open_run(run)).model(input_ids=IDS).logits
    return found


def plain_peft_logits(adapter: Path, model: Path) -> torch.Tensor:
    """Transformers and PEFT, without a line of ours."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quant = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(model, quantization_config=quant, dtype=torch.float32)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        found: torch.Tensor = PeftModel.from_pretrained(base, str(adapter)).eval()(input_ids=IDS).logits
    return found


def test_info_says_what_an_adapter_is(runs: Path) -> None:
    found = call("adapter", "info", runs / "a")
    assert (found["method"], found["r"], found["alpha"], found["step"]) == ("lora", 4, 8, 4)
    assert len(found["modules"]) == 14 and {m["scaling"] for m in found["modules"]} == {2}
    deltas = dense(runs / "a")
    for module in found["modules"]:
        norm = float(deltas[f"{module['module']}.weight"].norm())
        assert module["spectrum"]["norm"] == pytest.approx(norm, rel=1e-5)
    assert found["num_params"] == sum(t.numel() for t in load_file(runs / "a" / "adapter" / WEIGHTS).values())
    assert found["base"] == json.loads((runs / "a" / "base.json").read_text())["digest"]
    checkpoint = next((runs / "a" / "ckpt").glob("step-*"))
    assert call("adapter", "info", checkpoint)["base"] == found["base"]
    by_name, by_module = run_cli("adapter", "info", runs / "a"), run_cli("adapter", "info", runs / "a", "--modules")
    assert "q_proj" in by_name.out and "1.self_attn.q_proj" not in by_name.out
    assert "1.self_attn.q_proj" in by_module.out and "belongs to base" in by_module.out


def test_a_resized_adapter_is_a_run(runs: Path, tmp_path: Path, tiny_llama_dir: Path) -> None:
    """Growing changes no output; chat, export, plain PEFT and adapter.init_from take the folder."""
    target = tmp_path / "grown"
    found = call("adapter", "resize", runs / "a", target, "--r", "6")
    assert found["r"] == 6 and found["error_frac"] < 1e-6 and set(found["ranks"].values()) == {6}
    assert manifest_faults(target / "adapter") == [] and not (target / MANIFEST).exists()
    expected = logits(runs / "a")
    torch.testing.assert_close(logits(target), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain_peft_logits(target / "adapter", tiny_llama_dir), expected, rtol=1e-4, atol=1e-5)
    assert run_cli("chat", target, "--once", "list files", "--max-new-tokens", "2").code == 0
    exported = run_cli("export", target, tmp_path / "merged")
    assert exported.code == 0, exported.err
    changes = ["adapter.r=6", "adapter.alpha=6", f"adapter.init_from={target / 'adapter'}", "train.max_steps=2"]
    went_on = run_cli("train", runs / "recipe.yaml", f"run.dir={tmp_path / 'on'}", *changes)
    assert went_on.code == 0, went_on.err
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    trained = load_file(tmp_path / "on" / "adapter" / WEIGHTS)[stem]
    assert trained[:, 4:].abs().min() > 0, "the new directions train"


def test_resize_keeps_what_is_asked_for(runs: Path, tmp_path: Path, tiny_llama_dir: Path) -> None:
    source = dense(runs / "a")
    whole = float(torch.cat([d.flatten() for d in source.values()]).norm())
    sizes = {}
    for name, arguments in {
        "error": ["--error", "0.3"],
        "own": ["--error", "0.3", "--per-module"],
        "energy": ["--energy", "0.9"],
        "narrow": ["--r", "1"],
    }.items():
        found = call("adapter", "resize", runs / "a", tmp_path / name, *arguments)
        made = dense(tmp_path / name)
        lost = float(torch.cat([(source[m] - made[m]).flatten() for m in source]).norm())
        assert found["error_frac"] == pytest.approx(lost / whole, rel=1e-3), name
        assert found["error_frac"] == pytest.approx(found["expected_error_frac"], rel=1e-3), name
        sizes[name] = found["num_params"]
        if "--error" in arguments:
            assert found["error_frac"] <= 0.3 == found["bound"]
        if name == "energy":
            assert all(float((source[m] - made[m]).norm() / source[m].norm()) ** 2 <= 0.1 + 1e-6 for m in source)
    assert sizes["own"] < sizes["error"], "a rank for each module makes a smaller file"
    config = json.loads((tmp_path / "own" / "adapter" / CONFIG).read_text())
    assert config["rank_pattern"] and config["rank_pattern"] == config["alpha_pattern"]
    assert all("\\." in pattern for pattern in config["rank_pattern"]), "PEFT reads them as regular expressions"
    ours = logits(tmp_path / "own")
    torch.testing.assert_close(
        plain_peft_logits(tmp_path / "own" / "adapter", tiny_llama_dir), ours, rtol=1e-4, atol=1e-5
    )


def test_fold_makes_plain_lora_of_scaling_one(runs: Path, tmp_path: Path) -> None:
    found = call("adapter", "fold", runs / "a", tmp_path / "plain")
    assert found["error_frac"] < 1e-6 and found["r"] == 4
    config = json.loads((tmp_path / "plain" / "adapter" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    torch.testing.assert_close(logits(tmp_path / "plain"), logits(runs / "a"), rtol=1e-4, atol=1e-5)


def test_combine_adds_exactly_with_negative_weights(runs: Path, tmp_path: Path) -> None:
    """Modules of one adapter alone are taken as they are; then the nearest of a smaller rank, with its error."""
    first, second = dense(runs / "a"), dense(runs / "b")
    expected = {name: 0.5 * first[name] - 2 * second.get(name, torch.zeros(())) for name in first}
    weights = ["--weight", "0.5", "--weight", "-2"]
    found = call("adapter", "combine", runs / "a", runs / "b", tmp_path / "sum", *weights)
    assert found["error_frac"] < 1e-6 and set(found["ranks"].values()) == {4, 12} and found["notices"] == []
    for name, update in dense(tmp_path / "sum").items():
        torch.testing.assert_close(update, expected[name], rtol=1e-5, atol=1e-7)
    logits(tmp_path / "sum")  # loads on the base that it is bound to
    made = json.loads((tmp_path / "sum" / "adapter" / MANIFEST).read_text())["made"]
    assert [part["weight"] for part in made["from"]] == [0.5, -2]
    short = call("adapter", "combine", runs / "a", runs / "b", tmp_path / "short", *weights, "--r", "3")
    lost = [float((update - expected[name]).norm()) for name, update in dense(tmp_path / "short").items()]
    whole = float(torch.cat([e.flatten() for e in expected.values()]).norm())
    assert short["error_frac"] == pytest.approx(float(torch.tensor(lost).norm()) / whole, rel=1e-3) and short["r"] == 3


def test_ties_and_dare_differ_by_density_and_seed(runs: Path, tmp_path: Path) -> None:
    seen: dict[str, str] = {}
    for index, arguments in enumerate(
        [
            ["--type", "ties", "--density", "0.5"],
            ["--type", "ties", "--density", "0.1"],
            ["--type", "dare", "--density", "0.5"],
            ["--type", "dare", "--density", "0.5", "--seed", "1"],
        ]
    ):
        target = tmp_path / str(index)
        found = call("adapter", "combine", runs / "a", runs / "b", target, "--r", "8", *arguments)
        assert 0 < found["error_frac"] < 1 and found["r"] == 8
        digest = json.loads((target / "adapter" / MANIFEST).read_text())["files"][WEIGHTS]["sha256"]
        assert digest not in seen, f"{arguments} gives what {seen[digest]} gives"
        seen[digest] = str(arguments)


def test_diff_measures_both_ways(runs: Path, tmp_path: Path) -> None:
    found = call("adapter", "diff", runs / "a", runs / "b")
    first, second = dense(runs / "a"), dense(runs / "b")
    off = [(first[n] - second.get(n, torch.zeros(()))).flatten() for n in first]
    assert found["distance"] == pytest.approx(float(torch.cat(off).norm()), rel=1e-5)
    rows = {row["module"]: row for row in found["modules"]}
    name = "model.layers.0.mlp.up_proj"
    x, y = first[f"{name}.weight"].double(), second[f"{name}.weight"].double()
    assert rows[name]["cosine"] == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())), rel=1e-4)
    assert rows["model.layers.0.mlp.down_proj"]["cosine"] is None, "b leaves it alone"
    left, right = (torch.linalg.svd(update)[0] for update in (x, y))
    both = float((left[:, :4].T @ right[:, :8]).norm() ** 2) / 4
    assert rows[name]["outputs_overlap"] == pytest.approx(both, rel=1e-3)
    assert rows[name]["outputs_by_chance"] == 8 / 256 and rows[name]["inputs_by_chance"] == 8 / 128
    same = run_cli("adapter", "diff", runs / "a", runs / "a", "--modules")
    assert "only rounding" in same.out and "cosine 1.000" in same.out and "0.mlp.up_proj" in same.out


def test_adapters_of_other_bases_are_refused_with_both_named(runs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with publishing(other, manifest={"base": "f" * 64}) as folder:
        for name in (CONFIG, WEIGHTS):
            (folder / name).write_bytes((runs / "a" / "adapter" / name).read_bytes())
    base = json.loads((runs / "a" / "base.json").read_text())["digest"]
    for arguments in (("combine", runs / "a", other, tmp_path / "x"), ("diff", runs / "a", other)):
        outcome = run_cli("adapter", *arguments)
        assert outcome.code == 4
        for text in (str(runs / "a"), str(other), base[:16], "f" * 16):
            assert text in outcome.err
    assert not (tmp_path / "x").exists()


def test_a_folder_of_pefts_is_taken_with_a_notice(runs: Path, tmp_path: Path) -> None:
    """No manifest says which base it is for; it combines with a run, whose facts the result carries."""
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in (CONFIG, WEIGHTS):
        (foreign / name).write_bytes((runs / "b" / "adapter" / name).read_bytes())
    assert call("adapter", "info", foreign)["base"] is None
    both = run_cli("adapter", "combine", foreign, runs / "a", tmp_path / "both")
    assert both.code == 0 and "does not prove which base" in both.out
    logits(tmp_path / "both")
    alone = call("adapter", "resize", foreign, tmp_path / "alone", "--r", "2")
    assert alone["notices"] and [p.name for p in (tmp_path / "alone").iterdir()] == ["adapter"]
    assert not (tmp_path / "alone" / "adapter" / MANIFEST).exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["resize", "A", "OUT"], "exactly one of --r, --energy and --error"),
        (["resize", "A", "OUT", "--r", "2", "--error", "0.1"], "exactly one"),
        (["resize", "A", "OUT", "--r", "0"], "a rank is from 1"),
        (["resize", "A", "OUT", "--r", "2", "--per-module"], "one rank for all modules"),
        (["resize", "A", "OUT", "--energy", "1.5"], "above 0 and up to 1"),
        (["combine", "A", "OUT"], "no combination"),
        (["combine", "A", "B", "OUT", "--weight", "1"], "2 adapters and 1 weights"),
        (["combine", "A", "B", "OUT", "--weight", "0", "--weight", "0"], "not all 0"),
        (["combine", "A", "B", "OUT", "--density", "0.5"], "means nothing to cat"),
        (["combine", "A", "B", "OUT", "--type", "ties", "--r", "4"], "needs --density"),
        (["combine", "A", "B", "OUT", "--type", "dare", "--density", "0.5"], "full rank"),
        (["fold", "A", "A"], "exists already"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(runs: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    places = {"A": str(runs / "a"), "B": str(runs / "b"), "OUT": str(tmp_path / "out")}
    outcome = run_cli("adapter", *(places.get(argument, argument) for argument in arguments))
    assert outcome.code == 2 and says in outcome.err, outcome.err
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_adapter_is_named(runs: Path, tmp_path: Path) -> None:
    assert "neither a run folder nor an adapter" in run_cli("adapter", "info", tmp_path).err
    damaged = tmp_path / "run"
    damaged.mkdir()
    for path in ("recipe.resolved.yaml", "base.json"):
        (damaged / path).write_bytes((runs / "a" / path).read_bytes())
    assert "no finished adapter" in run_cli("adapter", "info", damaged).err
    with publishing(damaged / "adapter", manifest={"base": "f" * 64}) as folder:
        for name in (CONFIG, WEIGHTS):
            (folder / name).write_bytes((runs / "a" / "adapter" / name).read_bytes())
    assert "restore the run folder" in run_cli("adapter", "info", damaged).err


def test_analyze_one_run(runs: Path, tmp_path: Path) -> None:
    found = call("analyze", runs / "b", "--out", tmp_path / "look")
    look = found["looks"][0]
    assert len(look["spectra"]) == len(look["amplifications"]) == 4 and found["overlaps"] == []
    names = {path.name for path in (tmp_path / "look").iterdir()}
    assert names == {MANIFEST, "analysis.json"} | {
        f"{plot}.{kind}" for plot in ("spectra", "ranks", "amplification") for kind in ("png", "svg")
    }
    assert json.loads((tmp_path / "look" / "analysis.json").read_text()) == found
    weight = look["amplifications"][0]
    assert weight["quant_error_norm"] > 0 and weight["few"]["num_directions"] == 4
    shown = run_cli("analyze", runs / "b")
    for text in ("95 % in", "phi(A, start)", "amplified", "dW / quant. error", "a heuristic"):
        assert text in shown.out, text
    assert "reading the base" in shown.err
    again = run_cli("analyze", runs / "b", "--out", tmp_path / "look")
    assert again.code == 2 and "exists already" in again.err


def test_analyze_without_the_base_leaves_out_what_needs_it(runs: Path) -> None:
    look = call("analyze", runs / "a", "--no-base")["looks"][0]
    assert look["amplifications"] == [] and look["start_overlaps"] == [] and len(look["spectra"]) == 14


def test_analyze_two_runs_compares_their_directions(runs: Path) -> None:
    found = call("analyze", runs / "a", runs / "b")
    assert {(o["name"], o["directions"]) for o in found["overlaps"]} == {
        (name, what) for name in ("q_proj", "up_proj") for what in ("A", "delta_right", "delta_left")
    }
    first = found["overlaps"][0]
    assert (len(first["grid"]), len(first["grid"][0]), first["dim"], first["num_modules"]) == (4, 8, 128, 2)
    assert first["control"] is not None, "both starts are known"
    assert found["looks"][0]["recommendation"]["shared_rank"] is not None
    shown = run_cli("analyze", runs / "a", runs / "b")
    assert "inputs of B A" in shown.out and "by chance" in shown.out and "random starts overlap" in shown.out


def test_the_start_is_told_from_the_seed_alone(runs: Path) -> None:
    """After one step A is what it was: B is zero in it, so A has no gradient. To the bit."""
    from qlora_train.analysis.starts import start_of
    from qlora_train.model.trained import open_run

    run = open_run(runs / "b")
    start = start_of(run, run.source())
    assert start is not None
    trained = {name.removesuffix(".weight"): d.lora_A for name, d in read_deltas(runs / "b" / "adapter").items()}
    assert start.keys() == trained.keys() and all(torch.equal(start[name], trained[name]) for name in start)
    look = call("analyze", runs / "b")["looks"][0]
    assert [row["phi"] for row in look["start_overlaps"]] == pytest.approx([1, 1])


def test_a_methods_own_form_is_folded_or_refused(runs: Path, tmp_path: Path) -> None:
    """DoRA rescales rows: no pair of factors does the same."""
    config = json.loads((runs / "a" / "adapter" / CONFIG).read_text()) | {"use_dora": True}
    tensors = load_file(runs / "a" / "adapter" / WEIGHTS)
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(tensors[name].shape[0])
    dora = tmp_path / "dora"
    dora.mkdir()
    (dora / CONFIG).write_text(json.dumps(config))
    from safetensors.torch import save_file

    save_file(tensors, dora / WEIGHTS)
    info = call("adapter", "info", dora)
    assert info["method"] == "dora" and info["modules"][0]["spectrum"] is None
    refused = run_cli("adapter", "fold", dora, tmp_path / "plain")
    assert refused.code == 4 and "no product of two factors" in refused.err and not (tmp_path / "plain").exists()


def test_delta_is_the_seam() -> None:
    """What the tools add up is what export merges: one class."""
    from qlora_train.adapters import arithmetic

    assert arithmetic.Delta is Delta
