from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.data import DataLoader, TensorDataset
from toys import train

from tying import ConfigurationError
from tying.callbacks import HardTying
from tying.hard import share_templates
from tying.models import MLP, Autoencoder, Classifier
from tying.models.classifier import learning_rate_factor

CONFIGS = Path(__file__).parents[2] / "configs"
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


def data(count=64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, 4, 4, generator=generator)
    return DataLoader(TensorDataset(x, (x.mean(dim=(1, 2, 3)) > 0).long()), batch_size=16)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_classifier_learns_and_logs(optimizer, schedule):
    model = Classifier(
        MLP([48, 16, 2]), num_classes=2, optimizer=optimizer, lr=0.05 if optimizer == "sgd" else 0.01, schedule=schedule
    )
    trainer = train(model, data=data(), max_epochs=10)
    assert trainer.callback_metrics["train/accuracy"] > 0.9
    [tested] = trainer.test(model, data(), verbose=False)
    assert tested["test/accuracy"] > 0.9
    probabilities = torch.cat(trainer.predict(model, data()))
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(64))


def test_classifier_channels_last_gives_the_same_numbers():
    class Network(torch.nn.Sequential):
        def __init__(self):
            super().__init__(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten())

    plain, last = Classifier(Network()), Classifier(Network(), channels_last=True)
    last.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(last(x), plain(x))
    assert last.network[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_another_number_of_classes():
    with pytest.raises(ConfigurationError, match="num_classes is 10, and the network returns 2 logits a sample"):
        train(Classifier(MLP([48, 2])), data=data(), max_epochs=1)


def test_unknown_choices():
    with pytest.raises(ConfigurationError, match="'sgd' or 'adamw'"):
        Classifier(MLP([2, 2]), optimizer="adam")


def test_learning_rate_by_hand():
    assert [learning_rate_factor(step, 100, 0.1, "constant") for step in (0, 9, 10, 99)] == [0.1, 1.0, 1.0, 1.0]
    steps = [learning_rate_factor(step, 100, 0.0, "step", (0.5, 0.75)) for step in (0, 49, 50, 75)]
    assert steps == pytest.approx([1.0, 1.0, 0.1, 0.01])
    assert learning_rate_factor(55, 100, 0.1, "cosine") == pytest.approx(0.5)


def test_autoencoder_learns_and_loads(tmp_path):
    model = Autoencoder([48, 32, 16], lr=1e-2)
    trainer = train(model, data=data(), max_epochs=20)
    assert trainer.callback_metrics["train/loss"] < 0.8  # the data has variance 1
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Autoencoder.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    x = torch.randn(2, 3, 4, 4)
    assert loaded(x).shape == x.shape
    assert torch.equal(loaded(x), model(x))


def test_a_linear_autoencoder_tied_as_configured_is_principal_component_analysis():
    """The loss at the optimum, to 1e-10: biases take the mean."""
    config = yaml.safe_load((CONFIGS / "autoencoder_pca.yaml").read_text())
    [hard] = config["trainer"]["callbacks+"]
    torch.manual_seed(0)
    scales = torch.tensor([5, 4, 3, 1, 0.8, 0.6, 0.4, 0.2], dtype=torch.float64)
    x = torch.randn(200, 8, dtype=torch.float64) * scales + 1.0
    model = Autoencoder([8, 3]).double()
    HardTying(**hard["init_args"]).apply(model)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        value = (model(x) - x).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    rest = torch.linalg.svdvals(x - x.mean(0))[3:].square().sum() / x.numel()
    torch.testing.assert_close(loss().detach(), rest, rtol=1e-10, atol=0)


def test_sampled_passes_in_tests_and_predictions():
    from tying.depth import Residual, Sampled, SkipForward, Sum

    def model(merge, **options):
        torch.manual_seed(0)
        block = Residual(torch.nn.Linear(48, 48), merge=merge)
        return Classifier(torch.nn.Sequential(torch.nn.Flatten(), block, MLP([48, 2])), num_classes=2, **options)

    several = model(SkipForward(0.5), test_samples=20)
    trainer = train(several, data=data(), max_epochs=5)
    [tested] = trainer.test(several, data(), verbose=False)
    assert tested["test/spread"] > 0
    assert tested["test/sampled/accuracy"] > 0.5
    assert tested.keys() >= {"test/accuracy", "test/loss", "test/sampled/loss"}
    predicted = trainer.predict(several, data())
    assert all(isinstance(batch, Sampled) for batch in predicted)
    mean = torch.cat([batch.mean for batch in predicted])
    torch.testing.assert_close(mean.sum(dim=1), torch.ones(64))
    one = model(SkipForward(0.5))
    one.load_state_dict(several.state_dict())
    [same] = trainer.test(one, data(), verbose=False)
    assert same == {name: tested[name] for name in ("test/loss", "test/accuracy")}
    with pytest.raises(ConfigurationError, match="no merge that draws"):
        trainer.test(model(Sum(), test_samples=2), data(), verbose=False)
    with pytest.raises(ConfigurationError, match="test_samples must be 1 or more, not 0"):
        model(Sum(), test_samples=0)


@pytest.mark.parametrize(
    "options", [{}, {"nesterov": True}, {"nesterov": False}, {"nesterov": False, "momentum": 0.0}, {"momentum": 0.0}]
)
def test_momentum_is_that_of_nesterov_or_not(options):
    """Bitwise torch's own steps."""
    model = Classifier(
        MLP([48, 2]), num_classes=2, lr=0.1, weight_decay=0.0, schedule="constant", warmup=0.0, **options
    )
    plain = MLP([48, 2])
    plain.load_state_dict(model.network.state_dict())
    momentum, nesterov = options.get("momentum", 0.9), options.get("nesterov", True)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=momentum, nesterov=nesterov and momentum > 0)
    train(model, data=data(), max_epochs=1)
    for x, y in data():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(plain(x), y).backward()
        optimizer.step()
    assert all(map(torch.equal, model.network.parameters(), plain.parameters()))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_leaves_out_the_coefficients_of_templates(optimizer):
    """With gradients of zero, a step only decays."""
    model = Classifier(
        MLP([8, 8, 8, 8]), optimizer=optimizer, lr=0.1, weight_decay=0.5, schedule="constant", num_classes=8
    )
    share_templates(model, ["network.**.weight"], templates=2)
    model.trainer = type("Trainer", (), {"estimated_stepping_batches": 10})()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    coefficients = {name for name in before if name.endswith(".original")}
    assert len(coefficients) == 3
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    configured = model.configure_optimizers()["optimizer"]
    configured.step()
    factor = 1 - configured.param_groups[0]["lr"] * 0.5
    if optimizer == "sgd":  # with Nesterov's momentum
        factor = 1 - configured.param_groups[0]["lr"] * 0.5 * 1.9
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name] * (1.0 if name in coefficients else factor))


def test_models_without_templates_have_one_parameter_group():
    model = Classifier(MLP([8, 8]), schedule="constant")
    model.trainer = type("Trainer", (), {"estimated_stepping_batches": 10})()
    [group] = model.configure_optimizers()["optimizer"].param_groups
    assert [*map(id, group["params"])] == [*map(id, model.parameters())]
