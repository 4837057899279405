import pytest

from tying import ConfigurationError
from tying.soft import Schedule


def test_constant_by_default():
    assert [Schedule()(count) for count in (0, 10)] == [1.0, 1.0]


def test_linear_and_cosine_by_hand():
    assert [Schedule(0.0, 2.0, 4)(count) for count in range(6)] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    fade = Schedule(1.0, 0.0, 2, "cosine")
    assert [fade(count) for count in (0, 1, 2, 3)] == pytest.approx([1.0, 0.5, 0.0, 0.0])


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize(("start", "end", "length"), [(0.1, 0.3, 7), (1e16, 1.0, 3), (0.3, 0.1, 1)])
def test_the_ends_are_exact(shape, start, end, length):
    schedule = Schedule(start, end, length, shape)
    assert [schedule(0), schedule(length), schedule(10**6)] == [start, end, end]
    assert all(min(start, end) <= schedule(count) <= max(start, end) for count in range(length))


@pytest.mark.parametrize(
    "arguments",
    [
        {"start": -1.0},
        {"end": float("inf")},
        {"end": float("nan")},
        {"start": 0.0},
        {"length": -1},
        {"length": "10"},
        {"shape": "sine"},
        {"unit": "day"},
    ],
)
def test_out_of_range(arguments):
    with pytest.raises(ConfigurationError, match="schedule"):
        Schedule(**arguments)
