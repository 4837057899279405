"""Verdicts on a paper's trends."""

import math
from itertools import pairwise, permutations, product

import pytest
from matplotlib.axes import Axes
from pandas import DataFrame, concat
from scipy.stats import spearmanr

from benchmarks.claims import (
    Order,
    Peak,
    Trend,
    of_all_lines,
    verdicts,
)
from benchmarks.figures import Plot, draw
from benchmarks.inference import interval, moments, probability_by_chance
from benchmarks.rows import final
from benchmarks.suite import load
from benchmarks.sweep import prepare
from tying.hashing import UniformHash
from tying.hashing.parametrization import table_slots


def rows(values):
    """A row for each (line, x, seed) and y."""
    return DataFrame(
        {
            "run": f"{line},{x}",
            "seed": str(seed),
            "epoch": "1",
            "ratio": line,
            "alpha": str(x),
            "test/accuracy": str(y),
            "tying/entropy": str(x),
        }
        for (line, x, seed), y in values.items()
    )


RISING = Trend("rises", "alpha", "test/accuracy", "ratio", 1, confounded="by capacity")


def test_a_trend_on_every_line():
    results = rows({("a", x, seed): x + 0.01 * seed for x in (0.1, 1.0, 10.0) for seed in range(3)})
    verdict, lines = RISING.judge(results)
    assert verdict == "rises: reproduced, and confounded: by capacity."
    [line] = lines
    assert line == ["ratio a", "3", "+9.9000", "+1.000", "0.0046", "as claimed"]


REGIMES = {
    "none": ({}, "rises: not reproduced."),
    "met": ({"regime": {"run": "a,0.1", "y": "test/accuracy", "below": 0.0}}, "rises: not reproduced."),
    "not met": (
        {"regime": {"run": "a,0.1", "y": "test/accuracy", "above": 0.99}},
        "rises: not tested here: test/accuracy of a,0.1 is -0.1, not above 0.99.",
    ),
    "below": (
        {"regime": {"run": "a,1.0", "y": "tying/entropy", "below": 0.5}, "missing": "2 epochs instead of 500"},
        "rises: not tested here: 2 epochs instead of 500 and tying/entropy of a,1.0 is 1, not below 0.5.",
    ),
    "no such run": (
        {"regime": {"run": "plain", "y": "test/accuracy", "above": 0.5}},
        "rises: not tested here: test/accuracy of plain is nan, not above 0.5.",
    ),
}


@pytest.mark.parametrize("regime", REGIMES)
def test_what_is_not_reproduced_outside_its_regime_is_not_tested(regime):
    options, sentence = REGIMES[regime]
    results = rows({("a", x, seed): -x for x in (0.1, 1.0, 10.0, 20.0) for seed in range(3)})
    assert Trend("rises", "alpha", "test/accuracy", "ratio", 1, **options).judge(results)[0] == sentence
    falls = Trend("falls", "alpha", "test/accuracy", "ratio", -1, **options)
    assert falls.judge(results)[0] == "falls: reproduced."


def test_a_setting_at_the_end_of_an_axis_is_named():
    values = [0.01, 0.03, 0.1]
    runs = [(name, lr, seed) for name in ("a", "b, wide") for lr in values for seed in range(3)]
    results = DataFrame(
        {"run": f"{name},lr={lr}", "seed": str(seed), "lr": str(lr), "y": str(lr + (name == "a") * (1 + 0.1 * seed))}
        for name, lr, seed in runs
    )
    inside = Order("a is above b", "y", "a,lr=0.03", "b, wide,lr=0.03")
    assert inside.judge(results)[0] == "a is above b: reproduced."
    ends = Order("a is above b", "y", "a,lr=0.1", "b, wide,lr=0.01")
    assert ends.judge(results)[0] == "a is above b: reproduced, with lr=0.1 and lr=0.01 at the end of its axis."
    two = results[results["lr"] != "0.03"]
    assert ends.judge(two)[0] == "a is above b: reproduced."


