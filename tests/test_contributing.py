"""What the pages for contributors and users of the repository say is so."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from tying import __version__
from tying.hashing import hash_weights

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_a_hash_is_added_in_a_few_lines():
    [code] = re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    exec(code, scope := {"__name__": __name__})
    model = nn.Sequential(nn.Linear(4, 6, bias=False))
    hash_weights(model, ["0.weight"], table_ratio=0.5, hash=scope["StrideHash"](stride=5))
    [table] = model.parameters()
    assert torch.equal(model[0].weight, table[(5 * torch.arange(24)) % 12].view(6, 4))


def test_targets_and_files_that_contributing_names_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {*re.findall(r"`make ([a-z-]+)`", CONTRIBUTING)} <= {*targets}
    paths = re.findall(r"`((?:tying|tests|docs|configs|benchmarks)/[\w./]+)`", CONTRIBUTING)
    assert [path for path in paths if not (ROOT / path).exists()] == ["configs/hash_stride.yaml"]  # one to add


def test_contributing_names_every_folder_and_common_file():
    package = ROOT / "tying"
    folders = [path.name for path in package.iterdir() if (path / "__init__.py").exists()]
    files = [path.name for folder in (package, package / "cli") for path in folder.glob("[!_]*.py")]
    house = CONTRIBUTING.split("## Architecture")[1].split("\n- ")[0]
    assert [name for name in folders if not re.search(rf"`(tying/)?{name}`", house)] == []
    assert [name for name in files if f"{name}`" not in house] == []


def test_the_page_of_installation_names_the_wheel_and_the_extras():
    page = (ROOT / "docs" / "start.md").read_text()
    assert {*re.findall(r"tying-(.+?)-py3-none-any\.whl", page)} == {__version__}
    listed = {*re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)}
    in_a_clone = {"benchmarks", "browser", "cluster", "dev", "docs", "sentence"}
    assert listed == PROJECT["optional-dependencies"].keys() - in_a_clone


def test_the_citation_says_what_the_project_says():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    assert citation["keywords"] == PROJECT["keywords"]
    assert not {"doi", "url", "repository-code", "contact"} & citation.keys()  # none exists


def test_hooks_are_the_commands_of_make_lint():
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["id"]: hook["entry"].removeprefix(".venv/bin/").split(" --")[0] for hook in repository["hooks"]}
    recipe = (ROOT / "Makefile").read_text().partition("\nlint: ")[2].partition("\n\n")[0]
    lint = [line.split("/", 1)[1].removesuffix(" .").removesuffix(" --check") for line in recipe.splitlines()[1:]]
    assert [*hooks.values()] == lint


def test_this_python_is_among_the_classifiers():
    versions = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    assert versions[0] == PROJECT["requires-python"].removeprefix(">=")
    assert f"3.{sys.version_info.minor}" in versions


@pytest.mark.parametrize("name", ["torch", "torchvision", "lightning", "numpy", "matplotlib", "pillow", "scikit-learn"])
def test_floors_are_those_of_the_oldest_constraints(name):
    declared = [
        *PROJECT["dependencies"],
        *(need for extra in PROJECT["optional-dependencies"].values() for need in extra),
    ]
    [floor] = {need.partition(">=")[2] for need in declared if re.match(rf"{name}\b[^-]*>=", need)}
    [oldest] = re.findall(rf"^{name}==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE)
    assert re.fullmatch(rf"{re.escape(floor)}(\.0)*", oldest)


def test_the_sample_states_its_origin_and_terms():
    text = (ROOT / "tying" / "data" / "SAMPLE.md").read_text()
    assert "**Origin.**" in text
    assert "**Terms.**" in text
