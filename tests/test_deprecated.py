"""Former public names work and warn: all of the table, and the means by which they do."""

from importlib import import_module

import pytest

from tying import deprecated

ENTRIES = [(owner, *names) for owner, aliases in deprecated.ALIASES.items() for names in aliases.items()]


@pytest.mark.parametrize(("owner", "former", "current"), ENTRIES)
def test_former_names_work_and_warn(owner, former, current):
    module, _, name = owner.rpartition(".")
    if not name[0].isupper():
        with pytest.warns(DeprecationWarning, match=f"{former} is now called {current}"):
            assert getattr(import_module(owner), former) is getattr(import_module(owner), current)
        return
    cls = getattr(import_module(module), name)
    builtin = tuple if issubclass(cls, tuple) else object
    reader = builtin.__new__(type(name, (cls,), {current: "current"}))
    with pytest.warns(DeprecationWarning, match=f"{former} is now called {current}"):
        assert getattr(reader, former) == "current"
    with pytest.warns(DeprecationWarning, match=f"{former} is now called {current}"):
        override = type(name, (cls,), {former: "former"})
    assert vars(override)[current] == "former"


def test_former_names_of_modules_and_classes(monkeypatch):
    monkeypatch.setitem(deprecated.ALIASES, "tying.deprecated", {"FORMER": "ALIASES"})
    find = deprecated.module_aliases("tying.deprecated")
    with pytest.warns(DeprecationWarning, match="FORMER is now called ALIASES"):
        assert find("FORMER") is deprecated.ALIASES
    with pytest.raises(AttributeError, match=r"module 'tying\.deprecated' has no attribute 'OTHER'"):
        find("OTHER")

    monkeypatch.setitem(deprecated.ALIASES, "Shelf", {"volumes": "books", "lend": "give"})

    @deprecated.class_aliases("Shelf")
    class Shelf:
        def __init__(self):
            self.books = 3

        def give(self):
            return self.books

    shelf = Shelf()
    with pytest.warns(DeprecationWarning, match=r"Shelf\.volumes is now called books"):
        shelf.volumes += 1
    with pytest.warns(DeprecationWarning, match=r"Shelf\.lend is now called give"):
        assert shelf.lend() == 4

    with pytest.warns(DeprecationWarning, match=r"Shelf\.lend is now called give"):

        class Own(Shelf):
            def lend(self):
                return 0

    assert Own().give() == 0
