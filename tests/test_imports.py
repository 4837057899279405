"""The order of the rooms: data flows one way, and `import tying` brings no Lightning."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tying

ROOT = Path(tying.__file__).parent
# what each room may import of ours, itself apart
ALLOWED = {
    "errors": set(),
    "relations": {"errors"},
    "patterns": {"errors"},
    "names": {"errors", "patterns", "relations"},
    "ties": {"errors", "relations"},
    "selection": {"errors", "patterns", "names", "relations", "ties"},
    "atomic": set(),
    "checkpoints": {"errors", "names"},
    "soft": {"errors", "names", "relations", "ties"},
    "hard": {"errors", "atomic", "names", "relations", "selection", "ties"},
    "hashing": {
        "errors",
        "atomic",
        "checkpoints",
        "names",
        "selection",
        "ties",
        "hard",
    },  # one table of a network is a hard tie
    "depth": {"errors", "names", "patterns", "relations", "ties", "hard"},  # a recurrent block is a hard tie
    "models": {"errors", "checkpoints", "names", "patterns", "depth"},
    "data": {"errors", "atomic"},
    "callbacks": {"errors", "atomic", "checkpoints", "names", "selection", "ties", "soft", "hard", "hashing", "depth"},
    "mixins": {"errors", "callbacks"},
}
FREE = {"__init__", "__main__", "bake", "cli", "explanation", "inspection"}


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = sorted(path for path in ROOT.rglob("*.py") if room(path) not in FREE)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_in_order(path):
    own = {name.split(".")[1] for name in imports(path) if name.startswith("tying.")}
    assert own - {room(path)} <= ALLOWED[room(path)]


@pytest.mark.parametrize("path", [path for path in FILES if room(path) not in {"callbacks", "mixins"}], ids=str)
def test_only_callbacks_import_lightning_callbacks(path):
    assert not [name for name in imports(path) if name.startswith("lightning.pytorch.callbacks")]


def test_import_tying_does_not_import_lightning():
    code = "import sys, tying, tying.soft, tying.hard, tying.hashing, tying.depth; sys.exit('lightning' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
