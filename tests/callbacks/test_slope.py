import lightning.pytorch as pl
import pytest
from toys import Toy, train

from tying import ConfigurationError
from tying.callbacks import SlopeAnnealing
from tying.depth import HMLSTM


class Reads(Toy):
    def __init__(self):
        super().__init__()
        self.reader, self.seen = HMLSTM(6, 6), []

    def loss(self, batch):
        self.seen.append(self.reader.slope)
        return super().loss([self.reader(batch[0].unsqueeze(0)).hidden[0, :, 0]])


def test_slopes_by_epoch(tmp_path, caplog):
    model = Reads()
    trainer = train(model, [SlopeAnnealing(rate=0.5, maximum=1.9)], max_epochs=4)
    assert model.seen[::10] == [1.0, 1.5, 1.9, 1.9]
    lines = [message for message in caplog.messages if "SlopeAnnealing" in message]
    assert lines == ["SlopeAnnealing: 1 layer, slope 1, raised by 0.5 each epoch up to 1.9"]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = Reads()
    train(again, [SlopeAnnealing(rate=0.1)], max_epochs=5, ckpt_path=tmp_path / "a.ckpt")
    assert again.seen == [1.4] * 10


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
def test_a_run_that_goes_on_within_an_epoch(tmp_path):
    class SaveAt(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 14:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    train(Reads(), [SlopeAnnealing(rate=0.5), SaveAt()], max_epochs=2)
    again = Reads()
    train(again, [SlopeAnnealing(rate=0.5)], max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert {*again.seen} == {1.5}


def test_mistakes():
    for wrong in ({"rate": -1.0}, {"maximum": 0.5}):
        with pytest.raises(ConfigurationError, match=r"(rate must be 0|maximum must be 1) or more, not"):
            SlopeAnnealing(**wrong)
    with pytest.raises(ConfigurationError, match=r"the model has no tying\.depth\.HMLSTM"):
        train(Toy(), [SlopeAnnealing()], max_epochs=1)
