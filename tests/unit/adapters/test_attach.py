"""What attaching builds: which layers, how many parameters, which start; and going on from a saved adapter."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_train.adapters.attach import adapter_facts, attach_adapter, check_attached, load_adapter
from qlora_train.adapters.fold import read_deltas, read_updates
from qlora_train.adapters.layers import Lora4bit, LoraFloat, lora_layers, register_layers
from qlora_train.adapters.state import WEIGHTS, adapter_tensors, save_adapter
from qlora_train.errors import ModelError
from qlora_train.model.skeleton import linear_layers, name_table
from qlora_train.recipe.schema import AdapterSection
from tests.loading import tiny_base, with_adapter
from tests.tiny import build_tiny_llama, build_tiny_neox, build_tiny_phi3

IDS = torch.arange(3, 19)[None, :]
LAST_NAMES = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
}
BUILDERS: dict[str, Callable[[Path], Path]] = {
    "llama": build_tiny_llama,
    "neox": build_tiny_neox,
    "phi3": build_tiny_phi3,
}


def short(name: str) -> str:
    return name.removeprefix("base_model.model.")


def clones(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def attached(folder: Path, *, seed: int = 0, quant: str = "none", **adapter: object) -> PeftModel:
    """An adapter as training starts it: B is zero."""
    return with_adapter(tiny_base(folder, quant_type=quant), seed=seed, randomise=False, **adapter)


@pytest.mark.parametrize("quant_type", ["nf4", "none"])
@pytest.mark.parametrize("kind", BUILDERS)
def test_all_linear_means_every_linear_layer_but_the_head(kind: str, quant_type: str, tmp_path: Path) -> None:
    base = tiny_base(BUILDERS[kind](tmp_path / kind), quant_type=quant_type)
    linear = linear_layers(base.model)
    shapes = [(layer.in_features, layer.out_features) for layer in linear.values()]
    num_base = sum(math.prod(entry.shape) for entry in base.print.tensors.values())
    assert set(name_table(linear)) == LAST_NAMES[kind]

    model = with_adapter(base, r=4)
    layers = lora_layers(model)
    assert {short(name) for name in layers} == set(linear) and len(linear) == 2 * len(LAST_NAMES[kind])
    wanted = Lora4bit if quant_type == "nf4" else LoraFloat
    assert {type(layer) for layer in layers.values()} == {wanted}
    facts = adapter_facts(model)
    assert facts.num_trainable == sum(4 * (rows + columns) for rows, columns in shapes)
    assert facts.num_frozen == num_base, "4-bit weights count as weights, not as bytes"
    assert facts.trainable_frac == facts.num_trainable / (facts.num_trainable + num_base)
    assert facts.modules == tuple(layers)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
        assert ".lora_" not in name or parameter.dtype == torch.float32, name


def test_the_count_by_hand(tiny_llama_dir: Path) -> None:
    """Two layers of q and o 128 x 128, k and v 128 x 64, gate, up and down 128 x 256, at r = 4."""
    assert adapter_facts(attached(tiny_llama_dir, r=4)).num_trainable == 2 * 4 * (2 * 256 + 2 * 192 + 3 * 384)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("q_proj", "v_proj"), {f"layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")}),
        (("layers.0.self_attn.q_proj",), {"layers.0.self_attn.q_proj"}),
        (
            ("layers.1.self_attn.q_proj", "down_proj"),
            {"layers.1.self_attn.q_proj", "layers.0.mlp.down_proj", "layers.1.mlp.down_proj"},
        ),
    ],
)
def test_named_targets_get_an_adapter_and_no_other(
    targets: tuple[str, ...], names: set[str], tiny_llama_dir: Path
) -> None:
    layers = lora_layers(attached(tiny_llama_dir, target_modules=targets))
    assert {short(name).removeprefix("model.") for name in layers} == names


def test_a_bfloat16_base_gets_a_float32_adapter(tiny_llama_dir: Path) -> None:
    model = with_adapter(tiny_base(tiny_llama_dir, dtype=torch.bfloat16))
    dtypes = {parameter.dtype for name, parameter in model.named_parameters() if ".lora_" in name}
    assert dtypes == {torch.float32}
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16


def test_the_start_follows_from_the_seed_alone(tiny_llama_dir: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = clones(attached(tiny_llama_dir, seed=7))
    assert torch.equal(torch.get_rng_state(), before), "attaching draws from its own generator"
    torch.manual_seed(2)
    assert equal(clones(attached(tiny_llama_dir, seed=7)), first)
    other = clones(attached(tiny_llama_dir, seed=8))
    for name, tensor in first.items():
        if "lora_A" in name:
            assert not torch.equal(other[name], tensor) and bool(tensor.any()), name
        else:
            assert not bool(tensor.any()), "B starts at zero"


@pytest.mark.parametrize("quant_type", ["nf4", "none"])
def test_step_zero_is_the_base_to_the_bit(quant_type: str, tiny_llama_dir: Path) -> None:
    base = tiny_base(tiny_llama_dir, quant_type=quant_type)
    with torch.no_grad():
        expected = base.model(input_ids=IDS).logits
        model = with_adapter(base, randomise=False)
        assert torch.equal(model(input_ids=IDS).logits, expected)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.01)
        assert not torch.equal(model(input_ids=IDS).logits, expected), "negative control"


def test_rslora_scales_by_the_root_of_r(tiny_llama_dir: Path) -> None:
    scalings = {}
    for method in ("lora", "rslora"):
        model = attached(tiny_llama_dir, method=method, r=16, alpha=8.0, target_modules=("q_proj",))
        layers = lora_layers(model).values()
        assert model.peft_config["default"].use_rslora == (method == "rslora")
        scalings[method] = {layer.scaling["default"] for layer in layers}
    assert scalings == {"lora": {8 / 16}, "rslora": {8 / 4}}


def test_dropout_acts_in_training_only(tiny_llama_dir: Path) -> None:
    model = with_adapter(tiny_base(tiny_llama_dir, quant_type="none"), dropout=0.5)
    plain = with_adapter(tiny_base(tiny_llama_dir, quant_type="none"), dropout=0.0)
    with torch.no_grad():
        expected = plain.eval()(input_ids=IDS).logits
        assert torch.equal(model.eval()(input_ids=IDS).logits, expected)
        model.train()
        outputs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outputs.append(model(input_ids=IDS).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], expected)


@pytest.fixture(scope="module")
def saved(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter of r = 4, alpha = 8 with random B, on disk and in memory."""
    folder = tmp_path_factory.mktemp("adapter")
    model = with_adapter(tiny_base(tiny_llama_dir, quant_type="none"), seed=5, dropout=0.25)
    save_adapter(model, folder)
    return folder, clones(model)


