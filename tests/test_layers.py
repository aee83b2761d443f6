"""What import-linter cannot say: which rooms live on the standard library alone, whatever the packages are called."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "bullpen"

STANDARD_LIBRARY_ROOMS = ("zygote", "sim", "gate")
# A world prepares one engine, so its files (worlds/vllm.py, worlds/vllm_*.py) may import that engine.
ENGINES_OF_A_WORLD = {"vllm": {"torch", "transformers", "vllm"}}


def imported_packages(node: ast.AST) -> set[str]:
    """The top-level packages that code needs: imported at any depth, with no ``except ImportError`` around it."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {node.module.partition(".")[0]} if node.module and node.level == 0 else set()
    children: list[ast.AST] = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.Try) and any("ImportError" in ast.unparse(handler) for handler in node.handlers):
        children = [*node.handlers, *node.orelse, *node.finalbody]
    return set().union(*map(imported_packages, children))


def packages_of(file: Path) -> set[str]:
    return imported_packages(ast.parse(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize("room", STANDARD_LIBRARY_ROOMS)
def test_room_imports_the_standard_library_alone(room: str) -> None:
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert files, f"bullpen.{room} has no files"
    for file in files:
        world = file.stem.partition("_")[0] if file.parent.name == "worlds" else ""
        allowed = sys.stdlib_module_names | {"bullpen"} | ENGINES_OF_A_WORLD.get(world, set())
        foreign = packages_of(file) - allowed
        assert not foreign, f"{file.relative_to(PACKAGE)} imports {', '.join(sorted(foreign))}"


def test_importing_bullpen_imports_nothing_else() -> None:
    assert packages_of(PACKAGE / "__init__.py") == set()