def test_a_trend_on_some_lines_and_against():
    values = {("a", x, seed): x + 0.01 * seed for x in (0.1, 1.0, 2.0) for seed in range(3)}
    values |= {("b", x, seed): -x + 0.01 * seed for x in (0.1, 1.0, 2.0) for seed in range(3)}
    values |= {("c", x, seed): (x - 0.5) * (seed - 1) for x in (0.1, 1.0, 2.0) for seed in range(3)}
    verdict, lines = RISING.judge(rows(values))
    assert verdict.startswith("rises: not reproduced (as claimed on 1 of 3 lines), and confounded")
    assert [line[5] for line in lines] == ["as claimed", "the opposite", "undecided"]


@pytest.mark.parametrize(
    ("says", "verdict"),
    [
        ("yes yes", "reproduced"),
        ("yes yes yes undecided", "reproduced on 3 of 4 lines, undecided on the others"),
        ("undecided undecided", "undecided"),
        ("yes no undecided", "not reproduced (as claimed on 1 of 3 lines)"),
        ("no undecided", "not reproduced"),
        ("no no", "not reproduced"),
    ],
)
def test_a_verdict_of_all_lines(says, verdict):
    assert of_all_lines([["line", "3", word] for word in says.split()], "yes") == verdict


def test_the_spread_at_one_end_does_not_rule():
    values = {("a", x, seed): x for x in (1.0, 2.0, 3.0, 4.0) for seed in range(3)}
    values |= {("a", 0.0, seed): (-900.0, 0.5, 0.0)[seed] for seed in range(3)}
    assert RISING.judge(rows(values))[1][0][5] == "as claimed"


@pytest.mark.parametrize(("count", "seeds"), [(2, 3), (3, 2), (4, 1), (5, 2)])
def test_probability_by_chance_over_all_orders(count, seeds):
    """By drawing every order of every seed."""
    orders = [*permutations(range(count))]
    single = {order: float(spearmanr(range(count), order).statistic) for order in orders}
    means = [sum(map(single.get, drawn)) / seeds for drawn in product(orders, repeat=seeds)]
    for mean in {*means}:
        expected = sum(other >= abs(mean) - 1e-9 for other in means) / len(means)
        assert probability_by_chance(mean, count, seeds) == pytest.approx(expected)


def test_a_correlation_of_few_values_that_does_not_vary_is_undecided():
    """Three values in two seeds, +0.5 in both: without spread, yet by chance in a fifth of all cases."""
    values = {("a", x, seed): y for seed in range(2) for x, y in ((1.0, 1.0), (2.0, 3.0), (3.0, 2.0))}
    assert RISING.judge(rows(values))[1][0][3:] == ["+0.500", "0.25", "undecided"]


def test_runs_without_the_axis_are_left_out():
    results = rows({("a", x, seed): x for x in (0.1, 1.0, 10.0) for seed in range(3)})
    other = results.drop(columns="alpha").assign(run="b")
    assert RISING.judge(concat([results, other])) == RISING.judge(results)


def test_one_seed_decides_nothing():
    verdict, lines = RISING.judge(rows({("a", x, 0): x for x in (0.1, 1.0)}))
    assert verdict == "rises: undecided, for want of seeds."
    assert lines[0][5] == "undecided"
    assert lines[0][4] == "–"
    assert interval([0.3]) == (-float("inf"), float("inf"))


PEAK = Peak("best inside", "alpha", "test/accuracy", "ratio")


