"""The table of adapter methods as plain data. A method the table lacks does not exist. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One row: how the update is scaled, and where it comes from."""

    name: str
    scaling: str  # the factor on B A, as a formula in `alpha` and `r`
    use_rslora: bool
    arxiv: str
    summary: str


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("lora", "alpha / r", False, "2106.09685", "y = W x + (alpha / r) B A x; B starts at zero"),
        Method("rslora", "alpha / sqrt(r)", True, "2312.03732", "LoRA whose scale keeps the output's size as r grows"),
    )
}
