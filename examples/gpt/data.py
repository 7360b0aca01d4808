"""Text as bytes: which files, which of them validate, which bytes make which batch."""

import dataclasses
import hashlib
import sysconfig
from pathlib import Path

import numpy as np

STANDARD_LIBRARY = "python standard library"

# Left out of the standard library: tests and optional parts, which not every machine
# has, what was installed beside it, and folders that are mostly generated tables.
SKIPPED = {
    *("test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo"),
    *("dist-packages", "site-packages"),
    *("encodings", "pydoc_data"),
}
# One file in twenty validates; a single file gives its last twentieth.
HOLD_OUT = 20
# Stands before every file: the one byte that text does not hold.
START = b"\0"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training and validation bytes."""

    files: int
    train: np.ndarray
    validation: np.ndarray
    sha256: str

    def train_batch(self, seed: int, step: int, batch: int, length: int) -> np.ndarray:
        """Tokens `[batch, length + 1]` that depend on seed and step alone.

        No state to save: a resumed run draws what the uninterrupted one would.
        """
        starts = np.random.default_rng([seed, step]).integers(
            0, len(self.train) - length, size=batch
        )
        return _windows(self.train, starts, length)

    def validation_batches(self, count: int, batch: int, length: int):
        """The same `count` batches each time, spread evenly over the text."""
        starts = np.linspace(
            0, len(self.validation) - length - 1, count * batch, dtype=np.int64
        )
        return [_windows(self.validation, s, length) for s in np.split(starts, count)]


def load(path: str, length: int) -> Corpus:
    """Reads a file, a directory's text files, or STANDARD_LIBRARY's sources."""
    if path == STANDARD_LIBRARY:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = list(root.rglob("*.py"))
    else:
        root = Path(path)
        if not root.exists():
            raise ValueError(f"--data must name a file or directory; got {path}")
        files = [f for f in root.rglob("*") if f.is_file()] if root.is_dir() else [root]

    # Names in POSIX form sort alike everywhere.
    names = sorted(f.relative_to(root).as_posix() for f in files)
    texts = [(root / n).read_bytes() for n in names if _is_wanted(n, path)]
    texts = [START + text for text in texts if text and START not in text]
    if not texts:
        raise ValueError(f"--data must hold text (no NUL bytes); found none in {root}")
    if len(texts) == 1:
        cut = len(texts[0]) - len(texts[0]) // HOLD_OUT
        train, validation = texts[0][:cut], texts[0][cut:]
    else:
        every = min(HOLD_OUT, len(texts))
        train = b"".join(t for i, t in enumerate(texts, 1) if i % every)
        validation = b"".join(texts[every - 1 :: every])

    for part, text in (("training", train), ("validation", validation)):
        if len(text) <= length:
            raise ValueError(
                f"--length must be below the {part} text's {len(text)} bytes; "
                f"got {length} with {path}"
            )
    digest = hashlib.sha256(train + START + validation).hexdigest()
    return Corpus(
        len(texts),
        np.frombuffer(train, np.uint8),
        np.frombuffer(validation, np.uint8),
        digest,
    )


def _is_wanted(name: str, path: str) -> bool:
    parts = Path(name).parts
    if any(part.startswith(".") for part in parts):
        return False
    return path != STANDARD_LIBRARY or SKIPPED.isdisjoint(parts)


def _windows(text: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    return text[starts[:, None] + np.arange(length + 1)].astype(np.int32)