@pytest.mark.parametrize("broken", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_nothing_is_said_of_what_is_not_finite(at, broken):
    values = {(line, x, seed): x + 0.01 * x * seed for line in "ab" for x in (0, 1, 2) for seed in range(3)}
    results = rows(values | {("a", at, 0): broken})
    for claim in (RISING, PEAK):
        verdict, lines = claim.judge(results[results["ratio"] == "a"])
        assert verdict in ("rises: undecided.", "best inside: undecided.")
        assert {*lines[0][2:-1]} == {"nan"}
    whole = "rises: reproduced on 1 of 2 lines, undecided on the others, and confounded: by capacity."
    assert RISING.judge(results)[0] == whole
    verdict, [line] = Order("b beats a", "test/accuracy", f"b,{at}", f"a,{at}").judge(results)
    assert (verdict, line[1:]) == ("b beats a: undecided.", ["3", "nan", "nan", "undecided"])
    assert all(map(math.isnan, interval([0.5, float(broken)])))


def test_a_peak_is_inside_or_at_an_end():
    heights = {"a": (0.0, 2.0, 1.0, 0.5), "b": (0.0, 2.0, 1.0, 3.0), "c": (0.0, 2.0, 1.0, 2.0)}
    results = rows(
        {
            (line, x, s): y + 0.01 * (s - 1) * x
            for line, ys in heights.items()
            for x, y in enumerate(ys)
            for s in range(3)
        }
    )
    verdict, lines = PEAK.judge(results)
    assert verdict == "best inside: not reproduced (as claimed on 1 of 3 lines)."
    assert [line[-1] for line in lines] == ["inside", "at an end", "undecided"]
    assert lines[0][:4] == ["ratio a", "3", "1", "+2.0000"]
    assert lines[1][5] == "-1.0000"
    assert PEAK.judge(results[results["ratio"] == "a"])[0] == "best inside: reproduced."
    assert PEAK.judge(results[results["ratio"] == "c"])[0] == "best inside: undecided."


def test_the_luck_of_the_best_of_several_is_no_peak():
    lucky = {(x, seed): float(x == seed + 1) for x in range(5) for seed in range(3)}  # each seed has a best of its own
    verdict, [line] = PEAK.judge(rows({("a", x, seed): y for (x, seed), y in lucky.items()}))
    assert verdict == "best inside: undecided."
    assert line[3] == line[5] == "+0.0000"


def test_one_seed_or_no_inner_value_is_no_peak():
    for values in ({("a", x, 0): x for x in range(3)}, {("a", x, s): x for x in range(2) for s in range(3)}):
        assert PEAK.judge(rows(values))[0] == "best inside: undecided, for want of seeds."


def test_an_order_of_two_settings_or_two_metrics():
    heights = {"a": (1.0, 1.1, 1.2), "b": (0.5, 0.61, 0.7), "c": (1.1, 1.0, 1.2)}
    results = rows({(line, 0, seed): y for line, ys in heights.items() for seed, y in enumerate(ys)})
    better = Order("a beats b", "test/accuracy", "a,0", "b,0")
    verdict, [line] = better.judge(results)
    assert verdict == "a beats b: reproduced."
    assert line[:3] == ["a,0 − b,0", "3", "+0.4967"]
    assert Order("b beats a", "test/accuracy", "b,0", "a,0").judge(results)[0] == "b beats a: not reproduced."
    assert Order("a beats c", "test/accuracy", "a,0", "c,0").judge(results)[0] == "a beats c: undecided."
    other = Order("more", "test/accuracy", "a,0", "a,0", "tying/entropy")
    assert other.judge(results)[1][0][:3] == ["test/accuracy − tying/entropy", "3", "+1.1000"]
    assert better.judge(results[:1])[0] == "a beats b: undecided."


def test_only_the_last_epoch_counts_and_missing_runs_are_left_out():
    results = rows({("a", 0.1, 0): 0.5, ("a", 1.0, 0): 0.7, ("a", 1.0, 1): 0.9})
    results = concat([results[:1].assign(**{"test/accuracy": "0.1"}), results])
    assert final(results)["test/accuracy"].tolist() == ["0.5", "0.7", "0.9"]
    assert "| ratio a | 1 |" in verdicts([RISING], results)


@pytest.mark.parametrize("x", ["alpha", "tying/entropy"])
def test_pictures(x, tmp_path):
    results = rows({(line, x, seed): x for line in "ab" for x in (0.0, 1.0) for seed in range(2)})
    draw(Plot("p", x, "test/accuracy", "ratio", log=True), results, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    draw(Plot("p", x, ["test/accuracy", "tying/entropy"], "ratio"), results, tmp_path / "both.png")
    assert (tmp_path / "both.png").read_bytes() != (tmp_path / "p.png").read_bytes()


def test_a_picture_over_a_metric_has_a_point_for_each_setting(tmp_path, monkeypatch):
    drawn, errorbar = {}, Axes.errorbar

    def record(self, xs, ys, yerr, xerr, **options):
        drawn.update(xs=xs.tolist(), ys=ys.tolist(), yerr=yerr.tolist(), xerr=xerr)
        return errorbar(self, xs, ys, yerr, xerr, **options)

    monkeypatch.setattr(Axes, "errorbar", record)
    results = rows({("a", x, seed): (1 - x) / 2 + seed / 4 for x in (0.0, 1.0) for seed in range(2)})
    results["tying/entropy"] = results["test/accuracy"]
    draw(Plot("p", "tying/entropy", "test/accuracy", "ratio"), results, tmp_path / "p.png")
    assert drawn["xs"] == drawn["ys"] == [0.125, 0.625]
    assert drawn["xerr"].tolist() == drawn["yerr"] == pytest.approx([0.03125**0.5, 0.03125**0.5])
    draw(Plot("p", "alpha", "test/accuracy", "ratio"), results, tmp_path / "p.png")
    assert (drawn["xs"], drawn["ys"], drawn["xerr"]) == ([0.0, 1.0], [0.625, 0.125], None)


@pytest.mark.parametrize("x", ["alpha", "tying/entropy"])
@pytest.mark.parametrize("lines", ["ratio", "run"])
def test_pictures_of_what_is_not_finite(lines, x, tmp_path):
    results = rows({(line, x, seed): x for line in "ab" for x in (0.0, 1.0) for seed in range(2)})
    results.loc[:1, ["test/accuracy", "tying/entropy"]] = [["inf", "nan"], ["-inf", "nan"]]
    for log in (True, False):
        draw(Plot("p", x, "test/accuracy", lines, log=log), results, tmp_path / "p.png")
        assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert moments([0.5]) == (0.5, 0.0)


def test_a_suite_like_another_has_its_runs():
    one, other = load("arbnet-fig2"), load("arbnet-fig3")
    assert [run.definition for run in other.runs(2)] == [run.definition for run in one.runs(2)]
    assert prepare("arbnet-fig3").out == prepare("arbnet-fig2").out
    assert (other.name, other.plots[0].x) == ("arbnet-fig3", "tying/entropy")


def test_a_suite_like_another_may_have_some_of_its_deltas(tmp_path):
    (tmp_path / "mine.yaml").write_text("like: soft\ndeltas: [proximal, untied]\nfigures: {loss: test/loss}")
    mine, whole = load(str(tmp_path / "mine.yaml")), {run.name: run for run in load("soft").runs()}
    names = [run.name for run in mine.runs()]
    assert names == [*(f"proximal,strength={s},seed=0" for s in (0.001, 0.003, 0.01)), "untied,seed=0"]
    assert [run.definition for run in mine.runs()] == [whole[name].definition for name in names]
    (tmp_path / "untied.yaml").write_text("like: soft\ndeltas: [untied]")
    assert load(str(tmp_path / "untied.yaml")).axes == {}
    (tmp_path / "again.yaml").write_text("like: depth")
    assert load(str(tmp_path / "again.yaml")).home == "cifar10"


@pytest.mark.parametrize(
    ("suite", "sizes"), [("arbnet-fig4", [784, 200, 200, 10]), ("arbnet-cifar10", [3072, 500, 500, 500, 10])]
)
def test_prime_sizes_have_no_divisor_in_common_with_a_width(suite, sizes):
    virtual = sum(a * b for a, b in pairwise(sizes))
    for ratio in load(suite).axes["prime size"].values:
        entries = table_slots(virtual, ratio, UniformHash())
        assert entries / virtual == pytest.approx(round(ratio, 3), rel=0.01)
        assert [width for width in sizes if math.gcd(entries, width) > 1] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("like: soft\nbase: []", "base and like exclude each other"),
        ("like: soft\ndeltas: {a: []}", "deltas, with like, must be a list of names"),
        ("like: soft\ndeltas: [untied, sort]", "unknown delta 'sort': there is untied"),
        (
            "deltas: {a: []}\nplots: [{nam: 1}]",
            "plots: .*unexpected keyword argument 'nam'. Nearest existing names: name",
        ),
        ("deltas: {a: []}\nplots: [alpha]", "plots must be a list of mappings, not .'alpha'."),
        ("deltas: {a: []}\ntrends: [{claim: 1}]", "trends: .*missing 4 required"),
    ],
)
def test_mistakes(text, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path / "mine.yaml"))
