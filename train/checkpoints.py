"""Checkpoints that are whole or not there: what one is made of, which to go on from, and which to remove.

A checkpoint is written under another name, gets a list of its files (`checkpoint.json`) and is renamed when everything
is on the disk; only then are older ones removed. So a crash or a full disk at any moment costs the steps since the last
checkpoint, and nothing else.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from data_processing.writing import write_whole

logger = logging.get_logger("stimg")

CHECKPOINT_FILE = "checkpoint.json"
# What torch.save says of a write that failed; it raises a bare RuntimeError.
TORCH_WRITE_FAILURES = ("PytorchStreamWriter", "inline_container", "iostream", "unexpected pos")


class NotSavedError(OSError):
    """Something could not be written; nothing that was there before is lost."""


@contextmanager
def saving(what: str) -> Iterator[None]:
    """Turn every library's way of saying that a file cannot be written into one sentence."""
    try:
        yield
    except NotSavedError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(part in str(error) for part in TORCH_WRITE_FAILURES):
            raise
        reason = str(error).splitlines()[0]
        if isinstance(error, RuntimeError):
            reason = "a write was cut short, as on a full disk"
        elif isinstance(error, OSError) and error.errno:
            reason = os.strerror(error.errno)
        raise NotSavedError(
            f"{what} could not be saved ({reason}): nothing that was saved before is lost; make room on the disk and "
            "give the same command again."
        ) from error


def checkpoint_step(folder: Path) -> int:
    """The step of a checkpoint's folder, -1 for anything else."""
    prefix, _, step = folder.name.rpartition("-")
    return int(step) if prefix == PREFIX_CHECKPOINT_DIR and step.isdigit() and folder.is_dir() else -1


def checkpoint_folders(output: Path) -> list[Path]:
    """Folders of checkpoints, whole or not, by step."""
    found = output.iterdir() if output.is_dir() else ()
    return sorted((folder for folder in found if checkpoint_step(folder) >= 0), key=checkpoint_step)


def finish_checkpoint(staged: Path, target: Path, run: dict[str, Any]) -> None:
    """List the files of a checkpoint, put everything on the disk, and give it its name.

    Args:
        staged: folder with all files. target: its name from now on; a damaged checkpoint of that name is replaced.
        run: what the result depends on, compared when a run goes on from here (`check_same_run`).
    """
    files = [path for path in sorted(staged.rglob("*")) if path.is_file()]
    listed = {path.relative_to(staged).as_posix(): [path.stat().st_size, _sha256(path)] for path in files}
    write_whole(staged / CHECKPOINT_FILE, (json.dumps({"run": run, "files": listed}, indent=1) + "\n").encode())
    for path in (*files, staged / CHECKPOINT_FILE, *{path.parent for path in files}):
        _to_disk(path)
    if target.exists():
        shutil.rmtree(target)
    os.replace(staged, target)
    _to_disk(target.parent)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    """Have the system write a file's or folder's content out, lest a rename outlive what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of `checkpoint.json`.

    Raises:
        ValueError: why the checkpoint is not whole: no such list, or files that differ from it.
    """
    try:
        manifest = json.loads((folder / CHECKPOINT_FILE).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except FileNotFoundError:
        raise ValueError(f"it has no {CHECKPOINT_FILE}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"its {CHECKPOINT_FILE} is damaged") from None
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != size:
            raise ValueError(f"{name} has {path.stat().st_size:,} bytes of {size:,}")
        if _sha256(path) != sha256:
            raise ValueError(f"{name} is not what was written")
    return manifest


def last_whole_checkpoint(output: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, and its manifest; the others are passed over with a warning."""
    for folder in reversed(checkpoint_folders(output)):
        try:
            return folder, read_manifest(folder)
        except ValueError as error:
            logger.warning(f"{folder} is passed over: {error}.")
    return None


def check_same_run(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to mix two runs: `then` and `now` are what their results depend on.

    Raises:
        ValueError: names the first fields that differ.
    """
    now = json.loads(json.dumps(now))
    changed = [f"{k} was {then.get(k)!r} and is {now.get(k)!r}" for k in {**then, **now} if then.get(k) != now.get(k)]
    if changed:
        more = f" and {len(changed) - 3} more differences" if len(changed) > 3 else ""
        raise ValueError(
            f"{folder} is a checkpoint of another run ({'; '.join(changed[:3])}{more}): give the arguments it was "
            "started with, another --output_dir, or --resume false to start anew and remove its checkpoints."
        )


def checkpoint_to_resume(output: Path, run: dict[str, Any], main_process: bool) -> Path | None:
    """The checkpoint that this run goes on from, None to start anew; the main process looks, all others are told.

    Raises:
        ValueError: it belongs to another run, or this process does not see the main process' output folder.
    """
    answer: list[Any] = [None, None]
    if main_process:
        found = last_whole_checkpoint(output)
        if found is not None:
            try:
                check_same_run(found[0], found[1]["run"], run)
                answer = [str(found[0]), None]
            except ValueError as error:
                answer = [None, str(error)]
    checkpoint, refusal = broadcast_object_list(answer)
    if refusal is not None:
        raise ValueError(refusal)
    if checkpoint is not None and not Path(checkpoint).is_dir():
        raise ValueError(f"{checkpoint} is not to be seen from every process: output_dir has to be a shared folder.")
    return None if checkpoint is None else Path(checkpoint)


def remove_checkpoints(output: Path) -> None:
    """Remove every checkpoint of an output folder, whole or not."""
    for folder in checkpoint_folders(output):
        shutil.rmtree(folder)


def remove_older(output: Path, step: int, limit: int | None, best: str | None = None) -> None:
    """Keep the checkpoint of `step` and the newest before it, `limit` together, and the best one.

    Checkpoints of later steps are damaged ones that were passed over when the run went on from an earlier one.
    """
    folders = checkpoint_folders(output)
    past = [folder for folder in folders if checkpoint_step(folder) <= step]
    gone = [folder for folder in folders if checkpoint_step(folder) > step]
    if limit is not None and limit > 0:
        gone += past[:-limit]
    for folder in gone:
        if best is None or folder.name != Path(best).name:
            shutil.rmtree(folder, ignore_errors=True)
