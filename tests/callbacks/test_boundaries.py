"""The picture of boundaries in a text, and their shares."""

import lightning.pytorch as pl
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from tying import ConfigurationError
from tying.callbacks import BoundaryPlot
from tying.callbacks.hm_lstm import boundary_figure
from tying.data import Text
from tying.depth import HMLSTM
from tying.models import HMNetwork, SequenceModel

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


@pytest.fixture
def data(tmp_path):
    (tmp_path / "text.txt").write_text("a $b\t$c字\n" * 300, encoding="utf-8")
    return Text(str(tmp_path / "text.txt"), window=10, batch_size=4, vocabulary=9)


def model(network=None):
    torch.manual_seed(0)
    network = HMNetwork(12, 12) if network is None else network
    return SequenceModel(network, size=12, task="language", num_classes=9, optimizer="adamw")


def a_trainer(plot=None):
    plot = BoundaryPlot() if plot is None else plot
    return pl.Trainer(
        logger=False, enable_checkpointing=False, accelerator="cpu", callbacks=[plot], enable_progress_bar=False
    )


def test_boundaries_of_a_text_in_its_batches(data, tmp_path):
    own, plot = model(), BoundaryPlot(characters=25)
    seen = []
    own.network.recurrent.register_forward_hook(lambda module, given, out: seen.append(out.boundaries.clone()))
    [tested] = a_trainer(plot).test(own, data, verbose=False)
    shares = torch.cat([marks.flatten(0, 1) for marks in seen]).mean(dim=0)
    for layer, share in enumerate(shares, start=1):
        assert tested[f"test/boundaries/{layer}"] == pytest.approx(float(share))
    drawn, marks = (torch.cat(parts) for parts in zip(*plot._drawn, strict=True))
    loader = data.test_dataloader()
    assert torch.equal(drawn, torch.cat([x[0] for x, _ in loader])[: len(drawn)])
    assert torch.equal(marks, torch.cat([one[:, 0] for one in seen])[: len(drawn)])
    assert 25 <= len(drawn) < 35
    assert (tmp_path / "boundaries.png").read_bytes().startswith(b"\x89PNG")
    assert len(own.network.recurrent._forward_hooks) == 1  # the one above


def test_boundaries_of_a_layer_that_returns_outputs_of_its_top_layer(data):
    layer, seen = HMLSTM(12, 12, outputs="top"), []
    layer.register_forward_hook(lambda module, given, out: seen.append(module.run(*given).boundaries))
    [tested] = a_trainer().test(model(layer), data, verbose=False)
    shares = torch.cat([marks.flatten(0, 1) for marks in seen]).mean(dim=0)
    assert [tested[f"test/boundaries/{number}"] for number in (1, 2)] == pytest.approx(shares.tolist())


@pytest.mark.parametrize("x", [torch.zeros(5, 12), pack_sequence([torch.zeros(5, 12)])], ids=["single", "packed"])
def test_sequences_that_are_no_padded_batch(x):
    layer = HMLSTM(12, 12)
    with pytest.raises(
        ConfigurationError, match="needs padded batches: the HMLSTM got packed sequences or a single one"
    ):
        BoundaryPlot()._keep(layer, (x,), {}, layer(x))


def test_a_mark_for_each_boundary_below_its_character():
    marks = torch.zeros(90, 2)
    marks[3, 0] = marks[81, 0] = marks[4, 1] = 1
    [axes] = boundary_figure("x" * 90, marks).axes
    first, second = (line.get_xydata() for line in axes.lines)
    letters = {letter.get_position()[0]: letter.get_position()[1] for letter in axes.texts[:80]}
    assert first[:, 0].tolist() == [3, 1]  # of the second line
    assert second[:, 0].tolist() == [4]
    assert letters[3] > first[0, 1] > second[0, 1] > axes.texts[80].get_position()[1] > first[1, 1]


def test_mistakes(data):
    with pytest.raises(ConfigurationError, match="characters must be 1 or more, not 0"):
        BoundaryPlot(characters=0)
    with pytest.raises(ConfigurationError, match=r"draws one .*HMLSTM; the model has 0"):
        a_trainer().test(model(torch.nn.LSTM(12, 12)), data, verbose=False)
    data.setup("test")
    with pytest.raises(ConfigurationError, match=r"the data module has no method text\(ids\)"):
        a_trainer().test(model(), data.test_dataloader(), verbose=False)


def test_an_interrupted_test_leaves_no_hook(data):
    own, trainer = model(), a_trainer()
    own.head = torch.nn.Linear(5, 9)
    with pytest.raises(ConfigurationError, match="size=5, and the network's outputs are 12"):
        trainer.test(own, data, verbose=False)
    assert not own.network.recurrent._forward_hooks
