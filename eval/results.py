"""What every script of this folder leaves behind: `results.json` with where its numbers came from, and `table.md`."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from data_processing.writing import write_whole

PACKAGES = ("torch", "transformers", "scikit-learn", "numpy", "anndata")


def write_results(
    output_dir: str | os.PathLike[str], records: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any], table: str
) -> None:
    """Write `results.json` (records and metadata) and `table.md` into `output_dir`, made if it is missing.

    Each file appears whole or not at all.
    """
    results = {"metadata": metadata, "records": [dict(record) for record in records]}
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False, default=_plain) + "\n"
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "results.json", text.encode())
    write_whole(folder / "table.md", table.encode())


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [list(header), ["---"] * len(header)]
    lines += [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def run_metadata(seed: int, **extra: Any) -> dict[str, Any]:
    """What is needed to tell where numbers came from: seed, versions, commit, date, command line, and `extra`.

    The commit is the checkout's, with "-dirty" when tracked files were modified, None where there is no repository or
    no git. A missing package's version is None. The command line names files without their absolute folders.
    """
    return {
        "seed": seed,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "commit": _commit(Path(__file__).resolve().parents[1]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [_without_folders(argument) for argument in sys.argv],
        **extra,
    }


def _plain(value: Any) -> Any:
    """NumPy numbers and arrays for JSON."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} {value!r} cannot be written to results.json: pass plain values")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(checkout: Path) -> str | None:
    top_and_commit = _git(checkout, "rev-parse", "--show-toplevel", "HEAD")
    if top_and_commit is None:
        return None
    top, commit = top_and_commit.splitlines()
    if Path(top).resolve() != checkout:  # a copy inside another project's repository
        return None
    return f"{commit}-dirty" if _git(checkout, "status", "--porcelain", "--untracked-files=no") else commit


def _git(checkout: Path, *arguments: str) -> str | None:
    """Output of a git command, None where it fails."""
    command = ["git", "-C", str(checkout), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _without_folders(argument: str) -> str:
    """`--config=/home/ann/a.yaml` -> `--config=a.yaml`: results are published, this machine's folders are not."""
    return re.sub(r"(^|[=,])/(?:[^/=,]+/+)*(?=[^/=,])", r"\1", argument)
