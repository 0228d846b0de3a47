"""Who takes part in the comparison: every method of the table, with the settings of its own recipe."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from qlora_train.recipe.methods import METHODS

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
REFERENCE = "lora"  # what step time and memory are compared with
BF16 = "lora_bf16"
USUAL_R = 16
# The table "worth it on NF4": these are compared on a second set too.
VERDICT = ("lora", "rslora", "loraplus", "dora", "loftq", "pissa", "eva", "qalora")


@dataclass(frozen=True)
class Entrant:
    """A method with the recipe keys that make it what its paper describes; data and steps are the comparison's."""

    name: str
    title: str
    overrides: tuple[str, ...]  # adapter.method first
    first_rate: float  # where the search begins; it goes on until the best rate has worse ones on both sides
    note: str = ""

    @property
    def method(self) -> str:
        """Its row of the method table."""
        return self.overrides[0].partition("=")[2]

    @property
    def needs_experts(self) -> bool:
        """Whether finished adapters must be trained for it first."""
        return "experts" in METHODS[self.method].options


def entrants() -> dict[str, Entrant]:
    """Every method of the table, and LoRA on a bf16 base, by name."""
    found = {name: _entrant(name) for name in METHODS}
    lora = found[REFERENCE]
    unquantised = (*lora.overrides, "quant.quant_type=none")
    found[BF16] = Entrant(BF16, "LoRA, bf16 base", unquantised, lora.first_rate, "nothing is quantised")
    return found


def _entrant(name: str) -> Entrant:
    """The sections `adapter` and `quant` of recipes/methods/NAME.yaml, and its learning rate."""
    recipe = yaml.safe_load((RECIPES / "methods" / f"{name}.yaml").read_text(encoding="utf-8"))
    adapter = {"method": name, **recipe["adapter"]}
    adapter.pop("experts", None)  # trained for the comparison, on its own rows
    sections = {"adapter": adapter, "quant": recipe.get("quant", {})}
    keys = [
        f"{section}.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for section, values in sections.items()
        for key, value in values.items()
    ]
    return Entrant(
        name, METHODS[name].title, tuple(keys), float(recipe["train"]["learning_rate"]), _note(name, sections)
    )


def _note(name: str, sections: dict[str, dict[str, object]]) -> str:
    """In what it is unlike the others, besides its method."""
    notes = []
    if (r := sections["adapter"].get("r", USUAL_R)) != USUAL_R:
        target = sections["adapter"].get("target_r")
        notes.append(f"r = {r}" if target is None else f"r = {r} falls to {target} on average")
    if "experts" in METHODS[name].options:
        notes.append("a router over two LoRAs of half the rows each")
    if quant_type := sections["quant"].get("quant_type"):
        notes.append(f"on an {str(quant_type).upper()} base with groups of {sections['quant']['block_size']}")
    return "; ".join(notes)
