"""The order of the rooms: data flows one way, and `import tying` brings no Lightning."""

import ast
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import house
import pytest
import torch

from tying.data.cifar10 import load_archive
from tying.data.sample import load_sample
from tying.errors import ConfigurationError
from tying.figures import new_figure
from tying.hashing.codebook import cluster

FIRST = {"compiled", "errors", "extras", "mappings", "torch_workarounds"}
LIGHTNING = {"lightning_namespace"}
EARLY = FIRST | {"deprecated", "figures", "files", "selection"}
# what each room may import of ours, itself apart; families do not import each other
ALLOWED = {
    "compiled": set(),
    "errors": set(),
    "extras": {"errors"},
    "mappings": {"errors"},
    "deprecated": set(),
    "figures": {"extras"},
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
    "models": EARLY | LIGHTNING | {"weights", "depth", "data"},
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


OPTIONAL = {"matplotlib", "torchvision", "PIL", "sklearn", "safetensors", "timm", "transformers"}


@pytest.mark.parametrize("path", TREES, ids=str)
def test_optional_packages_are_imported_where_they_are_used(path):
    """Blocks of torchvision and timm have modules of their own, which are imported only if these packages are loaded."""
    tree = TREES[path]
    at_once = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom | ast.Try)], [])
    packages = {name.split(".")[0] for name in house.imports(at_once)}
    assert packages & OPTIONAL <= {path.stem.removesuffix("_blocks")}


def test_import_tying_is_little_more_than_import_torch():
    code = (
        "import sys, torch; before = {*sys.modules}; import tying; "
        "print(*sorted({name.split('.')[0] for name in {*sys.modules} - before})); "
        "import tying.soft, tying.hard, tying.hashing, tying.depth, tying.advice; "
        "print(*{'lightning', 'pytorch_lightning', 'torchvision', 'matplotlib', 'PIL'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["einops tying", ""]


@pytest.mark.parametrize(
    ("package", "extra", "use"),
    [
        ("matplotlib.figure", "plots", lambda: new_figure(4, 3, "")),
        ("torchvision.datasets", "vision", lambda: load_archive(Path())),
        ("PIL", "data", load_sample),
        ("sklearn.cluster", "clustering", lambda: cluster(torch.arange(4.0), clusters=2)),
    ],
)
def test_an_absent_package_names_its_extra(package, extra, use, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ConfigurationError, match=rf"^{package} is not installed: pip install 'tying\[{extra}\]'$"):
        use()
    declared = tomllib.loads((house.PACKAGE.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extra in declared
