"""The names and the shape of the source, by its syntax tree."""

import ast
from collections import Counter

import house
import lightning.pytorch as pl
import pytest
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

FORMER_NAMES = """
    Watching FiniteWatch Look Pulling find_pulls Pull ChangesModel refuse told tell asker at_rest uses Computed keys_of
    Place places_of Shared loose join relate unrelate own_class overshooting drop_repeats refuse_older labelled_examples
    of_all_processes Slots Entries VirtualWeight Structure Drawn common seeded takes_vectors quickly mix below left_out
    share_first apart share with_share kept keeps
"""
FORMER = {*FORMER_NAMES.split()}
VAGUE = {"own", "held", "found", "one", "told"}
WORKAROUNDS = {"torch_workarounds.py": None, "lightning_workarounds.py": None, "weights/derived.py": {"_parameters"}}
# what this package subclasses: a private name of theirs is theirs although a class of ours defines it
BASES = [nn.Module(), pl.LightningModule(), pl.Callback, pl.LightningDataModule, LightningCLI, ParametrizationList]
THEIRS = {name for base in BASES for name in dir(base)}
STANDARD = {"_replace", "_asdict", "_fields", "_make"}  # public names of named tuples
TREES = house.trees()
OURS = {name for tree in TREES.values() for name in house.private_definitions(tree)}


def test_definitions_are_named_in_the_words_of_the_field():
    names = {path.as_posix(): FORMER & {*house.definitions(tree)} for path, tree in TREES.items()}
    assert {path: former for path, former in names.items() if former} == {}


def test_few_variables_have_vague_names():
    counts = Counter(name for tree in TREES.values() for name in house.bindings(tree) if name in VAGUE)
    assert counts.total() <= 40, counts


def test_functions_fit_on_a_screen():
    longest = {f"{path}: {name}": lines for path, tree in TREES.items() for name, lines in house.functions(tree)}
    assert {name: lines for name, lines in longest.items() if lines > 50} == {}


@pytest.mark.parametrize("path", TREES, ids=str)
def test_private_names_of_others_stand_in_two_files(path):
    foreign = {name for name in house.private_names(TREES[path]) if name in THEIRS or name not in OURS} - STANDARD
    allowed = WORKAROUNDS.get(path.as_posix(), set())
    assert allowed is None or foreign <= allowed


def test_one_file_changes_classes():
    writers = {
        path.as_posix()
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "__class__" and isinstance(node.ctx, ast.Store)
    }
    assert writers <= {"weights/derived.py"}
