"""The `stimg` command, run in this process: its exit status and what it says."""

import resource
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from huggingface_hub.utils import enable_progress_bars
from transformers.utils import logging

from modeling_stimg.cli import main


def stimg(*words: str | Path) -> subprocess.CompletedProcess:
    """What `stimg WORDS` does; the process is left as it was."""
    arguments, status = [str(word) for word in words], 0
    with redirect_stdout(StringIO()) as stdout, redirect_stderr(StringIO()) as stderr, warnings.catch_warnings():
        show = warnings.showwarning
        try:
            main(arguments)
        except SystemExit as end:
            status = end.code or 0
        finally:
            warnings.showwarning = show
            enable_progress_bars()
            logging.enable_progress_bar()
    return subprocess.CompletedProcess(arguments, status, stdout.getvalue(), stderr.getvalue())


@contextmanager
def little_room(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `size` bytes: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
