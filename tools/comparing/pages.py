"""What the pages show of the figures: the comparison, the quantisation study, and each claim with what it showed.

Reads files alone, so that pages are made without torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from comparing.table import markdown
from qlora_train.environment import processor_text

FIGURES = Path(__file__).resolve().parents[1] / "figures"
PYTHON = ".venv/bin/python"
TITLES = {
    "bf16": "not quantised",
    "int4": "INT4, symmetric absmax",
    "fp4": "FP4",
    "nf4": "NF4",
    "nf4_dq": "NF4, double quantisation",
    "int4_affine": "INT4, affine, groups of 32",
}


@dataclass(frozen=True)
class Claim:
    """What people say, what to run, and which figures answer it, by their first words."""

    text: str
    commands: tuple[str, ...]
    prefixes: tuple[str, ...]


_TWO_RANKS = (
    "qlora-train train recipes/quickstart.yaml adapter.r=8 adapter.alpha=16 run.seed=0 run.dir=runs/r8",
    "qlora-train train recipes/quickstart.yaml adapter.r=64 adapter.alpha=128 run.seed=1 run.dir=runs/r64",
    "qlora-train analyze runs/r8 runs/r64 --out runs/looked-into",
)
CLAIMS = (
    Claim(
        "B starts at zero, so the first step starts from the base itself; with A zero too nothing would ever learn.",
        (f"{PYTHON} tools/claims.py start",),
        ("start,",),
    ),
    Claim("A small r is enough.", (f"{PYTHON} tools/claims.py rank",), ("rank:",)),
    Claim(
        "Many matrices with a small r beat one with a large r, at the same number of parameters.",
        (f"{PYTHON} tools/claims.py targets",),
        ("targets:",),
    ),
    Claim(
        "Adapters of different rank share their first directions, and little else.",
        _TWO_RANKS,
        ("q_proj, A", "q_proj, delta", "v_proj, A", "v_proj, delta"),
    ),
    Claim(
        "The update amplifies directions that W has and does not emphasise.",
        (_TWO_RANKS[-1],),
        ("q_proj, r =", "q_proj: W along", "v_proj, r =", "v_proj: W along"),
    ),
    Claim("After merging an adapter costs no time.", (f"{PYTHON} tools/claims.py latency",), ("latency:",)),
    Claim(
        "A few per cent of the weights are trained, in a fraction of full fine-tuning's memory.",
        (f"{PYTHON} tools/claims.py memory", "qlora-train plan recipes/quickstart.yaml"),
        ("memory:",),
    ),
    Claim(
        "NF4 loses less than FP4, and FP4 less than INT4; double quantisation loses nothing.",
        (f"{PYTHON} tools/quant_study.py --no-training",),
        ("text_jargon:", "shell:", "weights,"),
    ),
    Claim(
        "LoRA on NF4 ends where LoRA on 16 bit ends.",
        (f"{PYTHON} tools/quant_study.py",),
        ("LoRA on", "LoRA: distance"),
    ),
)


def comparison(path: Path = FIGURES / "compare.json") -> str:
    """The table of `compare_methods.py`."""
    report = _read(path)
    return markdown(report) if report else f"Not measured yet: `{PYTHON} tools/compare_methods.py`."


def theory(path: Path = FIGURES / "methods.json") -> str:
    """Each claim with its commands and its figures; those of `claims.py CLAIM --json` and of the whole quantisation
    study count before a proof's."""
    proven, study = _read(path) or {"figures": []}, _read(path.with_name("quant.json"))
    reports = [
        _study_figures(study)
        if study and claim.commands[0].startswith(f"{PYTHON} tools/quant_study.py")
        else _read(path.with_name(f"claim-{claim.prefixes[0].rstrip(':,')}.json"))
        for claim in CLAIMS
    ]
    sections = [
        _section(number, claim, own or proven)
        for number, (claim, own) in enumerate(zip(CLAIMS, reports, strict=True), 1)
    ]
    return "\n".join(sections).rstrip()


def quantisation(path: Path = FIGURES / "quant.json") -> str:
    """The tables of `quant_study.py`: perplexity by code, errors of weights, and LoRA on either base."""
    report = _read(path)
    if report is None:
        return f"Not measured yet: `{PYTHON} tools/quant_study.py`."
    sets, weights = report["sets"], report["errors"]
    lines = [f"| Code | {' | '.join(f'perplexity, {name}' for name in sets)} |", "|---" * (len(sets) + 1) + "|"]
    for code in next(iter(sets.values())):
        lines.append(
            f"| {TITLES[code]} | {' | '.join(_perplexity(code, by_code[code]) for by_code in sets.values())} |"
        )
    codes = list(next(iter(weights.values())))
    lines += ["", f"| Relative error of weights | {' | '.join(TITLES[code] for code in codes)} |"]
    lines.append("|---" * (len(codes) + 1) + "|")
    for name, errors in weights.items():
        lines.append(f"| {name} | {' | '.join(f'{errors[code]:.4f}' for code in codes)} |")
    for base, losses in report["trained"].items():
        lines += ["", f"LoRA on {base}: held-out loss {_losses(losses)} by seed."]
    lines += ["", f"Measured on {_machine(report['machine'])}."]
    return "\n".join(lines)


