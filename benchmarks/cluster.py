"""Runs on the workers of a cluster of dask.distributed.

A worker starts a process for each run, as one machine alone does, in a folder of its own whose files come back at the
run's end, or in a folder that all workers share. What is sent to a worker is pickled beforehand: dask's scheduler,
which reads what it passes on, need not have this package.
"""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from multiprocessing import current_process
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from typing_extensions import override

from benchmarks.engine import Local, apart, work_apart
from benchmarks.folder import Folder
from benchmarks.json_files import write_json
from benchmarks.machine import PACKAGES
from benchmarks.perform import TAKEN, Task, in_a_line
from tying.errors import ConfigurationError, listed
from tying.files import atomically

ANSWER = 10  # seconds in which a scheduler answers
AHEAD = 500  # runs on their way at a time: each holds a lock, which is an open file
TELL = 2.0  # seconds between messages on the progress of a run
LEFT_THERE = ("checkpoints", "lock")  # what does not come back from a worker's own folder
Result = TypeVar("Result")


class Cluster(Local):
    """Where runs are done: on the workers of a scheduler.

    Args:
        address: of the scheduler.
        out: the folder of all runs.
        shared: whether the workers see it, and work in it.

    Raises:
        ConfigurationError: nobody answers, no worker is there, or one has other packages or lacks the shared folder.
    """

    def __init__(self, address: str, out: Path, shared: bool = False) -> None:
        try:
            from distributed import Client

            self._client = Client(address, timeout=ANSWER, set_as_default=False)
        except ImportError as error:
            raise ConfigurationError(f"--executor needs pip install '.[cluster]': {error}") from None
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"no scheduler answers at {address}: {error}") from None
        self.ahead, self._address, self._topic = AHEAD, address, f"benchmarks-{uuid.uuid4().hex}"
        self._shared = out.resolve() if shared else None
        self._locks: dict[str, FileLock] = {}
        self._pool = self._client.get_executor(pure=False)
        try:
            self._check()
        except BaseException:
            self.__exit__()
            raise
        self._client.subscribe_topic(self._topic, self._hear)

    @override
    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False)
        self._client.close()
        for lock in self._locks.values():
            lock.release()

    def _check(self) -> None:
        """Refuse workers that cannot do these runs; note how many runs they do at a time, and the threads of each."""
        versions = self._client.get_versions(packages=[*PACKAGES])
        here, slots = versions["client"]["packages"], self._client.nthreads()
        if not slots:
            raise ConfigurationError(f"no worker has joined {self._address}: start some, such as `dask worker`")
        for worker, info in versions["workers"].items():
            there = info["packages"]
            differing = [name for name in ("python", *PACKAGES) if there[name] != here[name]]
            if differing:
                packages = listed(f"{name} {there[name]} ({here[name]} here)" for name in differing)
                raise ConfigurationError(
                    f"worker {worker} has {packages}: runs of other versions are not compared. Install the same"
                )
        if self._shared:
            self._shared.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self._shared) as token:
            answers = self._client.run(_sealed(_describe, Path(token.name)), on_error="return")
        busy = Counter[str]()
        for worker, answer in answers.items():
            if isinstance(answer, Exception):
                raise ConfigurationError(
                    f"worker {worker} cannot run this package: {in_a_line(answer)}. Start it in a clone of this one"
                )
            if self._shared and not answer["sees"]:
                raise ConfigurationError(f"worker {worker} does not see {self._shared}: leave out --shared")
            busy[answer["host"]] += slots[worker]
        self.slots = busy.total()
        self.threads = max(1, min(answer["cores"] // busy[answer["host"]] for answer in answers.values()))

    @override
    def submit(self, task: Task) -> Future[Any]:
        name, folder = task.folder.name, task.folder
        if self._shared:
            there = replace(task, folder=Folder(self._shared / name))
            return self._pool.submit(_sealed(_work_on_worker, there, None))
        try:
            lock = folder.lock()
            lock.acquire()
        except Timeout:
            taken: Future[Any] = Future()
            taken.set_result((TAKEN, {}))
            return taken
        self._locks[name] = lock
        scratch = folder.path / "scratch.txt"  # where the run goes on if another attempt is on the same machine
        if not scratch.exists():
            scratch.write_text(f"tying-{uuid.uuid4().hex}")
        there = replace(task, folder=Folder(Path(scratch.read_text(), name)))
        return self._pool.submit(_sealed(_work_on_worker, there, self._topic))

    @override
    def outcome(self, task: Task, future: Future[Any]) -> str:
        try:
            error, files = future.result()
            if files:
                (task.folder.path / "failure.json").unlink(missing_ok=True)  # of an earlier attempt
            for name, content in sorted(files.items(), key=lambda item: item[0] == "result.json"):
                with atomically(task.folder.path / name) as aside:
                    aside.write_bytes(content)
        except CancelledError:
            raise ConfigurationError(
                f"the scheduler at {self._address} went away: what is complete is kept, and the same command goes on"
            ) from None
        except Exception as failure:
            error = in_a_line(failure)
        finally:
            if lock := self._locks.pop(task.folder.name, None):
                lock.release()
        return str(error)

    @override
    def call(self, function: Callable[[Task], Result], task: Task) -> Future[Result]:
        future: Future[Result] = self._pool.submit(_sealed(_call_on_worker, function, task))
        return future

    def _hear(self, event: tuple[float, dict[str, Any]]) -> None:
        name, progress = event[1]["run"], event[1]["progress"]
        if lock := self._locks.get(name):
            write_json(Path(lock.lock_file).with_name("progress.json"), progress)


def _sealed(function: Callable[..., Result], *given: Any) -> Callable[[], Result]:
    """Return a call of a function whose content only a worker reads."""
    content = pickle.dumps((function, given))

    def call() -> Result:
        import pickle

        function, given = pickle.loads(content)
        result: Result = function(*given)
        return result

    return call


def _describe(token: Path) -> dict[str, Any]:
    """Return what a worker's machine is, and whether it sees a file."""
    return {"host": socket.gethostname(), "cores": os.cpu_count() or 1, "sees": token.exists()}


def _call_on_worker(function: Callable[[Task], Result], task: Task) -> Result:
    return apart(function, task, _awaited())


def _work_on_worker(task: Task, topic: str | None) -> tuple[str, dict[str, bytes]]:
    """Do a run on a worker; return what went wrong and, if it was done in the worker's own folder, its files."""
    from distributed import get_worker

    awaited = _awaited()
    if topic is None:
        return work_apart(task, awaited), {}
    folder = Folder(Path(tempfile.gettempdir()) / task.folder.path)
    worker, last, said = get_worker(), time.monotonic(), folder.progress()

    def tell() -> bool:
        nonlocal last, said
        if time.monotonic() - last > TELL and (progress := folder.progress()) != said:
            last, said = time.monotonic(), progress
            worker.log_event(topic, {"run": folder.name, "progress": progress})
        return awaited()

    error = work_apart(replace(task, folder=folder), tell)
    paths = {path.relative_to(folder.path): path for path in folder.path.rglob("*") if path.is_file()}
    files = {str(name): path.read_bytes() for name, path in paths.items() if name.parts[0] not in LEFT_THERE}
    if not error:
        shutil.rmtree(folder.path.parent)
    return error, files


def _awaited() -> Callable[[], bool]:
    """Return a function that tells whether anybody waits for the task that a worker is at."""
    from distributed import get_worker

    current_process().daemon = False  # a nanny's worker is a daemon, which may have no children
    os.environ.pop("MALLOC_TRIM_THRESHOLD_", None)  # dask's setting, which slows training down
    worker = get_worker()
    key = worker.get_current_task()

    def awaited() -> bool:
        state = worker.state.tasks.get(key)
        return state is not None and state.state != "cancelled"

    return awaited
