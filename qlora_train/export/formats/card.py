"""README.md and export.json of a format: what it is, how far it is from the trained model, how to serve it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qlora_train.environment import versions
from qlora_train.export.card import base_name, choice_words, hub_header, licence_words, recipe_words, rows_words
from qlora_train.export.choice import Choice
from qlora_train.export.formats.measure import FormatVerdict
from qlora_train.export.licence import Licence
from qlora_train.model.trained import FinishedRun


@dataclass(frozen=True)
class FormatFacts:
    """Everything that a card tells."""

    run: FinishedRun
    audit: dict[str, Any]  # data.json of the run
    format: str
    title: str
    name: str  # of the model
    merges: bool  # else the adapter lies beside its base, or alone
    verdict: FormatVerdict
    licence: Licence
    commands: Sequence[str]
    notices: Sequence[str]
    choice: Choice | None = None


def format_figures(facts: FormatFacts) -> dict[str, Any]:
    """What `export.json` holds."""
    run, verdict, choice = facts.run, facts.verdict, facts.choice
    return {
        "format": facts.format,
        "base": base_name(run.recipe.model.path),
        "base_digest": run.base_print.digest,
        "merged_onto": verdict.onto if facts.merges else None,
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
            "loss_rise": verdict.loss_rise,
            "max_loss_rise": verdict.max_loss_rise,
            "worst_layer": None if verdict.worst_layer is None else asdict(verdict.worst_layer),
            "exported": asdict(verdict.merged),
            "adapter_off": asdict(verdict.adapter_off),
        },
        "choice": None if choice is None else {**asdict(choice), "sentence": choice.sentence},
        "notices": list(facts.notices),
        "licence": asdict(facts.licence),
        "versions": versions(),
    }


def format_card(facts: FormatFacts) -> str:
    """README.md, with a header that the hub reads."""
    run, verdict = facts.run, facts.verdict
    exported, off = verdict.merged, verdict.adapter_off
    adapter = run.recipe.adapter
    rows = "held-out" if verdict.split == "eval" else "training"
    losses = f"{exported.candidate_nll:.4f} | {off.candidate_nll:.4f}"
    listed = "".join(f"* {plain(notice)}\n" for notice in facts.notices)
    base = run.recipe.model.path
    commands = "\n".join(facts.commands).replace(shlex.quote(base), base_name(base))
    return f"""---
{hub_header(run, facts.licence, _library(facts), "finetune" if facts.merges else "adapter")}
---
# {plain(facts.name)}: {facts.title}

`{base_name(base)}`, fine-tuned with {adapter.method} (r = {adapter.r}, alpha = {adapter.alpha:g}).
{licence_words(facts.licence)}

## Trained on
{rows_words(facts.audit)}

{recipe_words(run)}

## Is it the model that was trained?
The files were read back and compared with base + adapter on {verdict.num_rows} {rows} rows
({exported.num_tokens:,} tokens, both sides in float32):

| | these files | adapter switched off |
|---|---|---|
| mean KL from the trained model (nats per token) | {exported.mean_kl:.3g} | {off.mean_kl:.3g} |
| same most likely token | {exported.top1_agreement:.2%} | {off.top1_agreement:.2%} |
| loss per supervised token (trained: {exported.reference_nll:.4f}) | {losses} |

{_verdict_words(verdict)}
{listed}{choice_words(facts.choice, "which these files were made from")}
## Serve it
```
{commands}
```
`THIS_FOLDER` stands for the folder of these files. From the hub: `hf download ORG/NAME --local-dir THIS_FOLDER`.
"""


def _library(facts: FormatFacts) -> str:
    """What the hub offers to load it with."""
    if facts.format.startswith("gguf"):
        return "gguf"
    return "transformers" if facts.merges else "peft"


def _verdict_words(verdict: FormatVerdict) -> str:
    if verdict.onto == "original":
        return (
            "Merged onto the original weights, this is **another model than the trained one**: its loss differs by "
            f"{verdict.loss_rise:+.4f} nats per token."
        )
    if verdict.kl_frac <= verdict.max_kl_frac:
        return f"The KL is {verdict.kl_frac:.3%} of the adapter's effect: this is the model that was trained."
    return (
        f"The KL is {verdict.kl_frac:.1%} of the adapter's effect: **this is not quite the model that was trained**. "
        f"It was published because up to {verdict.max_kl:g} nats per token were accepted (export.max_kl)."
    )


def plain(text: str) -> str:
    """Without the characters that Markdown or HTML would act on."""
    return "".join(char for char in text if char.isalnum() or char in " ._-/:+@;,()'=")
