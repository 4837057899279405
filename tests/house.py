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


def lines(folder):
    return sum(len(path.read_text().splitlines()) for path in folder.rglob("*.py"))


def main(folders):
    for folder in folders:
        found = trees(folder)
        rooms = Counter()
        for path, tree in found.items():
            rooms[path.parts[0]] += statements(tree)
        text = sum(node.end_lineno - node.lineno + 1 for tree in found.values() for node in docstrings(tree))
        print(f"{folder}: {rooms.total()} statements, docstrings {text / lines(folder):.4f} of the lines")
        print("  " + ", ".join(f"{room} {count}" for room, count in rooms.most_common()))


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]] or [PACKAGE])
