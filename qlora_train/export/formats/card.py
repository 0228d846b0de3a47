"""README.md and export.json of a format: what it is, how far it is from the trained model, how to serve it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlora_train.environment import versions
from qlora_train.export.formats.measure import FormatVerdict
from qlora_train.export.licence import Licence
from qlora_train.model.trained import FinishedRun


def format_figures(name: str, run: FinishedRun, verdict: FormatVerdict, notices: Sequence[str]) -> dict[str, Any]:
    """What `export.json` holds."""
    return {
        "format": name,
        "base": run.recipe.model.path,
        "base_digest": run.base_print.digest,
        "quant": run.base_print.quant,
        "method": run.recipe.adapter.method,
        "verification": {
            "rows": verdict.num_rows,
            "split": verdict.split,
            "how": verdict.how,
            "accepted": verdict.accepted,
            "kl_frac": verdict.kl_frac,
            "max_kl_frac": verdict.max_kl_frac,
            "max_kl": verdict.max_kl,
            "exported": verdict.merged.__dict__,
            "adapter_off": verdict.adapter_off.__dict__,
        },
        "notices": list(notices),
        "versions": versions(),
    }


def format_card(
    title: str,
    name: str,
    run: FinishedRun,
    verdict: FormatVerdict,
    licence: Licence,
    commands: Sequence[str],
    notices: Sequence[str],
) -> str:
    """README.md, with a header that the hub reads."""
    exported, off = verdict.merged, verdict.adapter_off
    rows = "held-out" if verdict.split == "eval" else "training"
    same = verdict.kl_frac <= verdict.max_kl_frac
    header = f"license: {licence.name}\n" if licence.name else ""
    own_name = licence.own_name or licence.name
    applies = f"The licence of the base applies: {plain(own_name)}." if own_name else "The licence of the base applies."
    losses = f"{exported.candidate_nll:.4f} | {off.candidate_nll:.4f}"
    said = (
        f"Merged onto the original weights, this is another model than the trained one: its loss differs by "
        f"{verdict.loss_rise:+.4f} nats per token."
        if verdict.onto == "original"
        else f"The KL is {verdict.kl_frac:.3%} of the adapter's effect: this is the model that was trained."
        if same
        else f"The KL is {verdict.kl_frac:.1%} of the adapter's effect: **this is not quite the model that was "
        f"trained**. It was published because up to {verdict.max_kl:g} nats per token were accepted (export.max_kl)."
    )
    listed = "".join(f"* {plain(notice)}\n" for notice in notices)
    return f"""---
tags: [qlora, {run.recipe.adapter.method}]
base_model: {plain(run.recipe.model.path)}
{header}---
# {plain(name)}: {title}

`{plain(run.recipe.model.path)}`, fine-tuned with {run.recipe.adapter.method} (r = {run.recipe.adapter.r}, \
alpha = {run.recipe.adapter.alpha:g}). {applies}

## Is it the model that was trained?
The files were read back and compared with base + adapter on {verdict.num_rows} {rows} rows
({exported.num_tokens:,} tokens, both sides in float32):

| | these files | adapter switched off |
|---|---|---|
| mean KL from the trained model (nats per token) | {exported.mean_kl:.3g} | {off.mean_kl:.3g} |
| same most likely token | {exported.top1_agreement:.2%} | {off.top1_agreement:.2%} |
| loss per supervised token (trained: {exported.reference_nll:.4f}) | {losses} |

{said}
{listed}
## Serve
```
{chr(10).join(commands)}
```
"""


def plain(text: str) -> str:
    """Without the characters that Markdown or HTML would act on."""
    return "".join(char for char in text if char.isalnum() or char in " ._-/:+@;,()'=")
