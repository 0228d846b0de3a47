"""The model card of an export: what it was trained on, the figures, how to serve it; and the same as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qlora_train.environment import versions
from qlora_train.export.choice import Candidate, Choice
from qlora_train.export.licence import Licence
from qlora_train.export.merge import Merged
from qlora_train.export.noise import noise
from qlora_train.export.tensors import Onto
from qlora_train.export.verify import Verdict
from qlora_train.model.source import PACKAGE_PREFIX
from qlora_train.model.trained import FinishedRun

ONTO_WORDS: dict[Onto, str] = {
    "dequantized": "the dequantised base",
    "original": "the original weights",
    "requantized": "4 bit again, as PEFT's merge_and_unload does",
}


@dataclass(frozen=True)
class Facts:
    """Everything that a card tells."""

    run: FinishedRun
    audit: dict[str, Any]  # data.json of the run
    verdict: Verdict
    merged: Merged
    licence: Licence
    choice: Choice | None = None
    seconds: dict[str, float] | None = None


def figures(facts: Facts) -> dict[str, Any]:
    """What `export.json` holds."""
    run, verdict = facts.run, facts.verdict
    summary = noise(facts.merged.rows)
    return {
        "base": base_name(run.recipe.model.path),
        "base_digest": run.base_print.digest,
        "merged_onto": verdict.onto,
        "quant": run.base_print.quant,
        "export_dtype": run.recipe.export.export_dtype,
        "method": run.recipe.adapter.method,
        "verification": {
            "how": verdict.how,
            "rows": verdict.num_rows,
            "split": verdict.split,
            "accepted": verdict.accepted,
            "kl_frac": verdict.kl_frac,
            "max_kl_frac": verdict.max_kl_frac,
            "loss_rise": verdict.loss_rise,
            "max_loss_rise": verdict.max_loss_rise,
            "worst_layer": None if verdict.worst_layer is None else asdict(verdict.worst_layer),
            "merged": asdict(verdict.merged),
            "adapter_off": asdict(verdict.adapter_off),
        },
        "choice": None if facts.choice is None else {**asdict(facts.choice), "sentence": facts.choice.sentence},
        "noise": None if summary is None else {**asdict(summary), "reading": summary.reading},
        "modules_above_rounding": sum(row.delta_norm > row.rounding_norm for row in facts.merged.rows),
        "modules": [asdict(row) for row in facts.merged.rows],
        "num_weights": run.base_print.num_params,
        "left_out": list(facts.merged.left_out),
        "num_shards": facts.merged.num_shards,
        "num_taken_over": facts.merged.num_taken_over,
        "seconds": facts.seconds or {},
        "licence": asdict(facts.licence),
        "versions": versions(),
    }


def model_card(name: str, facts: Facts) -> str:
    """README.md of the export, with a header that the hub reads."""
    run, verdict = facts.run, facts.verdict
    recipe, merged, off = run.recipe, verdict.merged, verdict.adapter_off
    quantised = recipe.quant.quant_type != "none"
    base_words = f"{recipe.quant.quant_type} (double quantisation {'on' if recipe.quant.double_quant else 'off'})"
    method = f"{recipe.adapter.method} (r = {recipe.adapter.r}, alpha = {recipe.adapter.alpha:g})"
    nll = f"{merged.reference_nll:.4f}"
    summary = noise(facts.merged.rows)
    base_kind = f"on a {base_words} base" if quantised else "on an unquantised base"
    return f"""---
{hub_header(run, facts.licence, "transformers", "finetune")}
---
# {_plain(name)}

`{base_name(recipe.model.path)}`, fine-tuned with {method}
{base_kind}, merged {_onto_words(facts)}.
Stored in {recipe.export.export_dtype}.{_token_words(run)}
{licence_words(facts.licence)}

## Trained on
{rows_words(facts.audit)}

{recipe_words(run)}

## Is it the model that was trained?
Compared with base + adapter on {verdict.num_rows} {"held-out" if verdict.split == "eval" else "training"} rows
({merged.num_tokens:,} tokens, both sides in float32):

| | this model | adapter switched off |
|---|---|---|
| mean KL from the trained model (nats per token) | {merged.mean_kl:.3g} | {off.mean_kl:.3g} |
| same most likely token | {merged.top1_agreement:.2%} | {off.top1_agreement:.2%} |
| loss per supervised token (trained: {nll}) | {merged.candidate_nll:.4f} | {off.candidate_nll:.4f} |

{_gate_words(verdict)}
{choice_words(facts.choice)}{"" if summary is None else f"Beside the noise: {summary.reading}."}

