"""The bars of the formats: how far each is from the trained model, and what its clients make of it (`make prove`)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from proofs.common import WORK, Bar, fresh, verb, verb_here
from serve_check import check_folder

from serving.vllm_server import find_vllm

FOLDER = WORK / "deploy" / "formats"
# Bounds of the mean KL in nats per token, as measured on this model with room to spare. What has none is shown.
MAX_KL = {
    "gguf-f16": 1e-5,
    "gguf-bf16": 5e-4,
    "gguf-q8_0": 5e-3,
    "lora": 1e-6,
    "gguf-lora": 1e-6,
    "nf4-lora": 1e-6,
    "w4a16": None,
}
LEAST_TOP1 = {"gguf-f16": 0.99, "lora": 0.99, "gguf-lora": 0.99, "nf4-lora": 0.99}
# Of the short form; the long one takes all, on the recipe's rows.
SHORT = ("gguf-f16", "lora")
_ANY_KL = "export.max_kl=100"  # what 4 bit cost is measured here, not judged


def formats_bars(run: Path, full: bool) -> list[Bar]:
    """Export a finished run in every format, and hold the GGUF file and the adapter against their clients."""
    folder = fresh(FOLDER)
    names = tuple(MAX_KL) if full else SHORT
    asked = [part for name in names for part in ("--format", name)]
    if full:
        result, seconds = verb("export", run, folder, _ANY_KL, *asked)
    else:
        result = verb_here("export", run, folder, *asked)
    bars = [bar for found in result["formats"] for bar in _format_bars(found)]
    bars += _client_bars(folder, run)
    return [*bars, Bar(f"export of {len(names)} formats", seconds, "s")] if full else bars


def _format_bars(found: dict[str, Any]) -> list[Bar]:
    name, exported = found["format"], found["verdict"]["merged"]
    share = exported["mean_kl"] / found["verdict"]["adapter_off"]["mean_kl"]
    note = f"{share:.3%} of the adapter's effect"
    bars = [
        Bar(f"{name}: KL from the trained model", exported["mean_kl"], "nats", at_most=MAX_KL[name], note=note),
        Bar(f"{name}: same next token", exported["top1_agreement"], at_least=LEAST_TOP1.get(name)),
    ]
    template = next((notice for notice in found["notices"] if notice.startswith("Modelfile")), None)
    if template is not None and name == "gguf-f16":
        by_go = re.search(r"renders (?:all )?(\d+)(?: of (\d+))? golden prompts", template)
        equal, of = (int(by_go[1]), int(by_go[2] or by_go[1])) if by_go else (0, 0)
        bars.append(Bar("Ollama's template: prompts as in training", equal, f"of {of}", at_least=of, note=template))
    return bars


def _client_bars(folder: Path, run: Path) -> list[Bar]:
    checks = check_folder(folder / "gguf-f16", run) + check_folder(folder / "lora", run, find_vllm())
    return [
        Bar(
            f"{check.client}: {check.what}",
            check.equal,
            f"of {check.of}",
            at_least=None if check.skipped else check.least_frac * check.of,
            note=f"skipped: {check.note}" if check.skipped else check.note,
        )
        for check in checks
    ]
