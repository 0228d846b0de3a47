"""Fill the generated parts of the documents: file trees, and figures that `make prove JSON=...` wrote.

A generated part stands between `<!-- NAME -->` and `<!-- end NAME -->`. `--check` changes nothing and only compares.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

from comparing.pages import comparison, quantisation, theory
from contenders.results import CONTENDERS, Result
from methods_table import methods_table

from qlora_train.environment import processor_text

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "recipes" / "README.md", ROOT / "recipes" / "methods" / "README.md")
FIGURES = ROOT / "tools" / "figures"
TREE_FOLDERS = ("qlora_train", "tools")


def first_line(path: Path) -> str:
    """The first sentence of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.splitlines()[0] if docstring else ""


def tree() -> str:
    """Every Python file with its docstring's first line."""
    lines = []
    for top in TREE_FOLDERS:
        folders = [ROOT / top, *sorted(p for p in (ROOT / top).rglob("*") if p.is_dir() and list(p.glob("*.py")))]
        for folder in folders:
            name = folder.relative_to(ROOT).as_posix()
            about = first_line(folder / "__init__.py") if (folder / "__init__.py").exists() else ""
            indent = "  " * name.count("/")
            lines.append(f"{indent}{folder.name + '/':{26 - len(indent)}} {about}".rstrip())
            for path in sorted(folder.glob("*.py")):
                if path.name != "__init__.py":
                    lines.append(f"{indent}  {path.name:{24 - len(indent)}} {first_line(path)}")
    num_files = sum(".py" in line for line in lines)
    summary = f"<details><summary>{num_files} files, a line each</summary>"
    return "\n".join([summary, "", "```", *lines, "```", "", "</details>"])


def load_figures(name: str) -> dict[str, Any]:
    """What `make prove WHAT=name JSON=tools/figures/name.json` wrote."""
    report: dict[str, Any] = json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))
    return report


def number(value: float) -> str:
    """A figure with four significant digits."""
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.4g}"


def figures_table(name: str) -> str:
    """All figures of a proof, folded away under a line that says how many bars are met."""
    if not (FIGURES / f"{name}.json").is_file():
        return not_measured(name)
    report = load_figures(name)
    lines = ["| What | Measured | Bar |", "|---|---|---|", *map(figure_line, report["figures"])]
    judged = [figure for figure in report["figures"] if figure["at_most"] is not None or figure["at_least"] is not None]
    short = sum(not figure["ok"] for figure in judged)
    verdict = f"{short} of {len(judged)} bars <b>short</b>" if short else f"all {len(judged)} bars met"
    summary = f"<details><summary>{len(report['figures'])} figures, {verdict}</summary>"
    return "\n".join([summary, "", *lines, "", "</details>", "", f"Measured on {machine(report)}."])


def not_measured(name: str) -> str:
    """In place of figures that are not there."""
    return f"Not measured yet: `make prove WHAT={name} JSON=tools/figures/{name}.json`."


def figure_line(figure: dict[str, Any]) -> str:
    """A figure beside its bar."""
    bar = f"at most {number(figure['at_most'])}" if figure["at_most"] is not None else ""
    bar = f"at least {number(figure['at_least'])}" if figure["at_least"] is not None else bar
    note = f" ({figure['note']})" if figure["note"] else ""
    short = "" if figure["ok"] or not bar else ": **short**"
    line = f"| {figure['what']} | {number(figure['value'])} {figure['unit']}{note} | {bar}{short} |"
    return line.replace("  |", " |")


def machine(report: dict[str, Any]) -> str:
    """Where a proof was measured, and with which versions."""
    found = report["machine"]
    names = ("torch", "transformers", "bitsandbytes", "peft", "trl", "accelerate", "tokenizers", "pyarrow")
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in names if name in found["versions"])
    return f"{processor_text(found)}, no GPU, Python {found['python']}; {versions}"


def figures_of(recipe: str) -> dict[str, float]:
    """What the main job measured of a recipe."""
    figures = load_figures("main-job")["figures"]
    own = [figure for figure in figures if figure["what"].startswith(f"{recipe}: ")]
    return {figure["what"].removeprefix(f"{recipe}: "): figure["value"] for figure in own}


def quickstart() -> str:
    """The closing table of the quickstart."""
    values = figures_of("quickstart")
    rows = (
        ("held-out loss (nats per supervised token)", "held-out loss of the NF4 base", "held-out loss after training"),
        ("character similarity of generated commands", "character similarity before", "character similarity after"),
        ("KL from the trained model", "KL with the adapter off", "KL of the export from the trained model"),
    )
    lines = ["| | base (last row: adapter off) | adapter (last row: merged model) |", "|---|---|---|"]
    lines += [f"| {what} | {values[before]:.3g} | {values[after]:.3g} |" for what, before, after in rows]
    return "\n".join(lines)


