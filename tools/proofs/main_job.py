"""The main job: a real model learns in 4 bit, its export is the model that was trained, and plain libraries agree.

Two recipes are trained. An earlier run counts only where its code, libraries, recipe, data and model file are those of
now and its adapter verifies; it is named in the table. At least one is trained anew; with `full` both are, and jargon.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from proofs.common import ROOT, WORK, Bar, earlier, fresh, tests_pass, verb

FOLDER = WORK / "main-job"
RECIPES = ROOT / "recipes"
EARLIER = "an earlier run that verifies"
ROWS_COMPARED = 4
TESTS = {
    "gradients, accumulation and loss, against independent references": [
        *("tests/numerics/test_gradients.py", "tests/numerics/test_loss.py", "tests/invariant/test_accumulation.py")
    ]
}


def measure(full: bool) -> list[Bar]:
    """All bars of the main job."""
    spelling = None if full else earlier(FOLDER / "spelling", RECIPES / "spelling.yaml")
    # Ten minutes hold one training, not two: where the spelling run must be made, the quickstart's own may serve.
    known = ROOT / "runs" / "quickstart"
    quickstart = None if full or spelling else earlier(known, RECIPES / "quickstart.yaml")
    jargon = _jargon() if full else []
    return [*_quickstart(known if quickstart else None), *_spelling(spelling), *jargon, *tests_pass(TESTS)]


def _quickstart(known: Path | None) -> list[Bar]:
    run, merged = known or fresh(FOLDER / "quickstart"), fresh(FOLDER / "quickstart-merged")
    if known is None:
        trained, train_s = verb("train", "recipes/quickstart.yaml", f"run.dir={run}")
    else:
        trained = json.loads((known / "run.json").read_text(encoding="utf-8"))
        train_s = trained["wall_s"]
    exported, export_s = verb("export", run, merged)
    note = EARLIER if known else ""
    verdict, base, adapter = exported["verdict"], trained["base"], trained["adapter"]
    bars = [
        Bar("quickstart: train and export", train_s + export_s, "s", at_most=600, note=note),
        Bar("quickstart: held-out rows", adapter["num_rows"], "rows", at_least=222),
        Bar("quickstart: held-out loss of the NF4 base", base["loss"], "nats"),
        Bar("quickstart: held-out loss after training", adapter["loss"], "nats", at_most=2.1),
        Bar("quickstart: character similarity before", base["scores"]["char_similarity"]),
        Bar("quickstart: character similarity after", adapter["scores"]["char_similarity"], at_least=0.40),
        Bar("quickstart: KL of the export from the trained model", verdict["merged"]["mean_kl"], "nats", at_most=5e-4),
        Bar("quickstart: KL with the adapter off", verdict["adapter_off"]["mean_kl"], "nats"),
        Bar("quickstart: KL as a share of the adapter's effect", verdict["kl_frac"], at_most=0.01),
        Bar("quickstart: top-1 agreement of the export", verdict["merged"]["top1_agreement"], at_least=0.95),
        *_cost("quickstart", trained, note),
    ]
    return [*bars, *_plain_libraries(run, merged)]


def _plain_libraries(run: Path, merged: Path) -> list[Bar]:
    """What plain transformers and plain PEFT make of the files, against the merge in memory and our own model."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from qlora_train.adapters.layers import delta_weight, lora_layers
    from qlora_train.data.split import load_split
    from qlora_train.model.load import to_float32
    from qlora_train.model.trained import load_trained, open_run
    from qlora_train.quant.bnb import dequantize

    trained = load_trained(open_run(run))
    rows = load_split(trained.run.recipe.data, "eval", trained.tokenizer, 0).table
    batches = [torch.from_numpy(rows.row(i).ids.astype("int64"))[None, :] for i in range(ROWS_COMPARED)]
    layers = lora_layers(trained.model)
    with torch.no_grad():
        oracle = AutoModelForCausalLM.from_pretrained(trained.base.source.folder, dtype=torch.bfloat16)
        for name, layer in layers.items():
            weight = dequantize(layer.get_base_layer().weight) + delta_weight(layer, "default")
            oracle.get_submodule(name.removeprefix("base_model.model.")).weight.copy_(weight)
        plain = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
        differing = sum(int((plain(input_ids=ids).logits != oracle(input_ids=ids).logits).sum()) for ids in batches)
        # Plain PEFT on a plain dense model that holds the dequantised weights, both sides in float32.
        dense = AutoModelForCausalLM.from_pretrained(trained.base.source.folder, dtype=torch.float32)
        for name, layer in layers.items():
            dense.get_submodule(name.removeprefix("base_model.model.")).weight.copy_(
                dequantize(layer.get_base_layer().weight)
            )
        theirs = PeftModel.from_pretrained(dense, str(run / "adapter")).eval()
        to_float32(trained.model)
        gap = max(
            float((theirs(input_ids=ids).logits - trained.model(input_ids=ids).logits).abs().max()) for ids in batches
        )
        scale = float(theirs(input_ids=batches[0]).logits.abs().max())
    return [
        Bar("export in plain transformers: logits that differ from the oracle merge", differing, "logits", at_most=0),
        Bar("adapter in plain PEFT: largest difference of a logit, relative", gap / scale, at_most=1e-4),
    ]


def _spelling(known: dict[str, Any] | None) -> list[Bar]:
    result, note = known, EARLIER
    if result is None:
        result, note = verb("train", "recipes/spelling.yaml", f"run.dir={fresh(FOLDER / 'spelling')}")[0], ""
    base, adapter = result["base"]["scores"], result["adapter"]["scores"]
    return [
        Bar("spelling: answers compared", adapter["num_answers"], "rows", at_least=1000, note=note),
        Bar("spelling: exact match of the NF4 base", base["exact_match"], note=note),
        Bar("spelling: exact match after at most one epoch", adapter["exact_match"], at_least=0.45, note=note),
        *_cost("spelling", result, note),
    ]


def _jargon() -> list[Bar]:
    result, _ = verb("train", "recipes/jargon.yaml", f"run.dir={fresh(FOLDER / 'jargon')}")
    base, adapter = result["base"]["loss"], result["adapter"]["loss"]
    return [
        Bar("jargon: held-out loss of the NF4 base", base, "nats"),
        Bar("jargon: held-out loss after training", adapter, "nats", at_most=base),
        *_cost("jargon", result, ""),
    ]


def _cost(recipe: str, trained: dict[str, Any], note: str) -> list[Bar]:
    return [
        Bar(f"{recipe}: wall time", trained["wall_s"], "s", note=note),
        Bar(f"{recipe}: training speed", trained["tokens_per_s"], "tokens/s", note=note),
        Bar(f"{recipe}: peak resident memory", trained["peak_memory_bytes"] / 2**30, "GiB", note=note),
    ]
