"""Callbacks are pickled after training, with the weights that they hold, as processes that are spawned need."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from families import FAMILIES, SITES, Trained, inputs
from torch.utils.data import DataLoader, TensorDataset


@pytest.mark.filterwarnings("ignore:MixtureTying begins")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_callback_and_its_model_are_pickled_after_training(family):
    model, callback = Trained(), FAMILIES[family].callback(SITES)
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(inputs()), batch_size=10))
    expected = model.eval()(inputs())
    for again, other in (pickle.loads(pickle.dumps((model, callback))), copy.deepcopy((model, callback))):
        assert torch.equal(again(inputs()), expected)
        held = {id(parameter) for parameter in again.parameters()}
        assert {id(parameter) for parameter in other.affected(again).values()} <= held
        assert other.affected(again).keys() == callback.affected(model).keys()
