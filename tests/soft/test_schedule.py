import pytest

from tying import ConfigurationError
from tying.soft import Schedule


def test_constant_by_default():
    assert [Schedule()(count) for count in (0, 10)] == [1.0, 1.0]


def test_linear_and_cosine_by_hand():
    assert [Schedule(0.0, 2.0, 4)(count) for count in range(6)] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    fade = Schedule(1.0, 0.0, 2, "cosine")
    assert [fade(count) for count in (0, 1, 2, 3)] == pytest.approx([1.0, 0.5, 0.0, 0.0])


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(-1.0),
        Schedule(end=float("inf")),
        Schedule(0.0, 1.0),
        Schedule(length=-1),
        Schedule(shape="sine"),
        Schedule(unit="day"),
    ],
)
def test_out_of_range(schedule):
    with pytest.raises(ConfigurationError, match="schedule"):
        schedule.check()