def test_init_from_goes_on_to_the_bit(saved: tuple[Path, dict[str, torch.Tensor]], tiny_llama_dir: Path) -> None:
    folder, tensors = saved
    model = attached(tiny_llama_dir, seed=99, init_from=folder, dropout=0.1)
    assert equal(clones(model), tensors)
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if ".lora_" in name)
    assert model.peft_config["default"].lora_dropout == 0.1, "the dropout is the recipe's"
    dropouts = {getattr(layer.lora_dropout["default"], "p", None) for layer in lora_layers(model).values()}
    assert dropouts == {0.1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_init_from_an_adapter_in_half_precision(
    saved: tuple[Path, dict[str, torch.Tensor]], tiny_llama_dir: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    shutil.copytree(saved[0], tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    halves = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(halves, path, {"format": "pt"})
    found = clones(attached(tiny_llama_dir, init_from=tmp_path / "adapter"))
    assert equal(found, {name: tensor.to(dtype).float() for name, tensor in saved[1].items()})
    halves[min(halves)] = halves[min(halves)].float()
    save_file(halves, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"expected .* torch\.float32"):
        attached(tiny_llama_dir, init_from=tmp_path / "adapter")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"r": 8}, "r is 4 there and 8 here"),
        ({"alpha": 16.0}, r"alpha is 8\.0 there and 16\.0 here"),
        ({"method": "rslora"}, "method is lora there and rslora here"),
        ({"method": "dora"}, "method is lora there and dora here"),
        ({"target_modules": ("q_proj",)}, "target_modules is"),
    ],
)
def test_init_from_refuses_another_scale(
    asked: dict[str, object], words: str, saved: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    section = AdapterSection(**{"r": 4, "alpha": 8.0, "init_from": saved[0], **asked})  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=words):
        attach_adapter(nn.Module(), section, 0, base_name="tiny")


