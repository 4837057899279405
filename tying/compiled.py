"""Loops over weights on the CPU that numba compiles, if the extra ``fast`` is installed.

They are in modules named ``loops``, beside the code in torch that they replace.
"""

import ctypes
import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from queue import Empty, SimpleQueue
from threading import get_ident
from typing import Any

import torch

TWO_THREADS = 1 << 17  # number of weights from which a second thread pays
PROCESS = os.getpid()  # a forked process has none of its parent's threads
CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

Task = Callable[[int, int, int], None]


def compiled_loops(package: str) -> Any:
    """Return the module ``loops`` of a package, such as ``"tying.hashing"``, or None if numba is missing or broken."""
    return import_module(f"{package}.loops") if is_working() else None


@cache
def is_working() -> bool:
    """Return whether numba is installed and can compile.

    Warns:
        UserWarning: it is installed, but cannot compile.
    """
    if find_spec("numba") is None:
        return False
    try:
        import_module("tying.soft.loops")
        import_module("tying.hashing.loops").check()
    except Exception as error:  # of any kind: an old numba fails on a new numpy or Python in many ways
        warnings.warn(
            f"numba cannot compile the loops of hashed layers and mixtures, which are slower without: {error}. Update "
            "it by pip install -U 'tying[fast]', or uninstall it",
            stacklevel=2,
        )
        return False
    return True


def in_halves(task: Task, count: int) -> None:
    """Call ``task(half, begin, end)`` for both halves of ``count`` weights, on two threads if that pays.

    The halves are the same on one thread, so that results do not depend on the number of threads.
    """
    middle, errors, threads = count // 2, list[BaseException](), set[int]()
    halves = SimpleQueue[tuple[int, int, int]]()
    for half in ((0, 0, middle), (1, middle, count)):
        halves.put(half)

    def run(_: object = None) -> None:
        threads.add(get_ident())
        try:
            while True:
                task(*halves.get_nowait())
        except Empty:
            pass
        except BaseException as error:  # which a thread of OpenMP would only print
            errors.append(error)

    if count >= TWO_THREADS and torch.get_num_threads() > 1 and os.getpid() == PROCESS and (openmp := _openmp()):
        openmp.GOMP_parallel(CALLBACK(run), None, 2, 0)
        if get_ident() not in threads:  # a signal's exception came first, and was only printed
            raise KeyboardInterrupt
    run()
    if errors:
        raise errors[0]


@cache
def _openmp() -> Any:
    """Return the library that runs torch's threads, if it is GNU's OpenMP, as on Linux; else None.

    After an operation, torch's threads wait actively for the next one, for milliseconds: a thread of our own beside
    them would get half a core where all cores are theirs.
    """
    try:
        return ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    except (OSError, AttributeError):
        return None
