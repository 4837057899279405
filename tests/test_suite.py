import json
import zipfile

import lightning.pytorch as pl
import pytest
import yaml

from benchmarks import suite as module
from benchmarks.folder import difference
from benchmarks.perform import arguments
from benchmarks.program import parse_program
from benchmarks.suite import load, suites
from tying import ConfigurationError
from tying.cli import parse

WRITTEN = {
    "base": ["base.yaml", "own.yaml"],
    "deltas": {"untied": [], "soft": ["soft.yaml", {"trainer.callbacks.update": "proximal"}]},
    "axes": {
        "strength": {"key": "trainer.callbacks.strength", "values": [0.001, 0.01], "deltas": ["soft"]},
        "lr": {"key": "model.lr", "values": [0.1, 0.2]},
    },
    "seed_keys": ["seed_everything", "data.seed"],
}


def written(tmp_path, **changes):
    (tmp_path / "own.yaml").write_text("{trainer: {max_epochs: 2}}")
    content = {**WRITTEN, **changes}
    path = tmp_path / "mine.yaml"
    path.write_text(
        yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)
    )
    return str(path)


def test_runs_are_all_combinations_seed_by_seed(tmp_path):
    runs = load(written(tmp_path)).runs(seeds=2)
    first = [
        "untied,lr=0.1",
        "untied,lr=0.2",
        *(f"soft,strength={s},lr={lr}" for s in (0.001, 0.01) for lr in (0.1, 0.2)),
    ]
    assert [run.name for run in runs] == [f"{setting},seed={seed}" for seed in (0, 1) for setting in first]
    assert [run.setting for run in runs] == first * 2


def test_layers_lie_on_top_of_each_other(tmp_path):
    run = load(written(tmp_path)).runs(only="soft*0.01,lr=0.2,seed=0", overrides=["--trainer.max_epochs=7"])[0]
    cli = parse([*run.arguments(tmp_path / "layers"), "--trainer.logger=false"])
    soft = cli.trainer.callbacks[[type(c).__name__ for c in cli.trainer.callbacks].index("SoftTying")]
    assert (soft.update, soft.strength, cli.model.hparams["lr"], cli.trainer.max_epochs) == ("proximal", 0.01, 0.2, 7)
    other = load(written(tmp_path)).runs(seeds=4, only="untied,lr=0.1,seed=3")[0]
    cli = parse([*other.arguments(tmp_path / "layers"), "--trainer.logger=false"])
    assert (cli.config.seed_everything, cli.datamodule.seed, cli.trainer.max_epochs) == (3, 3, 2)


def test_definition_is_the_content_of_files(tmp_path):
    path = written(tmp_path)
    before = load(path).runs()[0].definition
    (tmp_path / "own.yaml").write_text("# said otherwise\ntrainer:\n  max_epochs: 2\n")
    assert load(path).runs()[0].definition == before
    (tmp_path / "own.yaml").write_text("{trainer: {max_epochs: 3}}")
    assert load(path).runs()[0].definition != before


def test_arguments_are_those_of_the_definition(tmp_path):
    """Whatever happens to the files in the meantime."""
    (tmp_path / "more.yaml").write_text("{trainer: {min_epochs: 1}}")
    [run] = load(written(tmp_path)).runs(only="untied,lr=0.1,seed=0", overrides=[f"--config={tmp_path / 'more.yaml'}"])
    for name in ("own.yaml", "more.yaml"):
        (tmp_path / name).write_text("{trainer: {max_epochs: 9}}")
    assert {"trainer": {"min_epochs": 1}} in run.definition
    cli = parse([*run.arguments(tmp_path / "layers"), "--trainer.logger=false"])
    assert cli.trainer.max_epochs == 2


