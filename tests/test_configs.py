"""Every configuration trains on base.yaml, as its first line says."""

import shutil
from pathlib import Path

import pytest
import torch

from tying.cli import main
from tying.models import Classifier, ResNet

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
QUICK = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=1",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
    "--data.batch_size=2",
]
ON_TOP = "# On top of "


def lines(name):
    return (CONFIGS / f"{name}.yaml").read_text().splitlines()


def layers(name):
    """Return the configurations on which one is to be put, as its first line says, and itself."""
    first = lines(name)[0]
    below = [first.removeprefix(ON_TOP).split(".yaml")[0]] if first.startswith(ON_TOP) else []
    return [*dict.fromkeys(["base", *below, name])]


def write_mnist(folder, count=100):
    """Write digits of noise in MNIST's own format."""
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = torch.randint(256, (count, 28, 28), dtype=torch.uint8)
        labels = torch.arange(count, dtype=torch.uint8) % 10
        for kind, tensor in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, tensor.ndim]) + b"".join(size.to_bytes(4, "big") for size in tensor.shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(head + tensor.numpy().tobytes())


@pytest.mark.filterwarnings(
    "ignore:WeightClustering begins", "ignore:MixtureTying begins in epoch", "ignore:training stopped before"
)
@pytest.mark.parametrize("name", NAMES)
def test_every_config_trains_a_batch(name, tmp_path):
    shutil.copytree(CONFIGS, "configs")
    write_mnist(tmp_path / "data" / "mnist" / "MNIST" / "raw")
    if name == "transfer":  # which begins with what pretraining leaves
        (tmp_path / "runs" / "pretrained").mkdir(parents=True)
        weights = Classifier(ResNet(depth=20, num_classes=5), num_classes=5).state_dict()
        torch.save(weights, "runs/pretrained/five_classes.ckpt")
    main(["fit", *(f"--config=configs/{layer}.yaml" for layer in layers(name)), *QUICK])


def test_first_lines_name_configs():
    assert {layer for name in NAMES for layer in layers(name)} <= {*NAMES}
    assert all(lines(name)[0].startswith("# ") for name in NAMES)


@pytest.mark.parametrize(
    ("name", "right", "wrong", "message"),
    [
        ("hash_modulus", "ModulusHash", "ModuloHash", "hash: tying.hashing.ModuloHash: module 'tying.hashing' has no attribute 'ModuloHash'"),
        ("hash_block", "block: 64", "blocks: 64", "hash: tying.hashing.BlockHash: Option 'blocks' is not accepted. Nearest existing names: block."),
        ("hash_neighborhood", "radius: 8", "radius: far", "hash: tying.hashing.NeighborhoodHash: radius: Expected an integer. Got value: far"),
        ("hash_neighborhood", "radius: 8", "radius: -1", "radius must be 0 or more, not -1"),
        ("hashed_layers", "torch.nn.ReLU", "torch.nn.Relu", "network: tying.models.sequential: layers: torch.nn.Relu: module 'torch.nn' has no attribute 'Relu'"),
        ("soft_l1", "penalty: l1", "penalty: l3", "penalty: Expected 'l2' or 'l1'. Got value: l3"),
        ("soft_huber", "delta: 0.1", "delta: -0.1", "tying: error: Huber's delta must be above 0, not -0.1"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(name, right, wrong, message, capsys):
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert right in text
    Path("mistaken.yaml").write_text(text.replace(right, wrong))
    with pytest.raises(SystemExit):
        main(["fit", f"--config={CONFIGS}/base.yaml", "--config=mistaken.yaml"])
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tying: error: ")]
    assert message in line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hash_recurrent", "the network takes inputs of another size than that of the data: "),
        ("hash_toeplitz", "this layer takes 784 features, not 3072"),
        ("layer_drop", "blocks: pattern 'network.encoder.layers.*' matches no module"),
    ],
)
def test_a_configuration_that_lacks_another_is_told_in_one_line(name, message, capsys):
    with pytest.raises(SystemExit):
        main(["fit", f"--config={CONFIGS}/base.yaml", f"--config={CONFIGS}/{name}.yaml", "--trainer.fast_dev_run=true"])
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tying: error: ")]
    assert message in line


@pytest.mark.parametrize(
    ("help_of", "option"),
    [
        ("model.help=Classifier", "--model.nesterov {true,false}"),
        ("data.help=CIFAR10", "--data.label_seed LABEL_SEED"),
        ("data.help=MNIST", "--data.label_seed LABEL_SEED"),
    ],
)
def test_help_shows_new_arguments(help_of, option, capsys):
    with pytest.raises(SystemExit):
        main(["fit", f"--{help_of}"])
    assert option in capsys.readouterr().out


def test_packaged_configurations_are_named_anywhere(capsys):
    """Files of the current folder come first."""
    main(["inspect", "--config", "configs/base.yaml", "--config=configs/soft.yaml", "--json=true"])
    assert "network.layer1.0.branch.conv1.weight" in capsys.readouterr().out
    Path("configs").mkdir()
    Path("configs/soft.yaml").write_text("trainer: {callbacks+: NoSuchCallback}")
    with pytest.raises(SystemExit):
        main(["inspect", "--config", "configs/base.yaml", "--config=configs/soft.yaml"])
    assert "NoSuchCallback" in capsys.readouterr().err
