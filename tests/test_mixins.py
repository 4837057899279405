from typing import ClassVar

import pytest
from lightning.pytorch.callbacks import EarlyStopping
from toys import STRENGTH, TIES, Toy, same, train

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
