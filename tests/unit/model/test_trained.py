"""An adapter meets the base it was trained on, or an error that names the difference."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from qlora_train.errors import ModelError
from qlora_train.model.binding import refuse_other_base
from qlora_train.model.trained import open_run
from qlora_train.quant.bnb import QuantSettings
from qlora_train.quant.fingerprint import BasePrint, TensorPrint

QUANT = QuantSettings("nf4", True, 64, "uint8")
ENTRY = TensorPrint("a" * 64, (2, 2), "nf4", 4, True, True)
BASE = BasePrint({"m.0.weight": ENTRY, "m.1.weight": ENTRY, "m.2.weight": ENTRY}, asdict(QUANT))


def test_the_same_base_is_accepted() -> None:
    refuse_other_base(BASE, BasePrint.from_dict(BASE.as_dict()))


def test_the_first_differing_tensor_is_named() -> None:
    other = replace(ENTRY, sha256="b" * 64)
    here = BasePrint({**BASE.tensors, "m.2.weight": other, "m.1.weight": other}, BASE.quant)
    with pytest.raises(ModelError, match=r"2 of 3 tensors differ, first m\.1\.weight") as caught:
        refuse_other_base(BASE, here)
    assert BASE.digest[:16] in str(caught.value) and here.digest[:16] in str(caught.value)


@pytest.mark.parametrize("swap", [False, True])
def test_a_tensor_on_one_side_only_is_named(swap: bool) -> None:
    here = BasePrint({**BASE.tensors, "m.15.weight": ENTRY}, BASE.quant)
    sides = (here, BASE) if swap else (BASE, here)
    with pytest.raises(ModelError, match=r"1 of 4 tensors differ, first m\.15\.weight"):
        refuse_other_base(*sides)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a run folder"):
        open_run(tmp_path)
    (tmp_path / "recipe.resolved.yaml").write_text("model: {}\n")
    with pytest.raises(ModelError, match=r"no finished adapter yet\. Fix: finish it: qlora-train train RECIPE$"):
        open_run(tmp_path)
    (tmp_path / "ckpt" / "step-000004").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"train RECIPE --resume$"):
        open_run(tmp_path)
