"""What of a run goes to the Hub: a model that loads there, at its end and, with a hub_strategy, at every checkpoint."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

if TYPE_CHECKING:
    from train.arguments import PretrainingArguments

MODEL_FILES = (
    *("config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    *("preprocessor_config.json", "genes.json", "*_stimg.py"),
)
TOLD_FILES = ("README.md", "pretraining.json", "loss.png", "probe.png")
STAGING_PREFIX = ".pushing"
LAST_CHECKPOINT = "last-checkpoint"


class NotPushedError(OSError):
    """Something did not reach the Hub; nothing on this machine is lost."""


@contextmanager
def pushing(what: str) -> Iterator[None]:
    """Turn every way of failing at the Hub into one sentence, which begins with `what`."""
    try:
        yield
    except NotPushedError:
        raise
    except (HTTPError, OSError, RuntimeError) as error:
        known = (HTTPError, OSError)
        if not isinstance(error, known) and not isinstance(error.__cause__, known):
            raise
        raise NotPushedError(f"{what}: {reason_of(error)}.") from error


def reason_of(error: BaseException) -> str:
    """Why the Hub was not reached, or did not want, in words; no token and no address with one."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # of a large file
        return reason_of(error.__cause__)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, LocalTokenNotFoundError):
        return "nobody is logged in, log in (hf auth login) or set HF_TOKEN"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        if status == 401:
            return f"{constants.ENDPOINT} knows no such token, log in (hf auth login) or set HF_TOKEN"
        if status == 403:
            return "the token may not write there, take one that may, or another name for the repository"
        return f"{constants.ENDPOINT} answered {status} ({error.server_message or 'without a reason'})"
    if isinstance(error, HTTPError):
        return f"{constants.ENDPOINT} was not reached ({type(error).__name__})"
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else type(error).__name__


def check_push(training: "PretrainingArguments") -> None:
    """Stop before any work where nobody is logged in who could push.

    Raises:
        NotPushedError: no token, or one that the Hub does not know; no Hub.
    """
    if training.push_to_hub and training.process_index == 0:
        with pushing("push_to_hub is on, but nothing could be pushed"):
            HfApi(token=training.hub_token).whoami()


def link_files(source: Path, target: Path, patterns: Sequence[str] = ("*",)) -> None:
    """Have the files of a folder, not those of folders in it, in another one too, which is made.

    Hard links where the disk has them: what is linked stays whole while the first name is replaced or removed.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in sorted({path.name for pattern in patterns for path in source.glob(pattern) if path.is_file()}):
        try:
            os.link(source / name, target / name)
        except OSError:
            shutil.copyfile(source / name, target / name)


def stage_checkpoint(checkpoint: Path, staged: Path, also_as: str | None) -> bool:
    """What a push in the middle of a run sends, but for what tells of the model.

    Args:
        checkpoint: a whole one. staged: the new folder. also_as: folder in the repository that keeps this model;
            None: none. What a run goes on from stays here: PyTorch writes it as pickles.

    Returns:
        Whether the checkpoint holds a model that loads: not one that is spread over processes (FSDP).
    """
    link_files(checkpoint, staged, MODEL_FILES)
    if also_as is not None:
        link_files(checkpoint, staged / also_as, MODEL_FILES)
    return any(staged.glob("model*.safetensors"))


def remove_staged(output: Path) -> None:
    """Remove what an interrupted run had put together for the Hub."""
    for folder in output.glob(f"{STAGING_PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)
