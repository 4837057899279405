"""Text as sequences of characters, as a LightningDataModule."""

import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from tying.data.resuming import ResumableData, ResumableLoader
from tying.errors import ConfigurationError, check_count
from tying.lightning_namespace import pl

UNKNOWN = 0  # the id of all characters outside the vocabulary
HELD_OUT = 20  # 1/20 of the text (or of the files) is for validation, and 1/20 for testing


class StreamLoader(ResumableLoader):
    """Iterate over parallel streams of a text in windows: each batch begins where the previous one ended.

    Several processes divide the streams among them. A training run resumes at the batch where it was interrupted.

    Args:
        ids: int64, (characters,).
        streams: streams per process, which is the number of samples in a batch.
        window: characters in a sample.
        rank: rank of this process.
        world: number of processes.

    Attributes:
        ids: int64, (streams, characters).
        dataset: the ids in one dimension, from which Lightning gets the number of samples.

    Example:
        >>> loader = StreamLoader(torch.arange(9), streams=2, window=2)
        >>> [(x.tolist(), y.tolist()) for x, y in loader]
        [([[0, 1], [4, 5]], [[1, 2], [5, 6]])]
    """

    def __init__(self, ids: Tensor, streams: int, window: int, rank: int = 0, world: int = 1) -> None:
        super().__init__()
        joint = streams * world
        length = len(ids) // joint
        self.ids = ids[: length * joint].view(joint, length)[rank * streams : (rank + 1) * streams]
        self.dataset = self.ids.flatten()
        self.window = window

    def __len__(self) -> int:
        return max(0, self.ids.shape[1] - 1) // self.window

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in self._numbers(len(self)):
            start = number * self.window
            yield self.ids[:, start : start + self.window], self.ids[:, start + 1 : start + self.window + 1]


class Text(ResumableData):
    """The characters of a text; the target of each character is the next one.

    Args:
        path: a text file. The last 5 % are for testing, and the 5 % before them for validation. The default is the
            single-file modules of Python's standard library; the CRC-32 of a file's name, modulo 20, assigns the file
            to validation (0), testing (1) or training.
        window: characters in a sample.
        batch_size: streams of text, per process; each sample continues the sample of the previous batch.
        vocabulary: number of ids. The most frequent characters of the training text have one id each; all others
            share the id 0.
        characters: number of characters of the training text to use; default: all.
        encoding: encoding of the file.

    Attributes:
        letters: the characters with ids 1, 2, …

    Shape: batches of ids (batch, window) and of targets (batch, window), int64.

    Raises:
        ConfigurationError: an argument is out of range; in ``setup``, the file cannot be read, or the text is shorter
            than a window; when a loader is created, the text is too short for the streams.

    Example:
        >>> data = Text(window=50, batch_size=8, characters=20_000)
        >>> data.setup("fit")
        >>> next(iter(data.train_dataloader()))[0].shape
        torch.Size([8, 50])
    """

    def __init__(
        self,
        path: str | None = None,
        window: int = 100,
        batch_size: int = 32,
        vocabulary: int = 128,
        characters: int | None = None,
        encoding: str = "utf-8",
    ) -> None:
        super().__init__()
        check_count("window", window, "[1, inf)")
        check_count("batch_size", batch_size, "[1, inf)")
        check_count("vocabulary", vocabulary, "[2, inf)")
        check_count("characters", 2 if characters is None else characters, "[2, inf)")
        self.path, self.window, self.batch_size = path, window, batch_size
        self.vocabulary, self.characters, self.encoding = vocabulary, characters, encoding
        self.letters = ""
        self._ids: dict[str, Tensor] = {}

    @override
    def setup(self, stage: str) -> None:
        if self._ids:
            return
        texts = _split(Path(self.path), self.encoding) if self.path is not None else _library()
        texts["fit"] = texts["fit"][: self.characters]
        for split, text in texts.items():
            if len(text) <= self.window:
                raise ConfigurationError(
                    f"the text for {split} has {len(text)} characters: a window of {self.window}, and what follows it, "
                    f"needs {self.window + 1}"
                )
        self.key = f"{zlib.crc32(''.join(texts.values()).encode('utf-8', 'surrogatepass')):08x}"
        counts = Counter(texts["fit"])
        frequent = sorted(counts, key=lambda letter: (-counts[letter], letter))[: self.vocabulary - 1]
        self.letters = "".join(sorted(frequent))
        known = {letter: number for number, letter in enumerate(self.letters, start=1)}
        self._ids = {
            split: torch.tensor([known.get(letter, UNKNOWN) for letter in text]) for split, text in texts.items()
        }
        sizes = [f"{len(ids):,} {split} ({int((ids == UNKNOWN).sum())} unknown)" for split, ids in self._ids.items()]
        pl.utilities.rank_zero_info(f"Text: {self.description} of {len(self.letters)} characters: {', '.join(sizes)}")

    @property
    def description(self) -> str:
        """The source of the text, for the log."""
        return f"sources of Python {sys.version.split()[0]}" if self.path is None else Path(self.path).name

    def text(self, ids: Tensor) -> str:
        """Convert ids to characters; ids without a character become �."""
        letters = dict(enumerate(self.letters, start=1))
        return "".join(letters.get(number, "�") for number in ids.flatten().tolist())

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # version 0.1.0 saved only the position of the training loader
        super().load_state_dict({"fit": state_dict} if "epoch" in state_dict else state_dict)

    @override
    def make_loader(self, split: str, train: bool, rank: int, world: int) -> StreamLoader:
        ids = self._ids[split]
        longest = max(1, (len(ids) - 1) // (self.window + 1) // world)  # every stream needs a window
        streams = self.batch_size if train else min(self.batch_size, longest)
        loader = StreamLoader(ids, streams, self.window, rank, world)
        if not len(loader):
            raise ConfigurationError(
                f"the text for {split} has {len(ids):,} characters: a window of {self.window}, and what "
                f"follows it, for each of {streams * world} streams needs {streams * world * (self.window + 1):,}"
            )
        return loader


def _split(path: Path, encoding: str) -> dict[str, str]:
    try:
        text = path.read_text(encoding)
    except (OSError, UnicodeError, LookupError) as error:  # LookupError for an unknown encoding
        raise ConfigurationError(f"path: {path} cannot be read as {encoding}: {error}") from None
    last, before = (len(text) - share * len(text) // HELD_OUT for share in (1, 2))
    return {"fit": text[:before], "val": text[before:last], "test": text[last:]}


def _library() -> dict[str, str]:
    texts: dict[str, list[str]] = {"fit": [], "val": [], "test": []}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        split = {0: "val", 1: "test"}.get(zlib.crc32(path.name.encode()) % HELD_OUT, "fit")
        texts[split].append(path.read_text(encoding="utf-8", errors="replace"))
    return {split: "".join(parts) for split, parts in texts.items()}
