"""Fill the generated parts of README.md: file trees, and figures that `make prove JSON=...` wrote.

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

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
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
    return "```\n" + "\n".join(lines) + "\n```"


def load_figures(name: str) -> dict[str, Any]:
    """What `make prove WHAT=name JSON=tools/figures/name.json` wrote."""
    report: dict[str, Any] = json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))
    return report


def number(value: float) -> str:
    """A figure with four significant digits."""
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.4g}"


def figures_table(name: str) -> str:
    """All figures of a proof, with the machine and versions they were measured on."""
    report = load_figures(name)
    lines = ["| What | Measured | Bar |", "|---|---|---|"]
    for figure in report["figures"]:
        bar = f"at most {number(figure['at_most'])}" if figure["at_most"] is not None else ""
        bar = f"at least {number(figure['at_least'])}" if figure["at_least"] is not None else bar
        note = f" ({figure['note']})" if figure["note"] else ""
        short = "" if figure["ok"] or not bar else ": **short**"
        line = f"| {figure['what']} | {number(figure['value'])} {figure['unit']}{note} | {bar}{short} |"
        lines.append(line.replace("  |", " |"))
    machine = report["machine"]
    names = ("torch", "transformers", "bitsandbytes", "peft", "trl", "accelerate", "tokenizers", "pyarrow")
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in names if name in machine["versions"])
    where = f"{machine['cpu_count']} CPU cores ({machine['cpu_capability']}), no GPU, Python {machine['python']}"
    return "\n".join([*lines, "", f"Measured on {where}; {versions}."])


def quickstart() -> str:
    """The closing table of the quickstart."""
    values = {
        figure["what"].removeprefix("quickstart: "): figure["value"] for figure in load_figures("main-job")["figures"]
    }
    rows = (
        ("held-out loss (nats per supervised token)", "held-out loss of the NF4 base", "held-out loss after training"),
        ("character similarity of generated commands", "character similarity before", "character similarity after"),
        ("KL from the trained model", "KL with the adapter off", "KL of the export from the trained model"),
    )
    lines = ["| | base (last row: adapter off) | adapter (last row: merged model) |", "|---|---|---|"]
    lines += [f"| {what} | {values[before]:.3g} | {values[after]:.3g} |" for what, before, after in rows]
    return "\n".join(lines)


PARTS = {
    "tree": tree,
    "figures:main-job": lambda: figures_table("main-job"),
    "figures:data": lambda: figures_table("data"),
    "figures:speed": lambda: figures_table("speed"),
    "figures:quickstart": quickstart,
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
    """Write README.md, or say that it is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 when README.md is stale")
    text = README.read_text(encoding="utf-8")
    rendered = render(text)
    if parser.parse_args().check:
        if rendered != text:
            print("README.md is stale: run tools/render_docs.py")
        return int(rendered != text)
    README.write_text(rendered, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
