"""Every error and warning that a user may meet, on one page: `python tests/test_errors.py` writes it anew, to be read once more."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "errors.md"
CHECKS = ("check_range", "check_count", "check_counts", "check_choice")
HEAD = """# Errors and warnings

Every error that the package raises, and every warning, as it is written in the source; braces hold values of the case. Each has
been read with three questions: does it name what is wrong, and the value; does it say what would be right; was anything
changed before it was raised.
"""


def text(node):
    match node:
        case ast.Constant():
            return str(node.value)
        case ast.JoinedStr():
            return "".join(map(text, node.values))
        case ast.FormattedValue():
            return "{" + ast.unparse(node.value) + "}"
        case ast.BinOp():
            return text(node.left) + text(node.right)
        case _:
            return "{" + ast.unparse(node) + "}"


def of_check(call):
    """Return what `check_range`, `check_count`, `check_counts` and `check_choice` say of each argument."""
    check = ast.unparse(call.func)
    if check == "check_counts":
        return [f"{count.arg} must be an integer of 1 or more, not {text(count.value)}" for count in call.keywords]
    name, value, *interval = (text(argument) for argument in call.args)
    allowed = interval[0] if interval else "[1, inf)"
    if check == "check_choice":
        return [f"{name} must be one of {allowed}, not {value}"]
    low, _, high = allowed[1:-1].partition(", ")
    interval = f"in {allowed}" if high != "inf" else f"{low} or more" if allowed[0] == "[" else f"above {low}"
    if check == "check_count":
        interval = "an integer" + (f" of {interval}" if high == "inf" else f" {interval}") * (low != "-inf")
    return [f"{name} must be {interval}, not {value}"]


def messages(path):
    """Return what a file's errors and warnings say, in the order of its lines."""
    numbered = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            numbered.append((node.lineno, text(node.exc.args[0])))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "pl.utilities.rank_zero_warn"):
            numbered.append((node.lineno, text(node.args[0])))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in CHECKS:
            numbered += [(node.lineno, message) for message in of_check(node)]
    return [message for _, message in sorted(numbered)]


def page():
    found = {path: messages(path) for path in sorted((ROOT / "tying").rglob("*.py"))}
    parts = [
        f"## {path.relative_to(ROOT)}\n\n" + "\n".join(f"- `{told.replace('`', '')}`" for told in dict.fromkeys(told))
        for path, told in found.items()
        if told
    ]
    return "\n\n".join([HEAD.strip(), *parts]) + "\n"


def test_the_page_of_errors_is_up_to_date():
    assert PAGE.read_text() == page(), "python tests/test_errors.py"


def test_errors_are_sentences_without_a_stop():
    for path in (ROOT / "tying").rglob("*.py"):
        for told in messages(path):
            assert not told.endswith((".", "!")), told
            assert len(told.split()) > 3 or "{" in told, told


if __name__ == "__main__":
    PAGE.write_text(page())
