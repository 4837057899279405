from typing import ClassVar

import pytest
from lightning.pytorch.callbacks import EarlyStopping
from toys import STRENGTH, TIES, Toy, batches, same, train

from tying import ConfigurationError
from tying.callbacks import SoftTying
from tying.mixins import SoftTyingMixin


class Inherits(SoftTyingMixin, Toy):
    soft_tying: ClassVar = {"ties": TIES, "strength": STRENGTH}


def test_the_mixin_equals_the_callback_bitwise():
    inherited, configured = Inherits(), Toy()
    train(inherited)
    train(configured, [SoftTying(TIES, strength=STRENGTH)])
    assert same(inherited, configured)
    assert not same(configured, Toy())


def test_the_mixin_keeps_counting_over_several_fits():
    model = Inherits()
    [callback] = model.configure_callbacks()
    trainer = train(model, max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, batches())
    assert model.configure_callbacks() == [callback]
    assert callback.state_dict() == {"steps": {0: 20}}


def test_callbacks_of_other_bases_are_kept():
    class Stops(Toy):
        def configure_callbacks(self):
            return EarlyStopping("loss")

    class Both(SoftTyingMixin, Stops):
        soft_tying: ClassVar = {"ties": TIES}

    assert [type(callback) for callback in Both().configure_callbacks()] == [EarlyStopping, SoftTying]


def test_without_arguments():
    class Forgets(SoftTyingMixin, Toy):
        pass

    with pytest.raises(ConfigurationError, match="Forgets inherits SoftTyingMixin and must set soft_tying"):
        Forgets().configure_callbacks()


def test_with_wrong_arguments():
    class Errs(SoftTyingMixin, Toy):
        soft_tying: ClassVar = {"ties": TIES, "strengh": 1.0}

    with pytest.raises(ConfigurationError, match=r"Errs\.soft_tying: .*strengh"):
        Errs().configure_callbacks()