## Serve it
```
qlora-train chat THIS_FOLDER
transformers serve --force-model THIS_FOLDER
vllm serve THIS_FOLDER
```
`THIS_FOLDER` stands for the folder of these files, or their name on the hub (`qlora-train chat` takes folders only).
In Python:
```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")
```
`export.json` holds these figures and a row for every merged weight. `golden_prompts.json` holds prompts with the token
ids that training gave them, and that this tokenizer gives them too: hold your server against it.
"""


def _token_words(run: FinishedRun) -> str:
    """The tokens whose rows were trained."""
    texts = run.recipe.adapter.new_tokens
    names = ", ".join("`" + "".join(c for c in text if c.isprintable() and c != "`") + "`" for text in texts)
    return f" Tokens with rows that were trained: {names}." if names else ""


def base_name(path: str) -> str:
    """The base without the folders of the machine that trained, for whatever may be uploaded."""
    return _plain(path.rstrip("/").rpartition("/")[2] if path.startswith("/") else path)


def hub_header(run: FinishedRun, licence: Licence, library: str, relation: str) -> str:
    """What the hub reads of a card, as YAML. It refuses a `base_model` that is no name on the hub."""
    recipe = run.recipe
    lines = [f"library_name: {library}", "pipeline_tag: text-generation", f"tags: [qlora, {recipe.adapter.method}]"]
    if not recipe.model.path.startswith(("/", PACKAGE_PREFIX)) and recipe.model.path.count("/") == 1:
        lines += [f"base_model: {_plain(recipe.model.path)}", f"base_model_relation: {relation}"]
    if licence.name is not None:
        lines.append(f"license: {_plain(licence.name)}")
    lines += [f"license_name: {_plain(licence.own_name)}"] if licence.own_name else []
    lines += [f"license_link: {_plain(licence.link)}"] if licence.link else []
    return "\n".join(lines)


def licence_words(licence: Licence) -> str:
    """Under which licence the base was given, and what says so."""
    if licence.name is None:
        return "The licence of the base applies; its files do not name it."
    texts = f"; its text is in {', '.join(map(_plain, licence.files))}" if licence.files else ""
    named = licence.own_name or licence.name
    return f"Licence of the base, which applies: {_plain(named)} (from {_plain(licence.found_in)}){texts}."


def _onto_words(facts: Facts) -> str:
    onto = facts.verdict.onto
    if onto == "original":
        return "onto the original weights, which is **another model than the one that was trained**"
    return "onto the dequantised base, which is the one that was trained"


def rows_words(audit: dict[str, Any]) -> str:
    """Counts and fingerprints of the rows."""
    train = next(split for split in audit["splits"] if split["split"] == "train")
    lines = [
        f"{train['num_trained']:,} rows, {train['num_tokens']:,} tokens of which {train['num_supervised_tokens']:,} "
        "supervised."
    ]
    if files := audit.get("files"):
        counts = {entry["name"]: entry for split in audit["splits"] for entry in split.get("sources", ())}
        lines += ["", "| file | SHA-256 | rows | used |", "|---|---|---|---|"]
        for file in files:
            rows = counts.get(file["name"], {})
            name = _plain(file["name"].rpartition("/")[2] if file["name"].startswith("/") else file["name"])
            used = f"{rows['num_rows']:,} | {rows['num_trained']:,}" if rows else " | "
            lines.append(f"| {name} | `{_plain(str(file['sha256']))}` | {used} |")
    return "\n".join(lines)


def recipe_words(run: FinishedRun) -> str:
    """The settings that decide what was learned."""
    recipe = run.recipe
    train, data = recipe.train, recipe.data
    steps = f", at most {train.max_steps:,} steps" if train.max_steps else ""
    targets = recipe.adapter.target_modules
    where = targets if isinstance(targets, str) else ", ".join(map(_plain, targets))
    return (
        f"Adapter on {where}, dropout {recipe.adapter.dropout:g}. {train.optimizer} at {train.learning_rate:g} "
        f"({train.schedule}), {train.epochs:g} epochs{steps}, {train.micro_batch_size} x {train.grad_accum_steps} "
        f"{'packs' if data.batching == 'packed' else 'rows'} of up to {data.seq_len:,} tokens a step, loss on "
        f"{data.loss_on}, seed {recipe.run.seed}."
    )


def _gate_words(verdict: Verdict) -> str:
    if verdict.onto == "original":
        return (
            f"Its loss differs from the trained model's by {verdict.loss_rise:+.4f} nats per token; the export refused "
            f"more than {verdict.max_loss_rise:+.4f}."
        )
    limit = f"the export refuses more than {verdict.max_kl_frac:.3%}"
    return f"The KL is {verdict.kl_frac:.3%} of the adapter's effect; {limit}."


def choice_words(choice: Choice | None, taken: str = "this model") -> str:
    """The ways to merge side by side, the one that was `taken` marked; nothing where none was measured."""
    if choice is None:
        return ""
    rows = "\n".join(_candidate_row(choice, candidate, taken) for candidate in choice.candidates)
    exact = f"the trained model's exact match is {_share(choice.trained_exact_match)}"
    answers = f" and {choice.num_answers} answers, on which {exact}" if choice.num_answers else ""
    return f"""
### What to merge onto, measured
On {choice.num_rows} {"held-out" if choice.split == "eval" else "training"} rows{answers}.

| merged onto | mean KL | same most likely token | loss | exact match |
|---|---|---|---|---|
{rows}

{choice.sentence}

"""


def _candidate_row(choice: Choice, candidate: Candidate, taken: str) -> str:
    found = candidate.distance
    name = ONTO_WORDS[candidate.onto] + (f" ({taken})" if candidate.onto == choice.onto else "")
    cells = (f"{found.mean_kl:.3g}", f"{found.top1_agreement:.2%}", f"{found.candidate_nll:.4f}")
    return f"| {name} | {' | '.join(cells)} | {_share(candidate.exact_match)} |"


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1%}"


def _plain(text: str) -> str:
    """Without the characters that Markdown or HTML would act on."""
    return "".join(char for char in text if char.isalnum() or char in " ._-/:+@")
