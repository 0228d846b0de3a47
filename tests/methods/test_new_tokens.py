"""`adapter.new_tokens` through the command line: trained, resumed to the bit, exported, served, or refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_train.adapters.updates import VocabularyRows
from qlora_train.export import tensors as tensors_module
from qlora_train.export.layers import CandidateWeights
from qlora_train.export.merge import Caster
from qlora_train.export.tensors import MergedTensors
from qlora_train.memory.estimate import Request, Shallow
from qlora_train.memory.formula import formula_costs
from qlora_train.model.skeleton import load_config
from qlora_train.model.source import Source
from qlora_train.model.trained import open_run
from qlora_train.recipe.load import load_recipe
from tests.clients import llama_cpp
from tests.commandline import Outcome, run_cli, write_recipe, write_rows
from tests.tiny import build_tiny_llama, build_tiny_tokenizer

TOKENS = ["<tool>", "</tool>", "<|endoftext|>"]
SPARE = 8  # rows of a padded table
TABLES = {"tied": ["model.embed_tokens.weight"], "untied": ["model.embed_tokens.weight", "lm_head.weight"]}


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    made = []
    for index in range(start, start + count):
        answer = f"<tool>ls {index}</tool> " + "ls " * (index % 4)
        user = {"role": "user", "content": f"call <tool> number {index}"}
        made.append({"messages": [user, {"role": "assistant", "content": answer.strip()}]})
    return made


def recipe(folder: Path, model: Path, **changes: Any) -> Path:
    write_rows(folder / "train.jsonl", rows(20))
    write_rows(folder / "test.jsonl", rows(6, 100))
    settings = {"adapter__new_tokens": TOKENS, "train__weight_decay": 0.1, "train__keep": 5, **changes}
    return write_recipe(folder, model, **settings)


@pytest.fixture(scope="module", params=["tied", pytest.param("untied", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    """Tied with rows to spare; untied without, so that both tables grow."""
    return str(request.param)


@pytest.fixture(scope="module")
def model_dir(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocab_size = len(build_tiny_tokenizer()) + (SPARE if kind == "tied" else 0)
    return build_tiny_llama(tmp_path_factory.mktemp(kind) / "llama", tie=kind == "tied", vocab_size=vocab_size)


@pytest.fixture(scope="module")
def trained(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    folder = tmp_path_factory.mktemp("new_tokens")
    return folder, run_cli("train", recipe(folder, model_dir), "--json")


def test_check_names_the_tokens_and_shows_each_as_one(kind: str, model_dir: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, model_dir)
    outcome = run_cli("check", path)
    said = " ".join(outcome.out.split())
    assert outcome.code == 0, outcome.err
    assert "new tokens: <tool> " in said and "(added)" in said and "<|endoftext|> 0" in said
    assert "[<tool>]" in said and "[</tool>]" in said, "each is one token, and trained in answers"
    assert ("gets 2 more" in said) == (kind == "untied")
    assert "<|endoftext|> occurs in none of the training rows" in said


@pytest.mark.slow
def test_a_deep_check_measures_the_rows_gradients(kind: str, model_dir: Path, tmp_path: Path) -> None:
    deep = run_cli("check", recipe(tmp_path, model_dir), "--deep", "--json")
    assert deep.code == 0, deep.err
    found = {one["what"]: one["measured"] for one in json.loads(deep.out)["findings"] if "new tokens" in one["what"]}
    # `<|endoftext|>` is read nowhere; every row of a head is reached.
    expected = {"gradient of new tokens in model.embed_tokens": "in 3 of 3 rows"}
    if kind == "untied":
        expected = {
            "gradient of new tokens in model.embed_tokens": "in 2 of 2 rows",
            "gradient of new tokens in lm_head": "in 3 of 3 rows",
        }
    assert found == expected


def test_rows_are_trained_and_the_run_folder_holds_them(
    kind: str, trained: tuple[Path, Outcome], model_dir: Path
) -> None:
    folder, outcome = trained
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["adapter"]["loss"] < result["base"]["loss"]
    adapter = folder / "run" / "adapter"
    stored = load_file(adapter / "adapter_model.safetensors")
    found = {name for name in stored if "trainable_tokens" in name}
    assert len(found) == len(TABLES[kind])
    assert {tuple(stored[name].shape) for name in found} == {(3, 128)}
    ids = AutoTokenizer.from_pretrained(adapter)("<tool>ls</tool>", add_special_tokens=False)["input_ids"]
    assert ids[0] == len(build_tiny_tokenizer()) and ids[-1] == ids[0] + 1
    plan, measured = result["planned_memory_bytes"], result["measured_memory_bytes"]
    assert measured == pytest.approx(plan, rel=0.1)
    base = load_file(model_dir / "model.safetensors")["model.embed_tokens.weight"]
    own = stored["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    start = torch.stack([base[0].float(), *[base.float().mean(0)] * 2])
    assert (own - start).abs().amax(1)[1:].min() > 1e-3, "the new rows moved"
    # `<|endoftext|>` is never read: only a tied row moves, by the head's share of its gradient; decay would show.
    assert ((own - start)[0].abs().max() == 0) == (kind == "untied")


@pytest.mark.slow
def test_a_resumed_run_is_the_straight_one_to_the_bit(
    trained: tuple[Path, Outcome], model_dir: Path, tmp_path: Path
) -> None:
    again = recipe(tmp_path, model_dir)
    shutil.copytree(trained[0] / "run", tmp_path / "run")
    outcome = run_cli("train", again, "--resume", "--from", "2", "--json")
    assert outcome.code == 0, outcome.err
    name = "adapter_model.safetensors"
    ours, theirs = ((folder / "run" / "adapter" / name).read_bytes() for folder in (trained[0], tmp_path))
    assert ours == theirs
    other = run_cli("train", again, "--resume", "--from", "2", 'adapter.new_tokens=["<tool>", "</tool>"]')
    assert other.code == 5 and "adapter.new_tokens" in other.err


def test_eval_and_chat_use_the_same_tokens_and_rows(trained: tuple[Path, Outcome]) -> None:
    folder, outcome = trained
    again = run_cli("eval", folder / "run", "--json")
    assert again.code == 0, again.err
    for side in ("base", "adapter"):
        stored = json.loads(outcome.out)[side]["loss"]
        assert json.loads(again.out)[side]["loss"] == pytest.approx(stored, rel=1e-6), side
    chat = run_cli("chat", folder / "run", "--once", "call <tool>", "--max-new-tokens", "4")
    assert chat.code == 0, chat.err


def test_the_export_has_the_rows_and_the_tokens(
    kind: str, trained: tuple[Path, Outcome], model_dir: Path, tmp_path: Path
) -> None:
    target = tmp_path / "merged"
    outcome = run_cli("export", trained[0] / "run", target, "export.verify=whole", "--json")
    assert outcome.code == 0, outcome.err
    base, merged = (load_file(folder / "model.safetensors") for folder in (model_dir, target))
    stored = load_file(trained[0] / "run" / "adapter" / "adapter_model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<tool>", "</tool>"])
    assert base.keys() == merged.keys()
    for name in TABLES[kind]:
        rows = stored[f"base_model.model.{name.removesuffix('.weight')}.token_adapter.trainable_tokens_delta"]
        assert torch.equal(merged[name][ids], rows.to(torch.bfloat16)), name
        others = [number for number in range(len(base[name])) if number not in ids]
        assert torch.equal(merged[name][others], base[name][others]), name
    config = json.loads((target / "config.json").read_text())
    assert config["vocab_size"] == len(merged["model.embed_tokens.weight"])
    assert config["vocab_size"] == ids[-1] + 1 + (SPARE - 2 if kind == "tied" else 0), "never padded"
    model, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(info.values())
    assert model(input_ids=torch.tensor([ids])).logits.shape[-1] == config["vocab_size"]
    assert json.loads(outcome.out)["verdict"]["worst_layer"]["ratio"] < 1.5
    assert "`<tool>`, `</tool>`" in (target / "README.md").read_text()
    messages = [{"role": "user", "content": "call <tool> number 3"}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    said = model.generate(torch.tensor([asked]), max_new_tokens=1, do_sample=False)[0, len(asked) :].tolist()
    assert said[0] in ids[1:], "an answer begins with a new token, as all that it was trained on do"
    assert tokenizer.decode(said, skip_special_tokens=True) in TOKENS


@pytest.mark.slow
def test_layers_and_whole_come_to_the_same_verdict(trained: tuple[Path, Outcome], tmp_path: Path) -> None:
    outcome, layers = (
        run_cli("export", trained[0] / "run", tmp_path / how, f"export.verify={how}", "--json")
        for how in ("whole", "layers")
    )
    assert outcome.code == 0, outcome.err
    assert layers.code == 0, layers.err
    one, other = (json.loads(each.out)["verdict"] for each in (outcome, layers))
    for side in ("merged", "adapter_off"):
        assert one[side]["mean_kl"] == pytest.approx(other[side]["mean_kl"], rel=1e-3, abs=1e-8), side


def test_slices_of_a_table_are_those_of_the_whole_which_is_not_made(
    kind: str, trained: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(trained[0] / "run")
    tensors = MergedTensors(run, run.source())
    for name in TABLES[kind]:
        whole = tensors.exact(name)
        assert whole.dtype == torch.float32
        rounded = tensors.exact(name, torch.bfloat16)
        assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, whole.bfloat16())
        with monkeypatch.context() as patch:
            patch.setattr(MergedTensors, "exact", lambda *_: pytest.fail("the whole was merged for a slice"))
            weights = CandidateWeights(tensors, torch.bfloat16)
            for start in range(0, len(whole), 100):
                stop = min(start + 100, len(whole))
                found = tensors.rows(name, start, stop)
                assert found is not None and torch.equal(found, whole[start:stop])
                assert torch.equal(weights.rows(name, start, stop), rounded[start:stop].float())
            last = tensors.rows(name, len(whole) - 1, len(whole))
            assert last is not None and torch.equal(last, whole[-1:]), "a row that the base may lack"


def test_merging_a_table_makes_no_copy_beside_what_is_written(
    kind: str, trained: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As training held it, which is float32 on a CPU, and as it is written; before that as it is read."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Large(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() >= 200 * 128:
                made.setdefault(out.untyped_storage().data_ptr(), out)
            return out

    monkeypatch.setattr(tensors_module, "_BLOCK", 1000)
    monkeypatch.setattr(tensors_module, "_BLOCK_ROWS", 100)
    run = open_run(trained[0] / "run")
    for name in TABLES[kind]:
        made: dict[int, torch.Tensor] = {}
        caster = Caster(MergedTensors(run, run.source()), torch.bfloat16)
        with Large():
            written = caster.produce(name)
        assert [tensor.dtype for tensor in made.values()] == [torch.bfloat16, torch.float32, torch.bfloat16]
        exact = caster.tensors.exact(name)
        lost = float((written.float() - exact).norm())
        assert caster.rows[0].rounding_norm == pytest.approx(lost, rel=1e-5) and lost > 0


def test_rows_that_are_not_merged_are_caught(
    trained: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one token, and by a little: the mean over tokens would not show it."""
    real = tensors_module.read_updates

    def spoiled(folder: Path) -> dict[str, Any]:
        updates = dict(real(folder))
        table = updates["model.embed_tokens.weight"]
        assert isinstance(table, VocabularyRows)
        moved = table.rows.clone()
        moved[1] *= 0.98
        return {**updates, "model.embed_tokens.weight": replace(table, rows=moved)}

    monkeypatch.setattr(tensors_module, "read_updates", spoiled)
    outcome = run_cli("export", trained[0] / "run", tmp_path / "x", "export.verify_rows=2")
    assert outcome.code == 4 and "model.embed_tokens.weight by itself is off by" in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["lora", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gguf-lora", "nf4-lora"))]
)
def test_formats_of_an_adapter_alone_are_refused(name: str, trained: tuple[Path, Outcome], tmp_path: Path) -> None:
    outcome = run_cli("export", trained[0] / "run", tmp_path / "x", "--format", name)
    assert outcome.code == 4 and "trains the rows of 3 tokens" in outcome.err and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_gguf_carries_the_tokens(trained: tuple[Path, Outcome], tmp_path: Path) -> None:
    from gguf import GGUFReader

    outcome = run_cli("export", trained[0] / "run", tmp_path / "x", "--format", "gguf-f16")
    assert outcome.code == 0, outcome.err
    reader = GGUFReader(next((tmp_path / "x").glob("*.gguf")))
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    types = reader.get_field("tokenizer.ggml.token_type").contents()
    kinds = {text: types[tokens.index(text)] for text in TOKENS}
    assert kinds["<tool>"] == kinds["</tool>"] == 4 and kinds["<|endoftext|>"] == 3, "user-defined; control"
    table = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    assert table.data.shape[0] == len(tokens) == reader.get_field("llama.vocab_size").contents()


