"""LoRD: the error of the factors is what theory says, and a run on a decomposed base is whole from recipe to export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_train.api import plan
from qlora_train.artifacts.layout import RunDir
from qlora_train.data.loader import collate
from qlora_train.errors import ModelError
from qlora_train.export.run import run_export
from qlora_train.export.tensors import MergedTensors
from qlora_train.model.causal import CausalModel
from qlora_train.model.lord import Factors, Moments, factorise, gather_moments, planned_config, real_tokens
from qlora_train.model.low_rank import RANKS, LowRankLinear, low_rank_layers, ranks_of, with_factors
from qlora_train.model.skeleton import build_skeleton, load_config
from qlora_train.model.source import Source
from qlora_train.model.trained import load_trained, open_run
from qlora_train.quant.bnb import Linear4bit
from qlora_train.recipe.load import load_recipe
from qlora_train.recipe.schema import AdapterSection
from tests.commandline import run_cli, write_recipe
from tests.packs import packed, table_of, tiny_model

KEPT = 0.9  # of a layer of 256 x 128: rank 64; narrower ones stay whole
LORD: dict[str, Any] = {"model__lord_keep_frac": KEPT, "model__lord_batches": 3, "eval__generate_rows": 0}


def layer_and_rows(out: int, inner: int, *, bias: bool, num_rows: int = 400) -> tuple[nn.Linear, torch.Tensor]:
    """A layer, and inputs that vary a hundred times as much along some directions as along others, about a mean."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(inner, out, bias=bias)
    spread = torch.logspace(0, -2, inner)
    mixing = torch.linalg.qr(torch.randn(inner, inner, generator=generator)).Q
    rows = (torch.randn(num_rows, inner, generator=generator) * spread + 0.3) @ mixing
    return layer.requires_grad_(False), rows


def moments_of(layer: nn.Linear, rows: torch.Tensor) -> Moments:
    moments = Moments(layer)
    for part in rows.split(150):
        moments.add(part if moments.of_inputs else layer(part))
    return moments


def applied(factors: Factors, rows: torch.Tensor) -> torch.Tensor:
    made = rows @ factors.reduce_KI.T @ factors.expand_OK.T
    return made if factors.bias_O is None else made + factors.bias_O


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("out", "inner"), [(24, 40), (40, 24)])
def test_the_error_is_the_sum_of_the_dropped_eigenvalues(out: int, inner: int, bias: bool) -> None:
    layer, rows = layer_and_rows(out, inner, bias=bias)
    factors = factorise(layer, moments_of(layer, rows), rank=8)
    outputs = layer(rows)
    error = float((outputs - applied(factors, rows)).square().sum(1).mean())
    assert error == pytest.approx(factors.dropped, rel=1e-3)
    centre = outputs.mean(0) if bias else torch.zeros(out)
    assert factors.total == pytest.approx(float((outputs - centre).square().sum(1).mean()), rel=1e-4)
    assert 0 < factors.dropped < factors.total

    U, S, V = torch.linalg.svd(layer.weight, full_matrices=False)
    of_weight = outputs - layer(rows) + rows @ (layer.weight - (U[:, :8] * S[:8]) @ V[:8]).T
    assert float(of_weight.square().sum(1).mean()) > 1.5 * error, "an SVD of the weight knows nothing of the inputs"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("out", "inner"), [(24, 40), (40, 24)])
def test_full_rank_is_exact(out: int, inner: int, bias: bool) -> None:
    layer, rows = layer_and_rows(out, inner, bias=bias)
    factors = factorise(layer, moments_of(layer, rows), rank=min(out, inner))
    torch.testing.assert_close(applied(factors, rows), layer(rows), rtol=1e-4, atol=1e-5)
    assert factors.dropped == pytest.approx(0, abs=1e-6) and factors.kept_frac == pytest.approx(1)


def test_moments_count_every_token_once_and_no_padding() -> None:
    table, model = table_of([5, 9, 3]), tiny_model("llama")
    layer = model.model.layers[1].mlp.down_proj
    for batch in (packed(table, [0, 2], [1]), collate(table, [[0], [1], [2]], 2)):
        assert int(real_tokens(batch).sum()) == 17
        moments = gather_moments(CausalModel(model), {"down": layer}, [batch])["down"]
        assert moments.num_rows == 17 and not moments.of_inputs
    alone = [collate(table, [[row]], 2) for row in range(3)]
    apart = gather_moments(CausalModel(model), {"down": layer}, alone)["down"]
    torch.testing.assert_close(moments.second(centred=False), apart.second(centred=False), rtol=1e-4, atol=1e-9)


def test_ranks_follow_from_shapes_and_names(tiny_llama_dir: Path, tmp_path: Path) -> None:
    def config(**changes: Any) -> Any:
        recipe = load_recipe(
            write_recipe(tmp_path, tiny_llama_dir, **{"model__lord_keep_frac": KEPT, **changes})
        ).recipe
        return planned_config(load_config(Source("tiny", tiny_llama_dir)), recipe)

    mlp = [f"model.layers.{index}.mlp.{name}_proj" for index in (0, 1) for name in ("gate", "up", "down")]
    assert ranks_of(config()) == dict.fromkeys(mlp, 64)
    assert ranks_of(config(model__lord_modules=["up_proj"])) == dict.fromkeys([mlp[1], mlp[4]], 64)
    assert ranks_of(config(quant__skip_modules=["gate_proj"])).keys() == {name for name in mlp if "gate" not in name}
    assert ranks_of(config(model__lord_keep_frac=None)) == {}

    dense, small = (build_skeleton(config(model__lord_keep_frac=keep)) for keep in (None, KEPT))
    saved = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in small.parameters())
    assert saved == 6 * (256 * 128 - 64 * (256 + 128)) == sum(layer.num_saved for _, layer in low_rank_layers(small))
    targets = with_factors(AdapterSection(target_modules=("up_proj", "q_proj")), small).target_modules
    assert targets == ("up_proj.reduce", "up_proj.expand", "q_proj")
    with pytest.raises(ModelError, match="no layer gets smaller"):
        config(model__lord_keep_frac=0.3)
    with pytest.raises(ModelError, match=r"model.lord_modules: 'up' matches no linear layer"):
        config(model__lord_modules=["up"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter__method": "pissa"}, "pissa is not made for a base in two factors"),
        ({"adapter__method": "dora"}, "dora is not made for a base in two factors"),
        ({"quant__quant_type": "int4"}, "int4 was never tried"),
        ({"export__base": "auto"}, "export.base: auto has no meaning"),
        ({"adapter__new_tokens": ["<x>"]}, "adapter.new_tokens was never tried"),
        ({"model__lord_keep_frac": None}, "model.lord_batches has no effect"),
        ({"model__lord_keep_frac": 1.0}, "above 0 and below 1"),
        ({"adapter__init_from": "old"}, "adapter of another base"),
    ],
)
def test_what_does_not_go_together(changes: dict[str, Any], words: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    outcome = run_cli("check", write_recipe(tmp_path, tiny_llama_dir, **{**LORD, **changes}))
    assert outcome.code == 2 and words in outcome.err, outcome.err


@pytest.fixture(scope="module")
def run(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe trained through the command line."""
    folder = tmp_path_factory.mktemp("lord")
    outcome = run_cli("train", write_recipe(folder, tiny_llama_dir, **LORD, train__keep=9))
    assert outcome.code == 0, outcome.err
    assert "6 of 14 layers are two factors of rank 64 to 64; 8 stay whole" in outcome.err
    return folder


def test_trains_both_factors_in_4_bit(run: Path, tiny_llama_dir: Path) -> None:
    summary = json.loads((run / "run" / "run.json").read_text())
    assert summary["adapter"]["loss"] < summary["base"]["loss"]
    trained = load_trained(open_run(run / "run"))
    layers = dict(low_rank_layers(trained.model))
    assert len(layers) == 6
    for layer in layers.values():
        for factor in (layer.reduce, layer.expand):
            assert isinstance(factor.get_base_layer(), Linear4bit)
            assert float(factor.lora_B["default"].weight.abs().max()) > 0
    record = json.loads((RunDir(run / "run").low_rank / "lord.json").read_text())
    assert all(0.5 < row["kept_frac"] <= 1 for row in record["layers"])
    assert trained.base.print.num_params == record["num_params"] < record["num_dense_params"]


def test_exports_the_ordinary_architecture(run: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    outcome = run_cli("export", run / "run", tmp_path / "merged")
    assert outcome.code == 0, outcome.err
    original, merged = (
        load_file(next(folder.glob("*.safetensors"))) for folder in (tiny_llama_dir, tmp_path / "merged")
    )
    assert {name: tensor.shape for name, tensor in merged.items()} == {n: t.shape for n, t in original.items()}
    assert RANKS not in json.loads((tmp_path / "merged" / "config.json").read_text())
    finished = open_run(run / "run")
    trained = load_trained(finished)
    layer: Any = trained.model.get_base_model().model.layers[1].mlp.up_proj
    assert isinstance(layer, LowRankLinear)
    x = torch.randn(3, 128)
    weight = MergedTensors(finished, finished.source()).exact("model.layers.1.mlp.up_proj.weight")
    torch.testing.assert_close(x @ weight.T, layer(x), rtol=1e-3, atol=1e-4)
    assert run_export(finished, tmp_path / "layers").verdict.kl_frac < 1e-3
    served = run_cli("export", run / "run", tmp_path / "served", "--format", "w4a16", "export.max_kl=100")
    assert served.code == 0, served.err
    for name in ("lora", "nf4-lora", "gguf-lora"):
        refused = run_cli("export", run / "run", tmp_path / name, "--format", name)
        assert refused.code != 0 and "layers are in two factors" in refused.err and not (tmp_path / name).exists()


def test_a_wrong_product_is_not_published(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    product = MergedTensors._product

    def faulty(self: MergedTensors, name: str, reduce: str, expand: str) -> torch.Tensor:
        made = product(self, name, reduce, expand)
        return made * 1.01 if name == "model.layers.0.mlp.down_proj.weight" else made

    monkeypatch.setattr(MergedTensors, "_product", faulty)
    outcome = run_cli("export", run / "run", tmp_path / "merged", "export.max_kl_frac=0.9")
    assert outcome.code != 0 and "down_proj" in outcome.err and not (tmp_path / "merged").exists()


def test_resumes_to_the_bit_and_makes_a_lost_base_again(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    recipe, run_dir = folder / "recipe.yaml", RunDir(folder / "run")
    weights = run_dir.adapter / "adapter_model.safetensors"
    straight, base = weights.read_bytes(), (run_dir.low_rank / "model.safetensors").read_bytes()
    outcome = run_cli("train", recipe, "--resume", "--from", "2")
    assert outcome.code == 0 and "is there already" in outcome.err, outcome.err
    assert weights.read_bytes() == straight

    shutil.rmtree(run_dir.low_rank)
    refused = run_cli("eval", folder / "run")
    assert refused.code != 0 and "is not there" in refused.err
    assert run_cli("train", recipe, "--resume", "--from", "4").code == 0
    assert (run_dir.low_rank / "model.safetensors").read_bytes() == base
    assert weights.read_bytes() == straight

    changed = run_cli("train", recipe, "--resume", "--from", "4", "model.lord_batches=2")
    assert changed.code != 0 and "lord_batches" in changed.err


def test_a_changed_factor_is_another_base(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(run / "run", folder)
    path = RunDir(folder).low_rank / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.reduce.weight"][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    outcome = run_cli("export", folder, tmp_path / "merged")
    assert outcome.code != 0 and "up_proj.reduce.weight" in outcome.err


def test_a_stopped_decomposition_leaves_nothing_that_looks_finished(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **settings: Any) -> None:
        raise RuntimeError("stopped")

    recipe = write_recipe(tmp_path, tiny_llama_dir, **LORD, train__max_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr("qlora_train.model.lord.save_file", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            run_cli("train", recipe)
    assert not RunDir(tmp_path / "run").low_rank.exists()
    assert run_cli("train", recipe).code == 0, "the folder of a run that never started is used"


@pytest.mark.slow
def test_the_plan_knows_it(tiny_llama_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama_dir, model__lord_keep_frac=KEPT)
    with_lord, without = plan(recipe).plan, plan(recipe, ["model.lord_keep_frac=null"]).plan
    assert any("LoRD" in note for note in with_lord.notes)
    terms = {term.cause: term.num_bytes for term in with_lord.of("disk")}
    assert terms["decomposed base"] > 0
    assert terms["merged model"] == {term.cause: term.num_bytes for term in without.of("disk")}["merged model"]


@pytest.mark.slow
def test_a_deep_check_writes_nothing(tiny_llama_dir: Path, tmp_path: Path) -> None:
    outcome = run_cli("check", write_recipe(tmp_path, tiny_llama_dir, **LORD), "--deep")
    assert outcome.code == 0, outcome.err
    assert not RunDir(tmp_path / "run").low_rank.exists()


def test_a_decomposed_base_is_no_model_to_train_on(run: Path, tmp_path: Path) -> None:
    outcome = run_cli("check", write_recipe(tmp_path, RunDir(run / "run").low_rank))
    assert outcome.code != 0 and "decomposed base of a run" in outcome.err


REAL = Path(__file__).resolve().parents[2] / "recipes" / "methods" / "lord.yaml"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_real_model(tmp_path: Path) -> None:
    """Every up_proj of SmolLM2 in two, a few steps, and the ordinary model out of it."""
    run = tmp_path / "run"
    keys = ("train.max_steps=3", "eval.generate_rows=0", "data.max_eval_rows=16", "model.lord_batches=4")
    outcome = run_cli("train", REAL, f"run.dir={run}", "model.lord_modules=[up_proj]", *keys)
    assert outcome.code == 0, outcome.err
    assert "30 of 210 layers are two factors of rank 320" in outcome.err
    outcome = run_cli("export", run, tmp_path / "merged", "--json")
    assert outcome.code == 0, outcome.err
    shapes = {name: tensor.shape for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items()}
    assert shapes["model.layers.0.mlp.up_proj.weight"] == (1536, 576)
    assert not [name for name in shapes if "reduce" in name or "expand" in name]
