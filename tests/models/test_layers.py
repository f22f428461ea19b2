"""Layout of python/vispruner: allowed imports, and the length of files."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / "python" / "vispruner"

#: Layers, lowest first. Each imports only earlier ones, at module level or inside a function.
ORDER = (
    "methods", "releases", "clock", "selection", "taps", "report", "models", "hf", "phases",
    "shapes", "flops", "clip", "embedded", "sweep", "lmms_eval", "vllm", "cli",
)  # fmt: skip
LONGEST = 350  # lines per file, except in vllm and embedded


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_of(path): path for path in ROOT.rglob("*.py")}


def imports(module: str) -> set[str]:
    """Modules of the package that a module imports anywhere, except for type checking only."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level or id(node) in typing_only:
            continue
        base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
        name = ".".join(part for part in base if part)
        for alias in node.names:
            inner = f"{name}.{alias.name}".lstrip(".")
            found.add(inner if inner in MODULES else name)
    return found - {module, ""}


def test_no_import_cycles() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in sorted(imports(module)):
                # A submodule may import from its own package.
                if not module.startswith(f"{other}."):
                    visit(other, (*path, module))
            done.add(module)

    for module in sorted(MODULES):
        visit(module, ())


def test_no_upward_imports() -> None:
    for module in filter(None, MODULES):
        layer = module.split(".")[0]
        for other in imports(module):
            target = other.split(".")[0]
            assert target == layer or ORDER.index(target) < ORDER.index(layer), (module, other)


def test_files_stay_short() -> None:
    for module, path in MODULES.items():
        if module.split(".")[0] not in ("vllm", "embedded"):
            assert len(path.read_text().splitlines()) <= LONGEST, module
