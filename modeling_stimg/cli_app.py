"""`stimg app`: the page."""

from typing import Annotated

import typer

from .cli_options import DeviceOption, ModelOption, QuietOption, RevisionOption


def app(
    model: ModelOption = None,
    port: Annotated[int, typer.Option(help="Port of the page.", min=1, max=65535)] = 7860,
    host: Annotated[str, typer.Option(help="Address that is listened to; 0.0.0.0: all of this machine.")] = "127.0.0.1",
    share: Annotated[
        bool, typer.Option("--share", help="Also a public address, through Gradio's servers, which see all traffic.")
    ] = False,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    quiet: QuietOption = False,
) -> None:
    """Serve a page: drop a slide, see its tissue, its domains and its genes, download the result.

    Slides stay on this machine, in memory, until their page is closed.
    """
    from .app import launch
    from .cli_slides import hush

    hush(quiet)
    launch(model, revision=revision, device=device, host=host, port=port, share=share, quiet=quiet)
