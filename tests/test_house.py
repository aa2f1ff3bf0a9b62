"""The rules of the house that a machine can check: who imports whom, the same op names everywhere, documented public names."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastadapt
from fastadapt import backend, functional

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastadapt"

# "A: B" means that A may import B (and itself). The package's own __init__ hands names on, and `_version` is a constant.
LOWER = {
    "backend": set(),
    "ops": {"backend"},
    "functional": {"backend", "ops"},
    "nn": {"functional"},
    "methods": {"nn"},
    "hosts": {"functional", "nn"},
    "checkpoint": set(),
    "patching": {"backend", "methods", "hosts", "checkpoint"},
}
LOWER |= {top: {*LOWER, "interop", "training"} for top in ("interop", "training", "cli")}


def modules() -> Iterator[tuple[Path, str, ast.Module]]:
    """Every module of the package: file, the part of the house that it belongs to, syntax tree."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, path.relative_to(PACKAGE).parts[0].removesuffix(".py"), ast.parse(path.read_text(), str(path))


def imports(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full name of every import, wherever in the module it stands; ``from a import b`` counts as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ["fastadapt", *path.relative_to(PACKAGE).parts[:-1]]
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            yield from ((node.lineno, f"{base}{node.module or ''}.{alias.name}".replace("..", ".")) for alias in node.names)


def test_who_may_import_whom() -> None:
    wrong = []
    for path, part, tree in modules():
        if part in ("__init__", "_version"):
            continue
        assert part in LOWER, f"{path}: the import rules know no {part!r}"
        for line, name in imports(path, tree):
            top, _, rest = name.partition(".")
            other = rest.split(".")[0]
            if top == "fastadapt" and other not in {part, "_version", "__version__"} | LOWER[part]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {part} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_what_import_fastadapt_loads_needs_torch_only() -> None:
    """No module that is loaded with the package imports more than torch and the standard library at its top level; the rest is loaded on first use."""
    for path, part, tree in modules():
        if part in ("backend", "functional", "ops", "__init__", "nn", "methods") and path.name != "triton.py":
            top_level = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
            for line, name in imports(path, top_level):
                assert name.split(".")[0] in {"fastadapt", "torch", *sys.stdlib_module_names}, f"{path}:{line} imports {name}"


def test_the_import_rules_see_a_violation() -> None:
    tree = ast.parse("def f():\n    from .. import nn\n    import fastadapt.patching as p\n    from fastadapt import hosts")
    assert [name for _, name in imports(PACKAGE / "ops" / "x.py", tree)] == ["fastadapt.nn", "fastadapt.patching", "fastadapt.hosts"]


# (op, file beside it) -> why there is none. README's status table says the same.
ABSENT: dict[tuple[str, str], str] = {}
# Functions that are one call of another op, between a few of torch's on parameters.
COMPOSED = {"multimodal_bottleneck"}
# Ops that run on another's CPU kernels.
BORROWED = {"lora": "bottleneck", "routed_bottleneck": "bottleneck"}


def test_an_op_has_the_same_name_everywhere() -> None:
    ops = {path.parent.name for path in (PACKAGE / "ops").glob("*/__init__.py")}
    assert ops >= {"bottleneck", "gated_bottleneck"}
    assert ops | COMPOSED == set(functional.__all__)
    assert ops == set(backend._plans)
    assert ops | COMPOSED == {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "ops").glob("test_*.py")}
    assert ops == {path.stem for path in (ROOT / "benchmarks" / "ops").glob("*.py")} - {"__init__", "__main__"}
    assert {BORROWED.get(op, op) for op in ops} == {path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp")}
    assert {op for op in ops if (op, "cuda") not in ABSENT} == {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert {name for op in ops for name in (op, f"{op}_backward")} == {
        name.removeprefix("fastadapt::").split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastadapt::")
    }
    for op in ops:
        for part in ("reference", "schema", "function", "plan", "cpu", "triton", "cuda"):
            assert (PACKAGE / "ops" / op / f"{part}.py").exists() != ((op, part) in ABSENT), f"{op} and {part}.py"


def public(module: ModuleType) -> Iterator[tuple[str, object]]:
    """The public functions and classes that a module defines or hands on, with their public methods and properties."""
    for name, value in vars(module).items():
        if not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__.startswith("fastadapt"):
            yield name, value
            if inspect.isclass(value):
                yield from (
                    (f"{name}.{key}", getattr(value, key))
                    for key, member in vars(value).items()
                    if not key.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
                )


def test_public_names_are_documented() -> None:
    """Modules, and whatever a user can reach; a method that overrides a documented one inherits its words."""
    bare = [str(path.relative_to(ROOT)) for path, part, tree in modules() if path.name != "__init__.py" and part != "_version" and not ast.get_docstring(tree)]
    for name in ("backend", "functional", "nn", "methods", "patching", "checkpoint"):
        bare += [f"{name}.{inner}" for inner, value in public(import_module(f"fastadapt.{name}")) if not inspect.getdoc(value)]
    assert not bare, "without a docstring: " + ", ".join(bare)


@pytest.mark.parametrize("op", functional.__all__)
def test_an_ops_docstring_names_every_argument(op: str) -> None:
    function = getattr(functional, op)
    text = inspect.getdoc(function) or ""
    assert all(section in text for section in ("Args:", "Returns:", "Raises:", ".. math::", "section"))
    assert [name for name in inspect.signature(function).parameters if name not in text] == []


def test_the_public_names_are_the_promised_ones() -> None:
    assert set(fastadapt.__all__) >= {"patch", "nn", "functional", "backend", "methods", "__version__"}
    assert all(getattr(fastadapt, name) is not None for name in fastadapt.__all__)
    assert backend.NAMES == ("auto", "reference", "cpu", "triton", "cuda", "emulated-cuda")  # places are numbers in exported programs