@pytest.mark.parametrize("trainable", [False, True])
def test_saved_and_loaded_to_the_bit(
    trainable: bool, saved: tuple[Path, dict[str, torch.Tensor]], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder, tensors = saved
    model = load_adapter(tiny_base(tiny_llama_dir).model, folder, trainable=trainable)
    assert equal(clones(model), tensors)
    assert {type(layer) for layer in lora_layers(model).values()} == {Lora4bit}
    flags = {parameter.requires_grad for name, parameter in model.named_parameters() if ".lora_" in name}
    assert flags == {trainable}
    save_adapter(model, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def _missing(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def _extra(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name.replace("layers.0", "layers.9")] = tensors[name].clone()


def _misshapen(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][:, :64].contiguous()


def _nan(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name][0, 0] = float("nan")


@pytest.mark.parametrize("spoil", [_missing, _extra, _misshapen, _nan], ids=lambda f: f.__name__)
def test_loading_is_strict(
    spoil: Callable[[dict[str, torch.Tensor], str], None],
    saved: tuple[Path, dict[str, torch.Tensor]],
    tiny_llama_dir: Path,
    tmp_path: Path,
) -> None:
    """PEFT itself warns of a missing or an extra tensor and goes on."""
    (tmp_path / "adapter_config.json").write_bytes((saved[0] / "adapter_config.json").read_bytes())
    tensors = load_file(saved[0] / WEIGHTS)
    spoil(tensors, min(tensors))
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match=r"lora_A|layers"):
        load_adapter(tiny_base(tiny_llama_dir, quant_type="none").model, tmp_path)


class Mixed(nn.Module):
    """A linear layer, a convolution and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.linear = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 1)


def test_layers_of_another_kind_are_refused() -> None:
    def wrap(*targets: str) -> PeftModel:
        return get_peft_model(Mixed(), register_layers(LoraConfig(r=2, target_modules=list(targets))))

    check_attached(wrap("linear"))
    with pytest.raises(ModelError, match=r"kind we do not train \(Conv1d\)"):
        check_attached(wrap("linear", "conv"))


def test_an_embedding_that_is_the_head_too_is_refused(tiny_llama_dir: Path) -> None:
    with pytest.raises(ModelError, match="is the output head too"):
        attached(tiny_llama_dir, embeddings=True)


def test_an_adapter_on_the_embedding_is_peft_s(tmp_path: Path) -> None:
    """Its A starts at zero and its B is random; PEFT loads the folder, and the merged table gives the same logits."""
    folder = build_tiny_llama(tmp_path / "untied", tie=False)
    base = tiny_base(folder)
    with torch.no_grad():
        expected = base.model(input_ids=IDS).logits
    model = attach_adapter(base.model, AdapterSection(r=4, alpha=8.0, embeddings=True), 0, base_name="tiny")
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected)
    model(input_ids=IDS).logits.square().sum().backward()
    parameters = {name: p for name, p in model.named_parameters() if "lora_embedding" in name}
    reached = {name.rpartition(".lora_")[2] for name, p in parameters.items() if p.grad is not None and p.grad.any()}
    assert reached == {"embedding_A.default"}
    for parameter in parameters.values():
        nn.init.normal_(parameter.data, std=0.3)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(model.eval(), adapter)
    with torch.no_grad():
        ours = model(input_ids=IDS).logits
        theirs = PeftModel.from_pretrained(tiny_base(folder).model, str(adapter)).eval()(input_ids=IDS).logits
        again = load_adapter(tiny_base(folder).model, adapter).eval()(input_ids=IDS).logits
        merged = tiny_base(folder).model
        update = read_updates(adapter)["model.embed_tokens.weight"]
        table = merged.get_input_embeddings().weight
        assert update.shape == tuple(table.shape)
        table.copy_(update.applied(table))
        into_base = merged(input_ids=IDS).logits
    assert torch.equal(again, ours) and not torch.allclose(ours, expected, atol=1e-2)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(into_base, ours, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="adapts the token embedding"):
        read_deltas(adapter)
    section = AdapterSection(r=4, alpha=8.0, init_from=adapter)
    with pytest.raises(ModelError, match="embeddings is True there and False here"):
        attach_adapter(tiny_base(folder).model, section, 0, base_name="tiny")


def test_a_base_that_would_train_is_our_bug() -> None:
    model = get_peft_model(Mixed(), register_layers(LoraConfig(r=2, target_modules=["linear"])))
    model.base_model.model.conv.weight.requires_grad = True
    with pytest.raises(AssertionError, match="conv"):
        check_attached(model)


def test_an_adapter_in_half_precision_is_our_bug() -> None:
    model = get_peft_model(Mixed(), register_layers(LoraConfig(r=2, target_modules=["linear"])))
    next(iter(lora_layers(model).values())).lora_A.to(torch.bfloat16)
    with pytest.raises(AssertionError, match="not float32"):
        check_attached(model)
