"""Every start, rule and base as a whole run: trained by a recipe, loaded again, resumed to the bit, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_train.adapters.inits.residual import untrained
from qlora_train.adapters.state import WEIGHTS
from qlora_train.data.loader import eval_batches
from qlora_train.evaluate.validation import validate
from qlora_train.export.run import run_export
from qlora_train.model.causal import CausalModel
from qlora_train.model.trained import load_trained, open_run
from qlora_train.recipe.load import load_recipe
from qlora_train.train.metrics import Silent
from qlora_train.train.run import run_training
from tests.commandline import write_recipe

pytestmark = pytest.mark.slow

CASES: dict[str, dict[str, Any]] = {
    "loraplus": {},
    "lora_pro": {},
    "lora_pro full": {"adapter__rule_mode": "full"},
    "loftq": {},
    "loftq of two rounds": {"adapter__start_iters": 2},
    "pissa": {},
    "pissa of three rounds": {"adapter__start_iters": 3},
    "milora": {},
    "olora": {},
    "lora_ga": {"adapter__probe_batches": 2},
    "eva": {"adapter__probe_batches": 2},
    "eva with ranks of its own": {"adapter__probe_batches": 2, "adapter__rho": 2.0},
    "lora on int4": {"quant__quant_type": "int4", "quant__block_size": 32},
    "pissa on int4": {"quant__quant_type": "int4", "quant__block_size": 64},
    "pissa on fp4": {"quant__quant_type": "fp4"},
    "pissa on an unquantised base": {"quant__quant_type": "none"},
    "qalora": {"quant__quant_type": "int4", "quant__block_size": 32},
}


@pytest.mark.parametrize("case", CASES)
def test_a_whole_run(case: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    settings = {"adapter__method": case.split()[0], "adapter__dropout": 0.0, "eval__generate_rows": 0, "train__keep": 9}
    loaded = load_recipe(write_recipe(tmp_path, tiny_llama_dir, **settings, **CASES[case]), ())
    result = run_training(loaded, resume=False, from_step=None, reporter=Silent())
    assert result.base is not None and result.adapter is not None and result.adapter.loss < result.base.loss

    run = open_run(tmp_path / "run")
    trained = load_trained(run)
    causal, table = CausalModel(trained.model), run.load_split("eval", trained.tokenizer).table

    def held_out() -> float:
        return validate(causal, eval_batches(table, 3, 2), trained.base.device).loss

    assert held_out() == result.adapter.loss, "loaded again it is the trained model, to the bit"
    with untrained(trained.model):
        assert held_out() == result.base.loss
    assert run_export(run, tmp_path / "merged").verdict.kl_frac < 1e-3

    weights = tmp_path / "run" / "adapter" / WEIGHTS
    straight = weights.read_bytes()
    run_training(loaded, resume=True, from_step=2, reporter=Silent())
    assert weights.read_bytes() == straight