def test_definitions_are_as_json_holds_them(tmp_path):
    (tmp_path / "odd.yaml").write_text("{trainer: {a: {0: 1}, b: 2024-01-01, c: .nan}}")
    odd = load(written(tmp_path, base=["odd.yaml"])).runs()[0].definition
    assert json.dumps(odd[0]) == '{"trainer": {"a": {"0": 1}, "b": "2024-01-01", "c": NaN}}'
    assert not difference(odd, json.loads(json.dumps(odd)))


def test_names_are_fit_for_folders(tmp_path):
    axes = {"root": {"key": "data.root", "values": ["../a b/c", "../a b/d"]}}
    names = [run.name for run in load(written(tmp_path, axes=axes)).runs()]
    assert names[0] == "untied,root=.._a_b_c,seed=0"
    with pytest.raises(ValueError, match=r"two runs are named untied,root=a_b,seed=0"):
        load(written(tmp_path, axes={"root": {"key": "data.root", "values": ["a b", "a/b"]}})).runs()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"delta": {}}, r"unknown key 'delta': there is .*Nearest existing names: deltas"),
        ({"deltas": None}, "deltas must map names to lists"),
        ({"deltas": {"soft": ["sofd.yaml"]}, "axes": {}}, r"delta soft: there is no 'sofd.yaml' in .*Nearest existing names: soft.yaml"),
        ({"axes": {"s": {"key": "model.lr", "values": [1], "deltas": ["sofd"]}}}, r"axis s: unknown delta 'sofd': there is untied, soft\. Nearest existing names: soft"),
        ({"axes": {"s": {"key": "model.lr", "valuse": [1], "values": [1]}}}, r"axis s: unknown key 'valuse'.*Nearest existing names: values"),
        ({"axes": {"s": {"key": "model.lr"}}}, "axis s needs a key and a list of values"),
        ({"axes": {"s": {"key": "model.lr", "values": 0.1}}}, "axis s needs a key and a list of values"),
        ({"axes": [1]}, "axes must map names to keys and values"),
        ({"axes": {"s": {"key": "model.lr", "values": [1], "deltas": "soft"}}}, "axis s: deltas must be a list of names, not 'soft'"),
        ({"seed_keys": "seed_everything"}, "seed_keys must be a list of names, not 'seed_everything'"),
        ({"curves": []}, "curves must be a list of names"),
        ({"deltas": {"untied": None}, "axes": {}}, "delta untied must be a list of files and overrides, not None"),
        ({"figures": ["test/accuracy"]}, "figures must map headings to metrics"),
    ],
)  # fmt: skip
def test_mistakes_in_a_suite(changes, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        load(written(tmp_path, **changes))


def test_mistakes_in_what_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match=r"unknown suite 'sofd': there is .*Nearest existing names: soft"):
        load("sofd")
    with pytest.raises(ValueError, match=r"unknown suite '.*none.yaml'"):
        load(str(tmp_path / "none.yaml"))
    (tmp_path / "broken.yaml").write_text("deltas: [")
    with pytest.raises(ValueError, match=r"broken\.yaml is not YAML"):
        load(str(tmp_path / "broken.yaml"))
    mine = load(written(tmp_path))
    with pytest.raises(
        ValueError, match=r"no run of suite mine fits 'sofd\*': it has deltas untied, soft, axes strength"
    ):
        mine.runs(only="sofd*")
    with pytest.raises(ValueError, match="seeds must be 1 or more, not 0"):
        mine.runs(seeds=0)
    with pytest.raises(ValueError, match=r"unknown argument '--fast': overrides are written --key=value"):
        mine.runs(overrides=["--fast"])
    with pytest.raises(ValueError, match=r"'--data.seed=7': the seeds of a suite's runs are 0, 1, …; say how many"):
        mine.runs(overrides=["--data.seed=7"])
    with pytest.raises(ValueError, match=r"'--config=none.yaml': there is no such file"):
        mine.runs(overrides=["--config=none.yaml"])
    with pytest.raises(ValueError, match=r"'--model.lr=\[': the value is not YAML"):
        mine.runs(overrides=["--model.lr=["])


