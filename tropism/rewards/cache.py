"""Scores that are kept, so that a picture is not scored twice: evaluations of the same base model, runs that go on.

The key of a score is a hash of the picture's numbers, its prompt, its columns, and the reward's name and version.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tropism.base import Reward

from .scores import RewardError

IN_MEMORY = 100_000
BUSY = 30.0  # seconds that another process may hold the file
TABLE = "CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, score REAL NOT NULL) WITHOUT ROWID"


class Store(Protocol):
    """Scores by key."""

    def get(self, keys: Sequence[bytes]) -> list[float] | None:
        """All of them, in order, or None when one is missing."""
        ...

    def put(self, scores: Mapping[bytes, float]) -> None: ...


class Memory:
    """The scores that were used last, ``size`` of them."""

    def __init__(self, size: int = IN_MEMORY) -> None:
        self._size, self._lock = size, threading.Lock()
        self._scores: OrderedDict[bytes, float] = OrderedDict()

    def get(self, keys: Sequence[bytes]) -> list[float] | None:
        with self._lock:
            if any(key not in self._scores for key in keys):
                return None
            for key in keys:
                self._scores.move_to_end(key)
            return [self._scores[key] for key in keys]

    def put(self, scores: Mapping[bytes, float]) -> None:
        with self._lock:
            for key, score in scores.items():
                self._scores[key] = score
                self._scores.move_to_end(key)
            while len(self._scores) > self._size:
                self._scores.popitem(last=False)


class File:
    """An SQLite file, which several processes may use at once; it holds keys and numbers and nothing else.

    Raises RewardError where the file is of another kind or cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._open() as file:
                file.execute(TABLE)
        except (sqlite3.Error, OSError) as error:
            raise RewardError(f"{self.path} cannot be used to keep scores ({error}); give a new file") from error

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection for one transaction: threads and forks share nothing."""
        with closing(sqlite3.connect(self.path, timeout=BUSY)) as file, file:
            yield file

    def get(self, keys: Sequence[bytes]) -> list[float] | None:
        with self._open() as file:
            rows = [file.execute("SELECT score FROM scores WHERE key = ?", (key,)).fetchone() for key in keys]
        return None if any(row is None for row in rows) else [float(row[0]) for row in rows]

    def put(self, scores: Mapping[bytes, float]) -> None:
        with self._open() as file:
            file.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", scores.items())


class Cached:
    """``reward``, but for calls whose pictures were all scored before.

    A call with one new picture is scored as a whole: a model's rounding may depend on what is in a batch, and this way
    a call gets the bits that it would have got. Missing scores are not kept. Where a gradient is asked for, the reward
    is asked. A reward that answers differently each time becomes one that does not: ``tropism reward test`` tells.
    """

    def __init__(self, reward: Reward, version: str, store: Store | None = None) -> None:
        self.reward, self.version = reward, version
        self.name, self.differentiable = reward.name, reward.differentiable
        self.concurrent = bool(getattr(reward, "concurrent", False))
        self.store: Store = Memory() if store is None else store
        self.hits = self.misses = 0  # pictures

    def __call__(self, samples: Any, prompts: Sequence[str], **columns: Any) -> Tensor:
        """As the reward's own."""
        if not isinstance(samples, Tensor) or (samples.requires_grad and torch.is_grad_enabled()):
            return self.reward(samples, prompts, **columns)
        keys = self._keys(samples, prompts, columns)
        try:
            return self._looked_up(keys, samples, prompts, columns)
        except sqlite3.Error as error:
            raise RewardError(f"the scores kept for reward '{self.name}' cannot be used ({error})") from error

    def _looked_up(self, keys: list[bytes], samples: Tensor, prompts: Sequence[str], columns: Any) -> Tensor:
        kept = self.store.get(keys)
        if kept is not None:
            self.hits += len(keys)
            return torch.tensor(kept, dtype=torch.float32, device=samples.device)
        self.misses += len(keys)
        values = self.reward(samples, prompts, **columns)
        given = zip(keys, values.detach().float().tolist(), strict=True)
        self.store.put({key: score for key, score in given if score == score})
        return values

    def _keys(self, samples: Tensor, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> list[bytes]:
        images = samples.detach().cpu().contiguous()
        kind = [self.name, self.version, str(images.dtype), list(images.shape[1:])]
        rows = [{name: values[row] for name, values in columns.items()} for row in range(len(prompts))]
        return [
            _hash(image.view(torch.uint8).numpy().tobytes(), [*kind, prompt, row])
            for image, prompt, row in zip(images, prompts, rows, strict=True)
        ]


def _hash(pixels: bytes, said: Any) -> bytes:
    text = json.dumps(said, sort_keys=True, default=repr).encode()
    return hashlib.sha256(hashlib.sha256(text).digest() + pixels).digest()
