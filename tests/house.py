"""Measures of the source: `python tests/house.py [FOLDER ...]` prints them for each folder, by default this package."""

import ast
import sys
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "tying"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def trees(folder=PACKAGE):
    return {path.relative_to(folder): ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))}


def docstrings(tree):
    return [
        node.body[0] for node in ast.walk(tree) if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None
    ]


def statements(tree):
    """Return the number of statements, docstrings apart."""
    return sum(isinstance(node, ast.stmt) for node in ast.walk(tree)) - len(docstrings(tree))


def definitions(tree):
    """Yield the names of functions, classes and arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg


def bindings(tree):
    """Yield the names of variables and arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


def functions(tree):
    """Yield each function's name and its lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def imports(tree):
    """Yield the names of the modules that are imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def private_names(tree):
    """Yield the private names that are read, written, imported or named to ``getattr`` and its like."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.FunctionDef):
            names = [node.name]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and "attr" in node.func.id:
            names = [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
        yield from (name for name in names if name.startswith("_") and not name.startswith("__"))


def private_definitions(tree):
    """Yield the private names that are defined: functions, classes, variables and attributes of ``self`` or ``cls``."""
    for node in ast.walk(tree):
        name = ""
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            name = node.attr if node.value.id in ("self", "cls") else ""
        if name.startswith("_"):
            yield name


def lines(folder):
    return sum(len(path.read_text().splitlines()) for path in folder.rglob("*.py"))


def main(folders):
    for folder in folders:
        sources = trees(folder)
        rooms = Counter()
        for path, tree in sources.items():
            rooms[path.parts[0]] += statements(tree)
        text = sum(node.end_lineno - node.lineno + 1 for tree in sources.values() for node in docstrings(tree))
        print(f"{folder}: {rooms.total()} statements, docstrings {text / lines(folder):.4f} of the lines")
        print("  " + ", ".join(f"{room} {count}" for room, count in rooms.most_common()))


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]] or [PACKAGE])
