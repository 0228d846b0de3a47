"""The model card of an export: what it was trained on, the figures, how to use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlora_train.environment import versions
from qlora_train.export.merge import ModuleRow
from qlora_train.export.verify import Verdict
from qlora_train.model.trained import FinishedRun


def figures(run: FinishedRun, verdict: Verdict, rows: Sequence[ModuleRow]) -> dict[str, Any]:
    """What `export.json` holds."""
    recipe = run.recipe
    above = sum(row.delta_norm > row.rounding_norm for row in rows)
    return {
        "base": recipe.model.path,
        "base_digest": run.base_print.digest,
        "merged_onto": "dequantised base",
        "quant": run.base_print.quant,
        "export_dtype": recipe.export.export_dtype,
        "method": recipe.adapter.method,
        "verification": {
            "rows": verdict.num_rows,
            "split": verdict.split,
            "accepted": verdict.accepted,
            "kl_frac": verdict.kl_frac,
            "max_kl_frac": verdict.max_kl_frac,
            "merged": verdict.merged.__dict__,
            "adapter_off": verdict.adapter_off.__dict__,
        },
        "modules_above_rounding": above,
        "modules": [row.__dict__ for row in rows],
        "versions": versions(),
    }


def model_card(name: str, run: FinishedRun, verdict: Verdict, audit: dict[str, Any]) -> str:
    """README.md of the export, with a header that the hub reads."""
    recipe, merged, off = run.recipe, verdict.merged, verdict.adapter_off
    train = next(split for split in audit["splits"] if split["split"] == "train")
    quantised = recipe.quant.quant_type != "none"
    base_words = f"{recipe.quant.quant_type} (double quantisation {'on' if recipe.quant.double_quant else 'off'})"
    method = f"{recipe.adapter.method} (r = {recipe.adapter.r}, alpha = {recipe.adapter.alpha:g})"
    nll = f"{merged.reference_nll:.4f}"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [qlora, {recipe.adapter.method}]
---
# {_plain(name)}

`{_plain(recipe.model.path)}`, fine-tuned with {method}
{"on a " + base_words + " base" if quantised else "on an unquantised base"} and merged in {recipe.export.export_dtype}.
The licence of the base applies.

## Trained on
{train["num_trained"]:,} rows, {train["num_tokens"]:,} tokens of which {train["num_supervised_tokens"]:,} supervised.

## Is it the model that was trained?
Compared with base + adapter on {verdict.num_rows} {"held-out" if verdict.split == "eval" else "training"} rows
({merged.num_tokens:,} tokens, both sides in float32):

| | this model | adapter switched off |
|---|---|---|
| mean KL from the trained model (nats per token) | {merged.mean_kl:.3g} | {off.mean_kl:.3g} |
| same most likely token | {merged.top1_agreement:.2%} | {off.top1_agreement:.2%} |
| loss per supervised token (trained: {nll}) | {merged.candidate_nll:.4f} | {off.candidate_nll:.4f} |

The KL is {verdict.kl_frac:.3%} of the adapter's effect; the export refuses more than {verdict.max_kl_frac:.3%}.

## Use
```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")
```
`export.json` holds these figures and a row for every merged weight. `golden_prompts.json` holds prompts with the token
ids that training gave them, and that this tokenizer gives them too: hold your server against it.
"""


def _plain(text: str) -> str:
    """Without the characters that Markdown or HTML would act on."""
    return "".join(char for char in text if char.isalnum() or char in " ._-/:+@")