def test_suites_that_come_along_are_valid():
    assert {"cifar10", "soft"} <= set(suites())
    for name in suites():
        one = load(name)
        assert one.description
        assert one.runs()
    assert module.SUITES.is_dir()


def test_the_order_of_overrides_makes_no_other_definition(tmp_path):
    one, other = ["--trainer.max_epochs=7", "--model.lr=0.3"], ["--trainer.callbacks+=A", "--trainer.callbacks+=B"]
    mine = load(written(tmp_path))
    [first, second] = [mine.runs(overrides=given)[0].definition for given in (one, one[::-1])]
    assert not difference(first, second)
    assert difference(mine.runs(overrides=other)[0].definition, mine.runs(overrides=other[::-1])[0].definition)


@pytest.mark.parametrize(
    ("claims", "told"),
    [
        ({"trends": [{"claim": "a", "x": "lr", "y": "m", "lines": "stength", "sign": 1}]}, "'a': unknown axis 'stength'"),
        ({"peaks": [{"claim": "a", "x": "lrs", "y": "m", "lines": "lr"}]}, "'a': unknown axis 'lrs'"),
        ({"plots": [{"name": "p", "x": "test/loss", "y": "m", "lines": "seed"}]}, "'p': unknown axis 'seed'"),
        (
            {"plots": [{"name": "p", "x": "bytes", "y": "m", "families": {"plain": ["untied,lr=0.1", "sfot"]}}]},
            "'p': unknown setting 'sfot'",
        ),
        ({"orders": [{"claim": "a", "y": "m", "higher": "soft", "lower": "untied,lr=0.1"}]}, "'a': unknown setting 'soft'"),
    ],
)  # fmt: skip
def test_claims_are_of_the_suites_own_axes_and_settings(claims, told, tmp_path):
    with pytest.raises(ConfigurationError, match=told):
        load(written(tmp_path, **claims))


@pytest.mark.parametrize(
    ("values", "wrong"), [(["linear", "forgy"], "'linear'"), ([True, False], "True"), ([1, None], "None")]
)
@pytest.mark.parametrize("key", ["plots", "trends", "peaks"])
def test_an_axis_of_words_is_no_x(key, values, wrong, tmp_path):
    """What would not be found out before all runs were done."""
    axes = {"init": {"key": "model.init", "values": values}, "lr": {"key": "model.lr", "values": [0.1, "1e-3"]}}
    named = {"name": "p"} if key == "plots" else {"claim": "p", **({"sign": 1} if key == "trends" else {})}
    with pytest.raises(
        ConfigurationError, match=f"mine: 'p': x must be an axis of numbers, but init has the value {wrong}"
    ):
        load(written(tmp_path, axes=axes, **{key: [{**named, "x": "init", "y": "m", "lines": "lr"}]}))
    assert load(written(tmp_path, axes=axes, **{key: [{**named, "x": "lr", "y": "m", "lines": "init"}]}))


@pytest.mark.parametrize("name", [name for name in suites() if not load(name).home])
def test_every_configuration_can_be_made(name, tmp_path, monkeypatch):
    if name == "sentence":  # a stand-in: no test needs its wheel
        package = tmp_path / "all_minilm_l6_v2"
        package.mkdir()
        (package / "__init__.py").touch()
        zipfile.ZipFile(package / "model.zip", "w").close()
        monkeypatch.syspath_prepend(tmp_path)
    settings = {run.delta: run for run in load(name).runs()}
    if name == "transfer":  # the others need what pretraining.yaml leaves
        settings = {"scratch": settings["scratch"]}
    for number, run in enumerate(settings.values()):
        given = arguments(run, tmp_path / str(number))
        if run.program:
            assert parse_program(run.program, given)[1].seed == run.seed
        else:
            assert isinstance(parse(given).model, pl.LightningModule)
