"""Scores written down one by one, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Scores = dict[str, Any]


class ScoreLog:
    """A file with a line for every score that was computed: the hash of all that it depends on, and the score.

    A line that a killed run left half is passed over. What depends on other features, splits or settings has another
    hash and is computed anew, so that nothing outdated can enter a table.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.known: dict[str, Scores] = {}
        self.num_computed = 0
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    self.known[entry["key"]] = entry["scores"]
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue

    def get(self, key: str, compute: Callable[[], Scores]) -> Scores:
        """The score of this key, computed and written down where it is not known."""
        if key not in self.known:
            scores = compute()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                # The first newline ends a line that was left half; empty lines are passed over.
                file.write("\n" + json.dumps({"key": key, "scores": scores}) + "\n")
                file.flush()
            self.known[key] = scores
            self.num_computed += 1
        return self.known[key]


def content_key(*parts: Any) -> str:
    """Hash of arrays, of sequences of them, and of plain values."""
    digest = hashlib.sha256()
    for part in parts:
        _add(digest, part)
    return digest.hexdigest()


def _add(digest: Any, part: Any) -> None:
    if isinstance(part, np.ndarray):
        digest.update(f"{part.shape} {part.dtype.str};".encode())
        digest.update(np.ascontiguousarray(part))
    elif isinstance(part, Sequence) and not isinstance(part, str):
        digest.update(f"[{len(part)};".encode())
        for item in part:
            _add(digest, item)
    else:
        digest.update(f"{type(part).__name__} {part!r};".encode())
