"""Options that several commands share, and how they are read."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

SlidesArgument = Annotated[
    list[str],
    typer.Argument(
        help="Slides: .h5ad, Space Ranger output folders, SpatialData .zarr, legacy ST tables.",
        metavar="SLIDE...",
        show_default=False,
    ),
]
SlideArgument = Annotated[
    str,
    typer.Argument(
        help="A slide: .h5ad, Space Ranger output folder, SpatialData .zarr, or legacy ST table.",
        metavar="SLIDE",
        show_default=False,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        help="Folder of a model, or Hub id (ORG/NAME, ORG/NAME@REVISION); default: the one of this checkout.",
        show_default=False,
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub model, in place of @REVISION.", show_default=False)
]
OutputOption = Annotated[
    Path, typer.Option(help="The .h5ad to write; of several slides the folder for them.", show_default=False)
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Make outputs anew that are there in the folder already.")
]
BatchSizeOption = Annotated[int, typer.Option(help="Windows at a time.", min=1)]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU where there is one.")]
LayerOption = Annotated[
    str | None, typer.Option(help="Where raw counts are: a layer, X or raw; default: found.", show_default=False)
]
SlideKeyOption = Annotated[
    str | None, typer.Option(help="Column of obs that tells several slides apart.", show_default=False)
]
BinSizeOption = Annotated[
    float | None, typer.Option(help="Sum cells at any positions in square bins of this side, um.", show_default=False)
]
ScaleOption = Annotated[
    float | None, typer.Option(help="Scale of cell positions in pixels; default: they are in um.", show_default=False)
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Only warnings and errors: no progress, no report.")]


class ManyValues(TyperCommand):
    """A command whose `--genes` takes all words up to the next option, as well as being given several times."""

    many = ("--genes",)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`--genes A B` as `--genes A --genes B`."""
        return super().parse_args(ctx, several_times(args, self.many))


def several_times(words: list[str], options: tuple[str, ...]) -> list[str]:
    """Words of a command line in which each of an option's values stands behind the option itself."""
    written: list[str] = []
    option = ""
    for word in words:
        if word.startswith("--"):
            option = word if word in options else ""
            written += [] if option else [word]
        else:
            written += [option, word] if option else [word]
    # An option without a value stays, for the parser to complain of.
    return written + [word for i, word in enumerate(words) if word in options and _valueless(words, i)]


def _valueless(words: list[str], place: int) -> bool:
    return place + 1 == len(words) or words[place + 1].startswith("--")
