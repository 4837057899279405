import pytest

from tying import ConfigurationError
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
    ],
)
def test_match(pattern, name, matches):
    assert (Pattern(pattern).match(name) is not None) == matches


def test_captures_in_order():
    pattern = Pattern("{stage}.{-block}.w")
    assert pattern.match("layer1.2.w") == (("stage", "layer1"), ("block", "2"))
    assert pattern.mirrored == {"block"}


@pytest.mark.parametrize("text", ["a..*", "a.b**", "a.{", "a.{1}", "a.}b", "a.[b", ".{i}", "{-}", "{i}.{-i}"])
def test_malformed(text):
    with pytest.raises(ConfigurationError, match="pattern"):
        Pattern(text).match("a.b")


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
