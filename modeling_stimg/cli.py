"""The `stimg` command: its commands, each in a file of its own, and how they end."""

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import typer

from .cli_app import app as page
from .cli_domains import domains
from .cli_embed import embed
from .cli_inspect import inspect
from .cli_options import ManyValues
from .cli_reconstruct import reconstruct
from .cli_slides import TOLD, sentence

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
INTERRUPTED = 130


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
            print("interrupted: no half-written file is left; the same command starts again.", file=sys.stderr)
            sys.exit(INTERRUPTED)

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
    try:
        app(None if arguments is None else list(arguments))
    except TOLD as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
