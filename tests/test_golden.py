"""Files of earlier versions load: the same outputs, and runs that go on to the same weights."""

import json
from pathlib import Path

import pytest
import torch
from make_golden import MODELS, output_of
from test_kill_points import train

from tying.hashing import load_packed

VERSIONS = sorted(folder.name for folder in (Path(__file__).parent / "golden").iterdir())
GOLDEN = Path(__file__).parent / "golden"
FILES = [
    (version, path.stem.replace("-", ", "))
    for version in VERSIONS
    for path in sorted((GOLDEN / version).glob("*.ckpt"))
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("version", VERSIONS)
def test_state_dicts_load(version, name):
    golden = torch.load(GOLDEN / version / "states.pt", weights_only=True)[name]
    torch.manual_seed(1)
    model = MODELS[name][0]()
    model.load_state_dict(golden["state"])
    assert [*model.state_dict()] == [*golden["state"]]
    torch.testing.assert_close(output_of(model, golden["input"]), golden["output"])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
@pytest.mark.parametrize(("version", "family"), FILES)
def test_runs_go_on(version, family):
    end = torch.load(GOLDEN / version / "ends.pt", weights_only=True)[family]
    weights = train(family, ckpt_path=GOLDEN / version / f"{family.replace(', ', '-')}.ckpt")
    assert [*weights] == [*end]
    for name, value in weights.items():
        if name.endswith("_extra_state"):  # a description, which later versions pad
            assert json.loads(bytes(value)) == json.loads(bytes(end[name]))
            continue
        torch.testing.assert_close(value, end[name], msg=lambda message, name=name: f"{name}: {message}")


@pytest.mark.parametrize("version", VERSIONS)
def test_packed_files_load(version):
    weights = load_packed(GOLDEN / version / "packed.pt")
    assert len(weights["0.weight"].unique()) == 4
