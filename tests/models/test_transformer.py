"""A causal transformer as a language model."""

import math

import lightning.pytorch as pl
import pytest
import torch
from toys import same, train

from tying import ConfigurationError
from tying.callbacks import HardTying, RandomState
from tying.data import Text
from tying.depth import StochasticDepth, apply_merge, extract, loop
from tying.models import SequenceModel, Transformer
from tying.models.transformer import CausalSelfAttention

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
MATRICES = ["network.blocks.*.attention.{name}.weight", "network.blocks.*.mlp.{number}.weight"]


@pytest.fixture
def path(tmp_path):
    (tmp_path / "text.txt").write_text("".join("abcdefg"[i * i % 13 % 7] for i in range(4000)))
    return str(tmp_path / "text.txt")


def text(path):
    return Text(path, window=10, batch_size=8, vocabulary=8)


def language(size=8, layers=3, context=10, **options):
    torch.manual_seed(0)
    options = {"num_classes": 8, "optimizer": "adamw", "lr": 0.02, "weight_decay": 0.0, **options}
    return SequenceModel(Transformer(size, layers, heads=2, context=context), size=size, task="language", **options)


@pytest.mark.parametrize(("size", "layers", "context"), [(256, 6, 256), (132, 6, 256), (4, 1, 3)])
def test_number_of_parameters(size, layers, context):
    with torch.device("meta"):
        network = Transformer(size, layers, heads=2, context=context)
    block = 12 * size**2 + 13 * size  # of matrices, and of biases and norms
    assert sum(p.numel() for p in network.parameters()) == layers * block + context * size + 2 * size


def test_attention_equals_the_loop():
    torch.manual_seed(0)
    layer, x = CausalSelfAttention(6, heads=2).double(), torch.randn(2, 5, 6).double()
    expected = torch.zeros_like(x)
    for sample, step, head in torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(2)):
        query, key, value = (
            layer.qkv(x[sample])[:, 6 * part + 3 * head : 6 * part + 3 * head + 3] for part in range(3)
        )
        scores = torch.stack([query[step] @ key[past] / math.sqrt(3) for past in range(step + 1)])
        weights = scores.exp() / scores.exp().sum()
        expected[sample, step, 3 * head : 3 * head + 3] = sum(w * v for w, v in zip(weights, value, strict=False))
    torch.testing.assert_close(layer(x), layer.out(expected), rtol=0, atol=1e-12)


def test_outputs_depend_on_no_later_step():
    network = Transformer(8, layers=3, heads=2, context=10)
    x = torch.randn(10, 2, 8)
    other = torch.cat([x[:6], torch.randn(4, 2, 8)])
    assert torch.equal(network(x)[0][:6], network(other)[0][:6])
    assert not torch.equal(network(x)[0][6], network(other)[0][6])
    torch.testing.assert_close(network(x[:6])[0], network(x)[0][:6])


def test_weights_are_initialised_as_gpt2s():
    torch.manual_seed(0)
    network = Transformer(64, layers=8, heads=4, context=32)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            expected = 0.005 if name.endswith(("attention.out.weight", "mlp.2.weight")) else 0.02
            assert parameter.detach().std().item() == pytest.approx(expected, rel=0.05), name


def test_a_resume_is_bitwise(path, tmp_path):
    """There is no state to carry from window to window."""

    class Saving(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 13:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    whole, resumed = language(), language()
    trainer = train(whole, [RandomState(), Saving()], data=text(path), max_epochs=2)
    train(resumed, [RandomState()], data=text(path), ckpt_path=tmp_path / "a.ckpt", max_epochs=2)
    assert same(whole, resumed)
    assert "carried_states" not in torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert trainer.callback_metrics["val/bits"] < 1
    [tested] = trainer.test(whole, text(path), verbose=False)
    assert tested["test/bits"] < 1


def test_matrices_tied_across_blocks():
    model, block = language(), 12 * 8**2
    before = sum(p.numel() for p in model.parameters())
    HardTying(MATRICES).apply(model)
    assert before - sum(p.numel() for p in model.parameters()) == 2 * block
    assert model.network.blocks[0].mlp[0].weight is model.network.blocks[2].mlp[0].weight
    assert model.network.blocks[0].mlp[0].bias is not model.network.blocks[2].mlp[0].bias


def test_blocks_take_merges():
    model, x = language(), torch.randint(8, (2, 10))
    shallow = extract(model, "network.blocks.*", keep=[0, 2])
    assert apply_merge(model, "network.blocks.*", StochasticDepth(keep=0.5, scale="train"), keep=[1.0, 0.0, 1.0]) == 3
    assert torch.equal(model.train()(x), shallow.train()(x))


def test_blocks_run_in_loops():
    model, x = language(), torch.randint(8, (2, 10))
    longer = language(layers=5)
    for number, block in enumerate((0, 1, 2, 1, 2)):
        longer.network.blocks[number].load_state_dict(model.network.blocks[block].state_dict())
    longer.network.positions = model.network.positions
    longer.embedding, longer.head = model.embedding, model.head
    assert loop(model, "network.blocks.{1..2}", passes=2) == 1
    assert torch.equal(model(x), longer(x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "size=8 must be a multiple of heads=3: each head takes size / heads"),
        ({"size": 0}, "size must be 1 or more, not 0"),
        ({"layers": 0}, "layers must be 1 or more, not 0"),
        ({"context": 0}, "context must be 1 or more, not 0"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        Transformer(**{"size": 8, "layers": 1, "heads": 2, "context": 4, **changes})


def test_a_window_longer_than_the_context(path):
    with pytest.raises(
        ConfigurationError,
        match="a sequence has 10 steps, and the context of the Transformer has 9: shorten the data's",
    ):
        train(language(context=9), data=text(path), max_epochs=1)
