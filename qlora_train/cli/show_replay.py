"""What came of making logged steps again, on stdout."""

from __future__ import annotations

from qlora_train.api import Replay
from qlora_train.cli.results import new_table, stdout
from qlora_train.printable import printable
from qlora_train.train.fork import describe_changes

_MEANING = {
    "D2": "D2: equal to the bit. A resume here goes on as the undisturbed run would have.",
    "D1": "D1: the same rows in the same order, other rounding. A resume here is not exact to the bit.",
    "D0": "D0: this is not the computation that was logged.",
}
_UNSEEN = (
    "D2: equal to the bit up to the update, which no logged step or checkpoint shows: this says nothing of the "
    "optimiser's state. Replay from an earlier step to see it."
)


def replayed(result: Replay) -> None:
    """Each step as it was logged and as it is here, and what that is worth."""
    start = f"from the checkpoint of step {result.from_step}" if result.from_step else "from the start"
    print(f"{result.run_dir.name}: {len(result.steps)} logged {'step' if len(result.steps) == 1 else 'steps'}, {start}")
    table = new_table("step", "loss, logged", "here", "apart", "grad norm, logged", "here")
    for step in result.steps:
        figures = (step.logged_loss, step.loss, step.loss_distance, step.logged_grad_norm, step.grad_norm)
        table.add_row(str(step.step), *(f"{figure:.9g}" for figure in figures))
    stdout.print(table)
    if result.compared_with is not None:
        equal = "equal to the bit" if result.same_adapter else "not equal"
        print(f"the adapter, and that of the checkpoint of step {result.compared_with}: {equal}")
    if result.rounding:
        print(printable(f"this machine is not as it was: {describe_changes(result.rounding)}"))
    print(_MEANING[result.level] if result.level != "D2" or result.sees_update else _UNSEEN)
