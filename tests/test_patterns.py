import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tying import ConfigurationError, resolve
from tying.depth import Residual, StochasticDepth, apply_merge
from tying.selection import select
from tying.selection.patterns import Pattern, mirror_ranks


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("a.b", "a.b", True),
        ("a.b", "axb", False),
        ("a.*", "a.b", True),
        ("a.*", "a.b.c", False),
        ("a.*", "a", False),
        ("a.b*.c", "a.bcd.c", True),
        ("a.?.c", "a.1.c", True),
        ("a.?.c", "a.12.c", False),
        ("a.[12].c", "a.2.c", True),
        ("a.[!12].c", "a.2.c", False),
        ("a.[!12].c", "a.3.c", True),
        ("a.[0-9].c", "a.3.c", True),
        ("a.[^3].c", "a.^.c", True),
        ("a.[]x].c", "a.].c", True),
        ("a.[!]x].c", "a.b.c", True),
        ("a[+-9]b", "a.b", False),
        ("a[+-9]b", "a5b", True),
        ("a.[z-a]", "a.b", False),
        ("a.[a||b]", "a.|", True),
        ("**", "a.b.c", True),
        ("**", "a", True),
        ("**.c", "c", True),
        ("**.c", "a.b.c", True),
        ("**.c", "a.bc", False),
        ("a.**", "a", True),
        ("a.**", "a.b.c", True),
        ("a.**", "ab", False),
        ("a.**.c", "a.c", True),
        ("a.**.c", "a.x.y.c", True),
        ("a.**.**.c", "a.x.y.c", True),
        ("**.**", "a.b", True),
        ("**.b.**", "b", True),
        ("**.b.**", "a.b.c.d", True),
        ("a.{i}.c", "a.x.c", True),
        ("{i}.{i}", "a.a", True),
        ("{i}.{i}", "a.b", False),
        ("layer{i}.w", "layer12.w", True),
        ("a+b.(c)", "a+b.(c)", True),
        ("h.{0..11}.w", "h.0.w", True),
        ("h.{0..11}.w", "h.10.w", True),
        ("h.{0..11}.w", "h.11.w", True),
        ("h.{0..11}.w", "h.12.w", False),
        ("h.{0..11}.w", "h.02.w", False),
        ("h.{0..11}.w", "h.-1.w", False),
        ("h.{3..3}", "h.3", True),
        ("layer{9..11}.*", "layer10.w", True),
        ("layer{9..11}.*", "layer1.w", False),
        ("{i:0..3}.{i}", "3.3", True),
        ("{i:0..3}.{i}", "4.4", False),
        ("{i:0..3}.{i:0..3}", "1.2", False),
        ("**.{-i:0..3}.w", "a.b.3.w", True),
    ],
)
def test_match(pattern, name, matches):
    assert (Pattern(pattern).match(name) is not None) == matches


def test_captures_in_order():
    pattern = Pattern("{stage}.{-block}.w")
    assert pattern.match("layer1.2.w") == (("stage", "layer1"), ("block", "2"))
    assert pattern.mirrored == {"block"}


@pytest.mark.parametrize(
    "text", ["a..*", "a.b**", "a.{", "a.{1}", "a.}b", "a.[b", ".{i}", "{-}", "{i}.{-i}", "{i:0..3}.{-i:0..3}", "[a.b]"]
)
def test_malformed(text):
    with pytest.raises(ConfigurationError, match="pattern"):
        Pattern(text).match("a.b")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("h.{11..0}", "'{11..0}' descends, and ranges ascend: write {0..11}; a mirrored order is written {-i}"),
        ("h.{i:2..1}", "'{i:2..1}' descends"),
        ("h.{00..11}", "'{00..11}' has leading zeros, which ranges do not match: write {0..11}"),
        ("h.{i:0..011}", "'{i:0..011}' has leading zeros"),
        ("h.{0..}", "'{0..}' is no range of two integers; captures are written {i} or {-i}, ranges {0..11}"),
        ("h.{..11}", "'{..11}' is no range of two integers"),
        ("h.{i:0..}", "'{i:0..}' is no range of two integers"),
        ("h.{0...3}", "'{0...3}' is no range of two integers"),
        ("h.{-1..3}", "'{-1..3}' is no range of two integers"),
        ("h.{:0..3}", "'{:0..3}' is no range of two integers"),
        ("h.{0-11}", "'{0-11}' is no capture"),
        ("h.{i:}", "'{i:}' is no capture"),
        ("h.{a,b}", "'{a,b}' is no capture"),
        ("h.{{0..3}}", "braces within braces"),
        ("h.{i:{0..3}}", "braces within braces"),
        ("h.{0..", "a lone '{'"),
        ("h.0..3}", "a lone '}'"),
        ("{i}.{i:0..3}", "give the range of {i} at its first occurrence"),
        ("{i:0..3}.{i:0..4}", "give the range of {i} at its first occurrence"),
        ("h.[0-11]", "the set '[0-11]' matches one character, not the numbers 0 to 11: write {0..11}, or for"),
        ("h.[8-11]", "write {8..11}"),
        ("h.[!10-12]", "write {10..12}"),
        ("h.[0-46-9]", "write {0..46}, or for characters list them, as in [0123]"),
    ],
)
def test_refused_ranges(text, reason):
    model = nn.ModuleDict({"h": nn.Sequential(*(Residual(nn.Linear(2, 2)) for _ in range(12)))})
    asked = [
        lambda: Pattern(text).match("h.1"),
        lambda: resolve(model, [text]),
        lambda: resolve(model, [{"source": "h.*.branch.weight", "exclude": [text]}]),
        lambda: select(model, [text]),
        lambda: select(model, ["**", f"!{text}"]),
        lambda: apply_merge(model, text, StochasticDepth(0.5)),
    ]
    for ask in asked:
        with pytest.raises(ConfigurationError, match=re.escape(reason)):
            ask()


