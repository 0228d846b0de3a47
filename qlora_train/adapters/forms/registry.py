"""The forms by the name that a method's row gives: the one place where a new form is entered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qlora_train.adapters.forms.base import Form
from qlora_train.adapters.forms.cores import CoreForm, TransformedForm
from qlora_train.adapters.forms.delta import DeltaForm
from qlora_train.adapters.forms.diagonals import ScaledForm, SingularForm
from qlora_train.adapters.forms.dora import DoraForm
from qlora_train.adapters.forms.mole import MixtureForm
from qlora_train.adapters.forms.offset import OffsetForm, ResidualForm
from qlora_train.adapters.forms.qalora import GroupedForm

Options = Mapping[str, Any]  # what the recipe says for the keys in the row's `options`

FORMS: dict[str, Callable[[Options], Form]] = {
    "plain": lambda options: Form(),
    "dora": lambda options: DoraForm(),
    "mtlora": lambda options: TransformedForm(options["structure"]),
    "flora_core": lambda options: CoreForm(options["r_out"], options["r_kernel"]),
    "adalora": lambda options: SingularForm(),
    "aflora": lambda options: ScaledForm(),
    "mole": lambda options: MixtureForm(len(options["experts"]), options["granularity"]),
    "delta": lambda options: DeltaForm(options["parameters"]),
    "qalora": lambda options: GroupedForm(options["group_size"]),
    "offset": lambda options: OffsetForm(),
    "residual": lambda options: ResidualForm(),
    # One iteration leaves the base as it is: nothing is taken, and nothing need be kept.
    "loftq": lambda options: ResidualForm() if options["start_iters"] > 1 else Form(),
}
