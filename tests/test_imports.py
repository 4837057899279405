"""The order of the rooms: data flows one way, and `import tying` brings no Lightning."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import house
import pytest

FIRST = {"errors", "mappings", "torch_workarounds"}
LIGHTNING = {"lightning_namespace"}
EARLY = FIRST | {"deprecated", "figures", "files", "selection"}
# what each room may import of ours, itself apart; families do not import each other
ALLOWED = {
    "errors": set(),
    "mappings": {"errors"},
    "deprecated": set(),
    "figures": set(),
    "torch_workarounds": set(),
    "lightning_namespace": {"errors"},
    "lightning_workarounds": LIGHTNING,
    "selection": FIRST,
    "files": FIRST | {"selection"},
    "weights": EARLY,
    **dict.fromkeys(["soft", "hard", "hashing", "depth"], EARLY | {"weights"}),
    "advice": EARLY | {"weights", "hard"},
    "data": EARLY | LIGHTNING,
    "callbacks": EARLY | LIGHTNING | {"lightning_workarounds", "weights", "soft", "hard", "hashing", "depth"},
    "models": EARLY | LIGHTNING | {"weights", "depth"},
    "mixins": EARLY | LIGHTNING | {"callbacks", "lightning_workarounds"},
}
ALONE = {("depth/rnn/passthrough.py", "hard.low_rank")}  # a recurrent network of low rank
TREES = house.trees()


def room(path):
    return path.parts[0].removesuffix(".py")


ORDERED = [path for path in TREES if room(path) not in {"__init__", "__main__", "cli"}]


@pytest.mark.parametrize("path", ORDERED, ids=str)
def test_rooms_import_in_order(path):
    modules = {module.removeprefix("tying.") for module in house.imports(TREES[path]) if module.startswith("tying.")}
    modules = {module for module in modules if (path.as_posix(), module) not in ALONE}
    assert {module.split(".")[0] for module in modules} - {room(path)} <= ALLOWED[room(path)]


LIGHTNINGS = {"lightning", "lightning_fabric", "pytorch_lightning"}


@pytest.mark.parametrize("path", TREES, ids=str)
def test_one_file_imports_lightning(path):
    imports = {name for name in house.imports(TREES[path]) if name.split(".")[0] in LIGHTNINGS}
    assert bool(imports) == (path.name == "lightning_namespace.py")


OTHERS = [path for path in ORDERED if room(path) not in {"callbacks", "mixins", "lightning_workarounds"}]


@pytest.mark.parametrize("path", OTHERS, ids=str)
def test_only_callbacks_use_lightning_callbacks(path):
    assert "pl.callbacks" not in ast.unparse(TREES[path])


def test_no_room_imports_itself_through_others():
    arrows = {room(path): set() for path in TREES}
    for path, tree in TREES.items():
        modules = [module.split(".") for module in house.imports(tree) if module.split(".")[0] == "tying"]
        arrows[room(path)] |= {parts[1] if len(parts) > 1 else "__init__" for parts in modules} - {room(path)}
    assert {*TopologicalSorter(arrows).static_order()} >= {"selection", "cli"}  # raises CycleError


def test_no_file_imports_itself_through_others():
    """Not even for type checking."""
    names = {".".join(("tying", *path.with_suffix("").parts)).removesuffix(".__init__"): path for path in TREES}
    arrows = {name: {*house.imports(TREES[path])} & names.keys() - {name} for name, path in names.items()}
    assert {*TopologicalSorter(arrows).static_order()} == names.keys()  # raises CycleError


def test_import_tying_does_not_import_lightning():
    code = "import sys, tying, tying.soft, tying.hard, tying.hashing, tying.depth, tying.advice; sys.exit(bool({'lightning', 'pytorch_lightning', 'torchvision'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
