"""The table of adapter methods as recipes/methods/README.md shows it; tools/render_docs.py writes it there."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_train.recipe.methods import METHODS, Method

MERGES = {"fold": "plain LoRA", "weight": "a plain weight", "none": "no"}
RULES = {"adamw": "", "loraplus": "two learning rates", "lora_pro": "gradients rewritten"}


def methods_table() -> str:
    """One line per method: the key, what it does, what is special about its course, what it merges into."""
    head = ("`adapter.method`", "", "What is trained", "In training", "Merges into", "Own keys", "Status")
    lines = [_row(head), "|---" * len(head) + "|"]
    lines += [_line(method) for method in METHODS.values()]
    return "\n".join(lines)


def _line(method: Method) -> str:
    paper = f"[{method.title}](https://arxiv.org/abs/{method.arxiv})"
    course = [] if method.starts_at_base else ["starts beside the base"]
    course += [word for word in (RULES.get(method.rule, method.rule), method.schedule or "") if word]
    keys = ", ".join(f"`{key}`" for key in method.options)
    merges = MERGES[method.merges] + (" on its own base" if method.base == "residual" else "")
    cells = (
        f"[`{method.name}`]({method.name}.yaml)",
        paper,
        method.summary,
        "; ".join(course),
        merges,
        keys,
        method.status,
    )
    return _row(cells)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")