def recipes() -> str:
    """What the recipes that were run here came to."""
    rows = (
        ("quickstart", "held-out loss", "held-out loss of the NF4 base", "held-out loss after training"),
        ("spelling", "exact match", "exact match of the NF4 base", "exact match after at most one epoch"),
        ("jargon", "held-out loss", "held-out loss of the NF4 base", "held-out loss after training"),
    )
    lines = ["| Recipe | Measured on held-out rows | Base | Trained | Wall time | Tokens/s | Peak memory |"]
    lines.append("|---|---|---|---|---|---|---|")
    for recipe, what, before, after in rows:
        values = figures_of(recipe)
        if not values.keys() >= {before, after, "wall time", "training speed", "peak resident memory"}:
            continue
        lines.append(
            f"| [{recipe}.yaml]({recipe}.yaml) | {what} | {values[before]:.3g} | {values[after]:.3g} "
            f"| {values['wall time']:,.0f} s | {values['training speed']:,.0f} "
            f"| {values['peak resident memory']:.2f} GiB |"
        )
    return "\n".join(lines) if len(lines) > 2 else not_measured("main-job")


def cards() -> str:
    """What the recipes for cards are planned to hold."""
    lines = ["| Recipe | Planned peak on the least card of its class | That card has |", "|---|---|---|"]
    for figure in load_figures("fit")["figures"]:
        recipe, _, card = figure["what"].partition(": planned on an ")
        if card:
            lines.append(f"| {recipe}.yaml | {figure['value']:.1f} GiB | {card}: {figure['at_most']:.1f} GiB |")
    return (
        "\n".join(lines) if len(lines) > 2 else "Not measured yet: `make prove WHAT=fit JSON=tools/figures/fit.json`."
    )


def card_speed() -> str:
    """Ours and the peers on a card, from `tools/bench.py --device cuda --json`. Of the stored run the best repeat alone
    was kept of each contender; ratios are of the best of equally many, as there."""
    report = load_figures("card")
    results = [Result(**found) for found in report["results"]]
    ours = next(result for result in results if result.contender == "ours")
    lines = ["| | tokens/s | ours ÷ it | MiB above the loaded model | dequantisations | base MFLOP per token |"]
    lines.append("|---|---|---|---|---|---|")
    for result in results:
        ratio = f"{ours.ratio(result):.2f}" if result is not ours else ""
        ratio = ratio if result.agrees else f"({ratio})"
        lines.append(
            f"| {CONTENDERS[result.contender].title} | {result.tokens_per_s:,.0f} | {ratio} "
            f"| {result.peak_bytes / 2**20:,.0f} | {result.dequantisations:.2f} "
            f"| {result.flops_per_token['base'] / 1e6:,.0f} |"
        )
    machine = report["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines += [
        "",
        f"`{report['command']}` on one {', '.join(machine['cuda_devices'])}, Python {machine['python']}; {versions}.",
    ]
    return "\n".join(lines)


def keys() -> str:
    """Every key of a recipe: its default, and its unit and reason."""
    schema = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text(encoding="utf-8"))
    lines: list[str] = []
    for section, found in schema["properties"].items():
        if "properties" not in found:
            continue
        lines += [f"### {section}", "", "| Key | Default | Meaning |", "|---|---|---|"]
        for key, shape in found["properties"].items():
            required = key in found.get("required", ())
            default = "required" if required else f"`{json.dumps(shape.get('default'))}`"
            about = shape.get("description", "").replace("|", "\\|")
            lines.append(f"| `{key}` | {default} | {about} |")
        lines.append("")
    return "\n".join(lines).rstrip()


PARTS = {
    "keys": keys,
    "tree": tree,
    "figures:main-job": lambda: figures_table("main-job"),
    "figures:data": lambda: figures_table("data"),
    "figures:speed": lambda: figures_table("speed"),
    "figures:fit": lambda: figures_table("fit"),
    "figures:resume": lambda: figures_table("resume"),
    "figures:deploy": lambda: figures_table("deploy"),
    "figures:methods": lambda: figures_table("methods"),
    "figures:quickstart": quickstart,
    "figures:recipes": recipes,
    "figures:card": card_speed,
    "figures:cards": cards,
    "figures:compare": comparison,
    "figures:quant": quantisation,
    "figures:theory": theory,
    "methods": methods_table,
}


def render(text: str) -> str:
    """The text with every generated part made anew."""
    for name, make in PARTS.items():
        start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        pattern = re.escape(start) + r"(?:.*?" + re.escape(end) + ")?"
        if start in text:
            part = f"{start}\n{make()}\n{end}".replace("\\", "\\\\")
            text = re.sub(pattern, part, text, count=1, flags=re.DOTALL)
    return text


def main() -> int:
    """Write the documents, or say which are stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 when a document is stale")
    check = parser.parse_args().check
    num_stale = 0
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        if (rendered := render(text)) == text:
            continue
        num_stale += 1
        if check:
            print(f"{document.relative_to(ROOT)} is stale: run tools/render_docs.py")
        else:
            document.write_text(rendered, encoding="utf-8")
    return int(check and num_stale > 0)


if __name__ == "__main__":
    sys.exit(main())
