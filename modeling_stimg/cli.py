"""The `stimg` command: its commands, each in a file of its own, and how they end."""

import atexit
import functools
import gc
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import typer

from .cli_app import app as page
from .cli_domains import domains
from .cli_embed import embed
from .cli_inspect import inspect
from .cli_options import ManyValues
from .cli_reconstruct import reconstruct
from .cli_slides import TOLD, sentence

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
BAD_INPUT, INTERRUPTED = 2, 130
_INTERRUPTION = "interrupted: no half-written file is left; the same command starts again."
# An option that is missing, unknown or has no such value. Typer gives its class no name of its own.
UsageError = typer.BadParameter.__mro__[1]


@app.callback()
def _stimg() -> None:
    """Spatial transcriptomics as images: embeddings of spots that know their surroundings."""


def _interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """The command, which Ctrl-C ends in one sentence; files that were being written are gone by then."""

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        try:
            command(**arguments)
        except KeyboardInterrupt:
            _end(_INTERRUPTION, INTERRUPTED)

    return run


app.command()(_interruptible(inspect))
app.command()(_interruptible(embed))
app.command()(_interruptible(domains))
app.command(cls=ManyValues)(_interruptible(reconstruct))
app.command()(_interruptible(page))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; bad input ends in one sentence on stderr and exit status 2, Ctrl-C in 130.

    Args:
        arguments: words of the command line; None = those of this process.
    """
    warnings.showwarning = lambda message, *_args, **_kwargs: print(f"warning: {message}", file=sys.stderr)
    atexit.register(gc.freeze)  # everything goes with the process: looking through it first takes more than a second
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = app(words or ["--help"], prog_name="stimg", standalone_mode=False)
    except UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "stimg"
        message = " ".join(error.format_message().split()).rstrip(".")
        _end(f"error: {message}: see {command} --help.", BAD_INPUT)
    except TOLD as error:
        _end(f"error: {sentence(error)}", BAD_INPUT)
    except typer.Abort:
        _end(_INTERRUPTION, INTERRUPTED)
    sys.exit(status if words else BAD_INPUT)


def _end(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
