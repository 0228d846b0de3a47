"""The layer rule: a module imports only from lower layers or its own package. Imports inside functions count."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.structure.source_tree import PACKAGE, parse, python_files, relative

LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "names", "plain", "printable", "seeds", "units"}),
    frozenset({"recipe", "quant", "artifacts", "environment", "untrusted"}),
    frozenset({"data", "loss", "kernels"}),
    frozenset({"adapters"}),
    frozenset({"model"}),
    frozenset({"evaluate", "memory"}),
    frozenset({"train", "export", "analysis", "report"}),
    frozenset({"api"}),
    frozenset({"cli", "__main__"}),
)
LAYER_OF = {unit: level for level, units in enumerate(LAYERS) for unit in units}
# `python -m qlora_train` is the command line under another name.
SAME_PACKAGE = {("__main__", "cli")}
BITSANDBYTES_MAY_BE_IMPORTED_IN = ("qlora_train/quant/", "qlora_train/model/load.py")


def module_name(path: Path) -> str:
    """`qlora_train/train/loop.py` -> `qlora_train.train.loop`; a package's `__init__` is the package."""
    parts = relative(path).removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of each import; of `from a import b` both `a` and `a.b`, as b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            yield from ((node.lineno, str(name)) for name in names[:1])


def violations(source: ast.Module, path: Path) -> list[str]:
    """Every import of the file that the layer rule forbids, as `path:line: reason`."""
    name = module_name(path)
    own = name.split(".")[1] if "." in name else ""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = []
    for line, module in imported_modules(source, package):
        root, *rest = module.split(".")
        target = rest[0] if rest else ""
        if root != "qlora_train" or target in ("", own, "__version__") or (own, target) in SAME_PACKAGE:
            continue
        if target not in LAYER_OF:
            found.append(f"{relative(path)}:{line}: {module} is in no layer")
        elif LAYER_OF[target] >= LAYER_OF.get(own, -1):
            layers = f"{own} (layer {LAYER_OF.get(own)}) imports {target} (layer {LAYER_OF[target]})"
            found.append(f"{relative(path)}:{line}: {layers}")
    return found


@pytest.mark.parametrize("path", python_files("qlora_train"), ids=relative)
def test_imports_point_down(path: Path) -> None:
    assert violations(parse(path), path) == []


@pytest.mark.parametrize(
    "source",
    [
        "from qlora_train.train.loop import train",
        "def late():\n    import qlora_train.api",
        "from qlora_train import cli",
        "from ..api import train",
        "from .. import train",
        "import importlib\nimportlib.import_module('qlora_train.train.loop')",
        "from qlora_train.adapters import attach",
        "from qlora_train.elsewhere import thing",
        "if TYPE_CHECKING:\n    from qlora_train.model.load import Base",
    ],
)
def test_the_rule_sees_violations(source: str) -> None:
    """Negative control, as if written in qlora_train/data/formats.py (layer 2)."""
    assert len(violations(ast.parse(source), PACKAGE / "data" / "formats.py")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from qlora_train.errors import DataError",
        "from .pack import pack",
        "import torch",
        "from qlora_train import __version__",
        "from qlora_train import data",
    ],
)
def test_the_rule_allows_what_is_below(source: str) -> None:
    assert violations(ast.parse(source), PACKAGE / "data" / "formats.py") == []


def test_every_unit_has_a_layer() -> None:
    """A new top-level module or package is placed on purpose."""
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    packages = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert modules | packages <= LAYER_OF.keys()


@pytest.mark.parametrize("path", [p for p in python_files("qlora_train") if p.name == "__init__.py"], ids=relative)
def test_init_files_hold_a_docstring_and_nothing_else(path: Path) -> None:
    """The root's may also define `__version__`: re-exports would tie the layers into a knot."""
    body = parse(path).body
    assert ast.get_docstring(parse(path)), f"{relative(path)} says nothing"
    version = ["__version__"] if path.parent == PACKAGE else []
    assert [ast.unparse(node).partition(" = ")[0] for node in body[1:]] in ([], version)


@pytest.mark.parametrize("path", python_files("qlora_train"), ids=relative)
def test_bitsandbytes_has_one_door(path: Path) -> None:
    imports = {module.split(".")[0] for _, module in imported_modules(parse(path), module_name(path))}
    if not relative(path).startswith(BITSANDBYTES_MAY_BE_IMPORTED_IN):
        assert "bitsandbytes" not in imports


def test_every_package_has_an_init() -> None:
    """Without one a folder is a namespace package, which the wheel and these tests would read differently."""
    folders = {path.parent for path in python_files("qlora_train")}
    assert [relative(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []
