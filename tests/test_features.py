"""Every feature and the ways to use it, on one page: `python -m tests.test_features` writes it anew, to be read once more."""

import ast
import importlib
import inspect
from functools import cache
from itertools import chain
from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml
from torch import nn

import tying.mixins
from benchmarks.report import RESULTS
from benchmarks.suite import load, suites
from tying.hard import WeightResidual
from tying.hashing import Hash
from tying.soft import Penalty

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "features.md"
ROOMS = [importlib.import_module(f"tying.{room}") for room in ("soft", "hard", "hashing", "depth", "callbacks")]
PUBLIC = {name: getattr(room, name) for room in ROOMS for name in room.__all__}
WAYS = ("function", "module", "callback", "mixin", "YAML", "evidence")
HASHED = "hash_weights HashedLinear HashedConv2d HashedEmbedding WeightHashing"
# for each feature of a page of docs/ the words of configurations and benchmarks that tell its use, and its public names
FEATURES = {
    "soft": {
        "squared (L2) pull": ("penalty=l2 TyingPenalty", "l2 L2 TyingPenalty SoftTying"),
        "L1 pull": ("penalty=l1 L1", "l1 L1 TyingPenalty SoftTying"),
        "Huber pull": ("Huber", "huber Huber TyingPenalty SoftTying"),
        "pull to an anchor (L2-SP)": ("AnchorTying", "anchored TyingPenalty AnchorTying"),
        "pull by importance (EWC)": ("Fisher", "anchored fisher_diagonal TyingPenalty AnchorTying"),
        "pull by importance (SI)": ("Synaptic", "anchored path_importance path_integral TyingPenalty AnchorTying"),
        "generative/discriminative coupling": ("Coupling", "coupling_strength TyingPenalty Coupling"),
        "Gaussian mixture": ("MixtureTying", "mixture_nll responsibilities GaussianMixturePrior MixtureTying"),
    },
    "hard": {
        "hard ties": ("HardTying tie", "tie untie tied restore audit HardTying"),
        "relaxed ties": (
            "RelaxedTying relax",
            "relax harden relaxed set_residual_factor LowRankResidual DiagonalResidual ScaleResidual RelaxedWeight "
            "SharedWeight RelaxedTying",
        ),
        "low rank": ("LowRankWeights", "lower_rank LowRank LowRankPlusDiagonal LowRankWeights"),
        "templates": (
            "TemplateWeights",
            "share_templates fold layer_similarity plot_similarity TemplateBank TemplateMixture TemplateWeights",
        ),
        "static hypernetwork": ("GeneratedWeights", "generate_weights HyperWeight GeneratedWeights"),
        "untied biases": ("UntiedBiases", "untie_biases UntiedBiases"),
    },
    "hashing": {
        "identity hash": ("IdentityHash", f"IdentityHash {HASHED}"),
        "modulus hash": ("ModulusHash", f"ModulusHash {HASHED}"),
        "uniform hash": ("UniformHash", f"UniformHash {HASHED}"),
        "Dirichlet hash": ("DirichletHash", f"DirichletHash {HASHED}"),
        "neighborhood hash": ("NeighborhoodHash", f"NeighborhoodHash {HASHED}"),
        "xxHash (HashedNets)": ("XXHash", f"XXHash {HASHED}"),
        "block hash": ("BlockHash", f"BlockHash {HASHED}"),
        "Toeplitz hash": ("ToeplitzHash", f"ToeplitzHash {HASHED}"),
        "recurrent hash": ("RecurrentHash", "RecurrentHash hash_weights WeightHashing"),
        "hashed layers": ("HashedLinear HashedConv2d", "HashedLinear HashedConv2d HashedEmbedding"),
        "codebooks (k-means)": (
            "WeightClustering",
            "cluster cluster_weight compression_rate CodebookHash WeightClustering",
        ),
    },
    "depth": {
        "stochastic depth": ("StochasticDepth", "stochastic_depth apply_merge StochasticDepth ResidualMerging"),
        "early and late stochastic depth": (
            "schedule=early schedule=late",
            "drop_scale StochasticDepth ResidualMerging",
        ),
        "LayerDrop, and shallower models": (
            "whole=True extract",
            "extract apply_merge StochasticDepth ResidualMerging",
        ),
        "swapout": ("Swapout", "swapout apply_merge Swapout ResidualMerging"),
        "SkipForward": ("SkipForward", "skip_forward apply_merge SkipForward ResidualMerging"),
        "FractalNet": ("FractalNet FractalBlock", "fractal_join FractalBlock"),
        "weight-shared depth": ("shared=True Recurrent RecurrentDepth recur", "recur unrecur Recurrent RecurrentDepth"),
        "loops of existing blocks": ("Looping unloop", "loop unloop loops_in scheduled_passes Looping"),
        "more steps in tests": ("Unrolling", "Unrolling"),
        "zoneout": (
            "ZoneoutLSTM ZoneoutStates",
            "zoned_lstm zone_out remove_zoneout ZoneoutLSTM ZoneoutLSTMCell ZoneoutStates",
        ),
        "passthrough networks": ("PassthroughGRU", "PassthroughGRU PassthroughHighway StateMatrix"),
        "HM-LSTM": ("HMNetwork SlopeAnnealing", "hm_update HMLSTM SlopeAnnealing BoundaryPlot"),
        "dynamic hypernetwork": ("HyperLSTM", "HyperLSTM HyperLSTMCell"),
    },
    "compatibility": {
        "summary of ties": ("TyingSummary", "audit TyingSummary"),
        "log of gaps": ("TyingMonitor", "gap TyingMonitor"),
        "exact resume": ("RandomState", "RandomState"),
    },
}
# public names that serve several features
COMMON = {
    "the base of features of one's own": "Penalty WeightResidual Hash SeededHash Merge TyingCallback HashedParametrization Importance",
    "arguments": "Schedule Fisher Synaptic BeforeEpoch keep_schedule Residual Sum FeedForward",
    "what functions return": "TieReport RelaxedGroup HashReport HashedWeight Sampled HMOutput HMState HyperState Loop",
    "measures and plots": "entropy loads table_loads report plot_loads sampled sampling",
    "modules that are sharded together": "shard_groups",
    "plain weights again, packed or not": "bake load_plain save_packed load_packed remove_merge",
}
PLAIN = {"bf16", "mnist", "pretraining", "transformer", "vit", "whitened"}  # configurations that say what others need
BUILT = "a network is built of these layers; no callback can put them into another"
HOLES = {
    ("hard ties", "module"): "tied weights are one parameter, and a relation is a parametrization that `tie` makes",
    ("untied biases", "module"): "`untie_biases` changes convolutions that a model has",
    ("hashed layers", "function"): "`hash_weights` does it for layers that a model has, by the hashes above",
    ("hashed layers", "callback"): "`WeightHashing` does it for layers that a model has, by the hashes above",
    ("FractalNet", "callback"): BUILT,
    ("passthrough networks", "function"): "its equations are those of `StateMatrix`",
    ("passthrough networks", "callback"): BUILT,
    ("dynamic hypernetwork", "function"): "its equations are those of `HyperLSTMCell`",
    ("dynamic hypernetwork", "callback"): BUILT,
    ("loops of existing blocks", "module"): "the blocks of a model stay where they are",
    ("more steps in tests", "function"): "it sets the `steps` of `Recurrent`, and the `passes` of `Loop`",
    ("more steps in tests", "module"): "it tests a model as it is",
    ("summary of ties", "module"): "it reads a model as it is",
    ("summary of ties", "evidence"): "it changes no training",
    ("log of gaps", "module"): "it reads a model as it is",
    ("log of gaps", "evidence"): "it changes no training",
    ("exact resume", "function"): "it saves the state of random generators, which only a Trainer's checkpoint needs",
    ("exact resume", "module"): "it saves the state of random generators, which only a Trainer's checkpoint needs",
}
# tests that hold a feature exactly where no kept result shows it
EXACT = {
    "L1 pull": "tests/soft/test_penalties.py",
    "Huber pull": "tests/soft/test_penalties.py",
    "untied biases": "tests/hard/test_biases.py",
    "identity hash": "tests/hashing/test_hashes.py",
    "Toeplitz hash": "tests/hashing/test_hashes.py",
    "recurrent hash": "tests/hashing/test_hashes.py",
    "early and late stochastic depth": "tests/callbacks/test_residual_merging.py",
    "LayerDrop, and shallower models": "tests/depth/test_extract.py",
    "SkipForward": "tests/depth/test_merges.py",
}
HEAD = """# Features

Each feature, and the ways to use it: a function for any model, a module or class, a callback, a mixin, a configuration on
top of `configs/base.yaml`, and the kept results that show it. `TyingMixin` takes any callbacks, several of a class too.
[Compatibility](compatibility.md) says how each callback works with the features of Lightning. The last table gives the reason
for each dash.
"""
TITLES = {"compatibility": "Around training"}


def settings(content, key=""):
    """Yield keys and values of a configuration, classes and functions by name; what it leaves out has its default."""
    if isinstance(content, dict):
        if str(path := content.get("class_path", "")).startswith("tying."):
            room, _, name = path.rpartition(".")
            for option in inspect.signature(getattr(importlib.import_module(room), name)).parameters.values():
                if option.name not in content.get("init_args", {}):
                    default = option.default
                    yield (
                        option.name,
                        str(default) if isinstance(default, str | int | float) else type(default).__name__,
                    )
        for inner, value in content.items():
            yield from settings(value, key if inner == "class_path" else inner.rpartition(".")[2])
    elif isinstance(content, list | tuple):
        for value in content:
            yield from settings(value, key)
    else:
        yield key, str(content).rpartition(".")[2]


def words(*layers):
    """Return names, and options as ``key=value``, of configurations on top of each other."""
    values = {}
    for content in layers:
        layer = {}
        for key, value in settings(content):
            layer.setdefault(key, set()).add(value)
        values |= layer | {"callbacks+": values.get("callbacks+", set()) | layer.get("callbacks+", set())}
    return {word for key, names in values.items() for name in names for word in (name, f"{key}={name}")}


@cache
def configs():
    return {path.stem: words(yaml.safe_load(path.read_text())) for path in sorted((ROOT / "configs").glob("*.yaml"))}


@cache
def results():
    """Return for each kept result the words of its suite, those of every run apart, or the names in its source."""
    mentions = {}
    for name in suites():
        suite = load(name)
        axes = [{axis.key: axis.values} for axis in suite.axes.values()]
        base = [layer.content for layer in suite.base]
        runs = [words(*base, *(layer.content for layer in layers), *axes) for layers in suite.deltas.values()]
        kept = [path.stem for pattern in (name, f"{name}@*") for path in RESULTS.glob(f"{pattern}.md")]
        mentions |= dict.fromkeys(kept, {*chain(*runs)} - configs()["base"])
    sources = {f"speed_{path.stem}": path for path in (ROOT / "benchmarks" / "speed").glob("*.py")}
    for name, source in (sources | {"zoo": ROOT / "tests" / "test_zoo.py"}).items():
        if (RESULTS / f"{name}.md").exists():
            mentions[name] = {node.id for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Name)}
    return dict(sorted(mentions.items()))


def way(name):
    value = PUBLIC[name]
    if inspect.isfunction(value):
        return "function"
    return "callback" if issubclass(value, pl.Callback) else "module"


def cells(title, symbols, names):
    """Return the entries of a feature's row, for each way."""
    entries = {key: [f"`{name}`" for name in names.split() if way(name) == key] for key in WAYS[:3]}
    mixins = [f"{name}Mixin" for name in names.split() if way(name) == "callback"]
    entries["mixin"] = [f"`{name}`" for name in mixins if hasattr(tying.mixins, name)]
    entries["YAML"] = [f"`{name}.yaml`" for name, said in configs().items() if {*symbols.split()} & said]
    entries["evidence"] = [
        f"[{name}](../benchmarks/results/{name}.md)" for name, said in results().items() if {*symbols.split()} & said
    ]
    return entries


ROWS = {title: cells(title, *row) for rows in FEATURES.values() for title, row in rows.items()}


def reason(title, key):
    """Return why a feature lacks a way, or nothing."""
    if key == "evidence" and title in EXACT:
        return f"`{EXACT[title]}` holds it exactly; no suite trains it"
    return HOLES.get((title, "callback" if key == "mixin" and not ROWS[title]["callback"] else key))


def page():
    parts = [HEAD.strip()]
    header = "\n".join(["| feature | " + " | ".join(WAYS) + " |", "|---" * (len(WAYS) + 1) + "|"])
    for family, rows in FEATURES.items():
        lines = [
            f"| {title} | " + " | ".join(", ".join(ROWS[title][key]) or "–" for key in WAYS) + " |" for title in rows
        ]
        parts.append(f"## [{TITLES.get(family, family.capitalize())}]({family}.md)\n\n" + "\n".join([header, *lines]))
    reasons = {}
    for title, entries in ROWS.items():
        for key in WAYS:
            if not entries[key]:
                reasons.setdefault((title, reason(title, key)), []).append(key)
    holes = [f"| {title} | {', '.join(keys)} | {why} |" for (title, why), keys in reasons.items()]
    parts.append(
        "## What is missing, and why\n\n" + "\n".join(["| feature | missing | why |", "|---|---|---|", *holes])
    )
    return "\n\n".join(parts) + "\n"


@pytest.mark.parametrize("title", ROWS)
def test_every_feature_is_there_in_every_way(title):
    for key in WAYS:
        assert bool(ROWS[title][key]) != bool(reason(title, key)), (key, ROWS[title][key], reason(title, key))


def test_every_public_name_is_of_a_feature():
    names = [name for rows in FEATURES.values() for _, names in rows.values() for name in names.split()]
    common = [name for names in COMMON.values() for name in names.split()]
    assert {*names} | {*common} == {*PUBLIC}
    assert not {*names} & {*common}
    assert all(
        issubclass(PUBLIC[name], nn.Module | Hash | Penalty | WeightResidual) for name in names if way(name) == "module"
    )


def test_every_configuration_is_of_a_feature():
    named = {name for entries in ROWS.values() for name in entries["YAML"]}
    assert {f"`{name}.yaml`" for name in configs()} - named == {f"`{name}.yaml`" for name in PLAIN}


@pytest.mark.parametrize("title", EXACT)
def test_exact_tests_name_their_feature(title):
    symbols = next(row[1] for rows in FEATURES.values() for name, row in rows.items() if name == title)
    assert any(name in (ROOT / EXACT[title]).read_text() for name in symbols.split())


def test_the_page_of_features_is_up_to_date():
    assert PAGE.read_text() == page(), "python -m tests.test_features"


if __name__ == "__main__":
    PAGE.write_text(page())