def _machine(found: Mapping[str, Any]) -> str:
    return f"{', '.join(found['cuda_devices']) or processor_text(found)}, torch {found['versions']['torch']}"


def _perplexity(code: str, figure: Mapping[str, float]) -> str:
    if code == "bf16":
        return f"{figure['perplexity']:.2f}"
    return f"{figure['perplexity']:.2f} ({figure['above_bf16']:+.4f} ± {figure['standard_error']:.4f} nats)"


def _losses(losses: list[float]) -> str:
    return ", ".join(f"{loss:.4f}" for loss in losses)


def told_apart(pair: Mapping[str, Any]) -> bool:
    """Whether a difference is more than two standard errors."""
    return bool(abs(pair["difference"]) > 2 * pair["standard_error"])


def gap_and_spread(trained: Mapping[str, list[float]]) -> tuple[float, float]:
    """Mean held-out loss after training on NF4 above that on bf16, and the larger distance between seeds; nats."""
    spread = max(max(losses) - min(losses) for losses in trained.values())
    return fmean(trained["nf4"]) - fmean(trained["bf16"]), spread


def _study_figures(study: Mapping[str, Any]) -> dict[str, Any]:
    """What the study found, in a proof's form: differences of codes, and what training leaves of them."""
    figures = []
    for pair in study["pairs"]:
        told = "" if told_apart(pair) else ": not told apart"
        what = f"{pair['set']}: {TITLES[pair['worse']]} above {TITLES[pair['better']]}"
        figures.append((what, pair["difference"], f"± {pair['standard_error']:.4f}, paired by row{told}"))
    trained = study["trained"]
    if trained:
        means = {base: fmean(losses) for base, losses in trained.items()}
        gap, spread = gap_and_spread(trained)
        figures += [(f"LoRA on {base}: held-out loss", means[base], _losses(trained[base])) for base in trained]
        figures.append(("LoRA: distance between two seeds, the larger one", spread, ""))
        note = "within the distance between seeds" if gap <= spread else "above the distance between seeds"
        figures.append(("LoRA on NF4 above LoRA on bf16", gap, note))
    plain = {"unit": "nats", "at_most": None, "at_least": None, "ok": True}
    lines = [{"what": what, "value": value, "note": note, **plain} for what, value, note in figures]
    for line, pair in zip(lines, study["pairs"], strict=False):
        if pair["worse"] != "nf4_dq":  # what the paper says of codes; of double quantisation it says nothing is lost
            line |= {"at_least": 0.0, "ok": pair["difference"] >= 0}
    for weights, errors in study["errors"].items():
        ratio = errors["nf4"] / min(errors["fp4"], errors["int4"])
        what = f"weights, {weights}: error of NF4 beside the better of FP4 and INT4"
        lines.append({**plain, "what": what, "value": ratio, "unit": "", "note": "", "at_most": 1.0, "ok": ratio <= 1})
    return {"figures": lines, "sources": [_machine(study["machine"])]}


def _section(number: int, claim: Claim, report: Mapping[str, Any]) -> str:
    found = [figure for figure in report["figures"] if figure["what"].startswith(claim.prefixes)]
    lines = [f"**{number}. {claim.text}**", "", "```", *claim.commands, "```", ""]
    lines += ["| Measured | | Bar |", "|---|---|---|", *map(_line, found)] if found else ["Not measured yet."]
    if sources := report.get("sources"):
        lines += ["", f"Made with: {'; '.join(sources)}."]
    return "\n".join([*lines, ""])


def _line(figure: Mapping[str, Any]) -> str:
    value = f"{figure['value']:.4g} {figure['unit']}".strip()
    note = f" ({figure['note']})" if figure["note"] else ""
    bar = "" if figure["at_most"] is None else f"at most {figure['at_most']:.3g}"
    bar = bar if figure["at_least"] is None else f"at least {figure['at_least']:.3g}"
    short = "" if figure["ok"] or not bar else ": **does not hold here**"
    return f"| {figure['what']} | {value}{note} | {bar}{short} |".replace("|  |", "| |")


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report