RANGES = st.tuples(st.integers(0, 120), st.integers(0, 30)).map(lambda ends: (ends[0], ends[0] + ends[1]))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(RANGES, min_size=1, max_size=2), st.sampled_from(["{}", "x{}", "{}?", "*{}", "{}.*"]), st.data())
def test_ranges_match_as_all_their_numbers(ranges, form, data):
    written = ".".join(form.format(f"{{{low}..{high}}}") for low, high in ranges)
    expanded = [
        Pattern(".".join(form.format(number) for number in numbers))
        for numbers in itertools.product(*(range(low, high + 1) for low, high in ranges))
    ]
    near = [st.sampled_from([low - 1, low, high, high + 1, 10 * low, (low + high) // 2]) for low, high in ranges]
    numbers = [data.draw(number) for number in near]
    parts = [form.replace("?", "7").replace("*", "1").format(number) for number in numbers]
    for name in (".".join(parts), ".".join(map(str, numbers)), f"0{'.'.join(parts)}"):
        assert (Pattern(written).match(name) is not None) == any(one.match(name) is not None for one in expanded)


@given(RANGES)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_captured_range_captures_its_numbers(ends):
    low, high = ends
    pattern, mirrored = Pattern(f"h.{{i:{low}..{high}}}.w"), Pattern(f"h.{{-i:{low}..{high}}}.w")
    captured = [pattern.match(f"h.{number}.w") for number in range(high + 100)]
    assert captured == [(("i", str(n)),) if low <= n <= high else None for n in range(high + 100)]
    assert mirrored.mirrored == {"i"}
    assert [mirrored.match(f"h.{number}.w") for number in range(high + 100)] == captured


def test_ranges_in_ties_parameters_and_blocks():
    model = nn.ModuleDict({"h": nn.Sequential(*(Residual(nn.Linear(2, 2)) for _ in range(12)))})
    [group] = resolve(model, ["h.{8..11}.branch.weight"])
    assert group.names == tuple(f"h.{i}.branch.weight" for i in (8, 9, 10, 11))
    groups = resolve(model, ["h.{i:0..3}.branch.weight ~ h.{-i:8..11}.branch.weight"])
    assert [group.names for group in groups] == [
        (f"h.{i}.branch.weight", f"h.{11 - i}.branch.weight") for i in range(4)
    ]
    [whole] = resolve(model, [{"source": "h.{0..11}.branch.weight", "exclude": ["h.{2..11}"]}])
    assert whole.names == ("h.0.branch.weight", "h.1.branch.weight")
    assert [*select(model, ["h.{0..11}.branch.weight", "!h.{1..10}"])] == ["h.0.branch.weight", "h.11.branch.weight"]
    assert apply_merge(model, "h.{0..9}", StochasticDepth(0.5)) == 10


def test_ranks_are_numeric_where_all_values_are():
    ranks = mirror_ranks([(("i", value),) for value in ("10", "9", "2")], "i")
    assert ranks == {(("i", "10"),): (2, 3), (("i", "9"),): (1, 3), (("i", "2"),): (0, 3)}


def test_ranks_follow_the_model_otherwise():
    ranks = mirror_ranks([(("i", value),) for value in ("b", "a", "2")], "i")
    assert [ranks[(("i", value),)] for value in ("b", "a", "2")] == [(0, 3), (1, 3), (2, 3)]


def test_ranks_within_other_captures():
    matches = [(("s", s), ("i", i)) for s, i in [("0", "0"), ("0", "1"), ("1", "1"), ("1", "2"), ("1", "3")]]
    assert mirror_ranks(matches, "i", within=["s"])[("s", "1"), ("i", "1")] == (0, 3)
    assert mirror_ranks(matches, "i")[("s", "1"), ("i", "1")] == (1, 4)