@pytest.mark.parametrize(
    ("keys", "code", "words"),
    [
        ({"new_tokens": [""]}, 2, "adapter.new_tokens"),
        ({"new_tokens": ["<a>", "<a>"]}, 2, "adapter.new_tokens: '<a>' is given twice"),
        ({"new_tokens": [" <a>"]}, 2, "begins or ends with white space"),
        ({"new_tokens": ["<a>"], "embeddings": True}, 2, "adapts the same rows"),
        ({"new_tokens": ["<a>"], "method": "dora"}, 2, "adapter.new_tokens has no effect: adapter.method is dora"),
        ({"new_tokens": ["xylophones"]}, 4, "'xylophones' is an ordinary word, which the tokenizer writes as"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_one_clear_error(
    keys: dict[str, Any], code: int, words: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    changes = {f"adapter__{key}": value for key, value in keys.items()}
    outcome = run_cli("check", recipe(tmp_path, tiny_llama_dir, **changes))
    assert outcome.code == code and words in " ".join(outcome.err.split()), outcome.err


@pytest.mark.slow
def test_whoever_reads_an_adapter_knows_the_rows(kind: str, trained: tuple[Path, Outcome], tmp_path: Path) -> None:
    run = trained[0] / "run"
    info = run_cli("adapter", "info", run)
    assert info.code == 0, info.err
    for name in TABLES[kind]:
        assert f"3 rows of new tokens in {name.removesuffix('.weight')}" in " ".join(info.out.split())
    analysis = run_cli("analyze", run)
    assert analysis.code == 0, analysis.err
    assert "the rows of new tokens in " in " ".join(analysis.out.split())
    report = run_cli("report", run, "--out", tmp_path / "page.html")
    assert report.code == 0, report.err
    fold = run_cli("adapter", "fold", run, tmp_path / "folded")
    assert fold.code == 4 and "trains the rows of 3 tokens" in fold.err
    both = run_cli("chat", run, "--adapter", run, "--once", "x")
    assert both.code == 4 and "a tokenizer of its own" in both.err


@pytest.mark.slow
def test_4_bit_formats_hold_the_rows(trained: tuple[Path, Outcome], tmp_path: Path) -> None:
    """Embedding and head stay bfloat16 in both; what 4 bits cost the layers is accepted here."""
    adapter = load_file(trained[0] / "run" / "adapter" / "adapter_model.safetensors")
    rows = adapter["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    published = []
    for name in ("nf4", "w4a16"):
        outcome = run_cli("export", trained[0] / "run", tmp_path / name, "--format", name, "export.max_kl=50")
        if outcome.code:  # nothing of the training is left: refused with the figures, after it was read back
            assert outcome.code == 4 and "nothing of the training is left" in outcome.err, outcome.err
            continue
        stored = load_file(tmp_path / name / "model.safetensors")["model.embed_tokens.weight"]
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["vocab_size"] == len(stored)
        ids = AutoTokenizer.from_pretrained(tmp_path / name).convert_tokens_to_ids(
            ["<|endoftext|>", "<tool>", "</tool>"]
        )
        assert torch.equal(stored[ids], rows.to(torch.bfloat16)), name
        published.append(name)
    assert published, "none was refused for what 4 bits cost"


def test_the_plan_counts_the_rows(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = load_config(Source("tiny", tiny_llama_dir))
    counts = []
    for texts in ([], [f"<{number}>" for number in range(64)]):
        settings = load_recipe(recipe(tmp_path, tiny_llama_dir, adapter__new_tokens=texts)).recipe
        request = Request(settings, config, "cpu")
        counts.append(Shallow(request).num_trainable)
        assert formula_costs(replace(request, device="cuda")) is None or not texts, "the formula does not know them"
    assert counts[1] - counts[0] == 64 * 128, "tied: one row for both tables"


@pytest.mark.slow
def test_what_to_merge_onto_is_measured_with_the_rows(trained: tuple[Path, Outcome], tmp_path: Path) -> None:
    outcome = run_cli("export", trained[0] / "run", tmp_path / "auto", "export.base=auto", "--json")
    assert outcome.code == 0, outcome.err
    found = {one["onto"]: one["distance"]["mean_kl"] for one in json.loads(outcome.out)["choice"]["candidates"]}
    assert found["dequantized"] < 0.01 * found["original"]


@pytest.mark.slow
@pytest.mark.skipif(not llama_cpp.AVAILABLE, reason="needs xllamacpp (uv sync --group serve)")
def test_llama_cpp_reads_the_tokens_and_computes_with_the_rows(trained: tuple[Path, Outcome], tmp_path: Path) -> None:
    outcome = run_cli("export", trained[0] / "run", tmp_path / "x", "--format", "gguf-f32")
    assert outcome.code == 0, outcome.err
    assert run_cli("export", trained[0] / "run", tmp_path / "merged", "export.export_dtype=float32").code == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    text = "x <tool>ls 3</tool> y"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    with llama_cpp.LlamaServer(next((tmp_path / "x").glob("*.gguf")), exact=True, context=256) as server:
        assert server.tokenize(text) == server.tokenize(text, parse_special=False) == ids
        served = torch.tensor(server.log_probabilities(ids, model.config.vocab_size), dtype=torch.float64)
        wanted = model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        assert float((wanted.exp() * (wanted - served)).sum()) < 2e-6
