"""What unit tests of several packages share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

import pytest


@pytest.fixture(scope="module")
def shared_workers() -> Iterator[None]:
    """Renderers of a module share one worker a template: starting one takes 0.2 s."""
    from qlora_train.data import template as template_module
    from qlora_train.data.sandbox import Sandbox

    class _KeptSandbox(Sandbox):
        """A sandbox that stays open when a renderer closes it."""

        kept = True

        def close(self) -> None:
            if not self.kept:
                super().close()

    opened: dict[str, _KeptSandbox] = {}

    def shared(templates: Sequence[str], variables: Mapping[str, str], name: str, where: str | None) -> Sandbox:
        key = json.dumps([*templates, *variables.items()])
        if key not in opened:
            opened[key] = _KeptSandbox(templates, variables, name, where)
        return opened[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template_module, "Sandbox", shared)
        yield
    for sandbox in opened.values():
        sandbox.kept = False
        sandbox.close()
