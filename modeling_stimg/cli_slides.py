"""Many slides in one command: which outputs they get, which of these are there already, and what goes wrong."""

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import typer
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

# What bad input raises, in a sentence; and what is asked of a machine that is too small for it.
TOLD = (ValueError, OSError, ImportError, MemoryError, StrictDataclassError, SafetensorError)
_SUFFIXES = (".gz", ".h5ad", ".tsv", ".txt", ".zarr")
# Slides are not equally large: the first process to end waits for the last one.
_PATIENCE = timedelta(days=14)


def sentence(error: BaseException) -> str:
    """What an error of `TOLD` says, on one line."""
    if isinstance(error, MemoryError):
        asked = " ".join(str(error).split())
        told = f" ({asked})" if asked else ""
        return f"There is not enough memory{told}: expected a smaller slide, or a machine with more of it."
    # A damaged config says what is wrong in the cause of the error that names its class.
    cause = error.__cause__ if isinstance(error, StrictDataclassError) else error
    return " ".join(str(cause or error).split()) or type(error).__name__


@dataclass(frozen=True)
class Job:
    """A slide and what is to be written of it.

    Attributes:
        slide: as it was given. output: the .h5ad. plot: the map. resumed: whether an output that is there is kept.
    """

    slide: str
    output: Path
    plot: Path | None
    resumed: bool


def slide_name(slide: str) -> str:
    """What a slide is called: its file without suffixes, or its folder; of `NAME/outs` the NAME."""
    path = Path(slide).resolve()
    if path.name == "outs":
        path = path.parent
    name = path.name
    while Path(name).suffix.lower() in _SUFFIXES:
        name = Path(name).stem
    return name


def plan(slides: Sequence[str], output: Path, plot: Path | None) -> list[Job]:
    """What to write where, checked before anything is computed.

    One slide goes to a file, or into a folder that is there; several go into a folder.

    Raises:
        ValueError: an output of the wrong kind, slides of one name, a slide in the place of its own output.
        FileNotFoundError: no folder to write in. ImportError: a figure without Matplotlib.
    """
    from .plotting import check_figure_path
    from .writing import check_place

    into_folder = len(slides) > 1 or output.is_dir()
    if not into_folder and output.suffix != ".h5ad":
        raise ValueError(f"--output is {output.name}: expected a file name that ends in .h5ad, or a folder.")
    if into_folder and not output.is_dir() and (output.suffix == ".h5ad" or output.exists()):
        raise ValueError(f"--output is {output.name} and there are {len(slides)} slides: expected a folder for them.")
    if plot is not None and into_folder and plot.suffix and not plot.is_dir():
        raise ValueError(f"--plot is {plot.name} and --output a folder: expected a folder for the maps, too.")
    if plot is not None:
        check_figure_path(plot / "map.png" if into_folder else plot)
    for path in (output, plot):
        if path is not None:
            # Names in a folder are looked at below.
            check_place(path / "any" if path.is_dir() else path, *([] if into_folder else slides))
    if not into_folder:
        return [Job(slides[0], output, plot, resumed=False)]
    names = [slide_name(slide) for slide in slides]
    first: dict[str, str] = {}
    for slide, name in zip(slides, names, strict=True):
        # Not every file system tells capital letters from small ones.
        if name.casefold() in first:
            raise ValueError(
                f"{first[name.casefold()]} and {slide} are both called {name}, and outputs are called after slides: "
                "rename one, or embed them into two folders."
            )
        first[name.casefold()] = slide
    jobs = []
    for slide, name in zip(slides, names, strict=True):
        target = output / f"{name}.h5ad"
        if target.resolve() == Path(slide).resolve():
            raise ValueError(f"{slide} lies in --output and would be overwritten: name another folder.")
        jobs.append(Job(slide, target, None if plot is None else plot / f"{name}.png", resumed=True))
    return jobs


def finished(jobs: Iterable[Job], differences: Callable[[Mapping[str, Any]], list[str]], overwrite: bool) -> set[Path]:
    """Outputs that are there and need not be made again.

    Args:
        differences: names of what an output differs in from what would be made, from its `uns["stimg"]`.
        overwrite: none is kept.

    Raises:
        ValueError: outputs that were made otherwise, or of a slide that has changed since.
    """
    done, others = set(), []
    for job in jobs:
        if overwrite or not job.resumed or not job.output.exists():
            continue
        told = uns_of(job.output)
        reasons = differences(told) if told else ["it tells nothing of stimg"]
        if not reasons and changed_at(Path(job.slide)) > job.output.stat().st_mtime:
            reasons = ["the slide has changed since"]
        if reasons:
            others.append(f"{job.output.name} ({', '.join(reasons)})")
        else:
            done.add(job.output)
    if others:
        shown = "; ".join(others[:5]) + (f"; and {len(others) - 5} more" if len(others) > 5 else "")
        raise ValueError(
            f"{len(others)} outputs are there that were made otherwise: {shown}: name another --output, or make them "
            "anew with --overwrite."
        )
    return done


def uns_of(path: Path) -> dict[str, Any]:
    """`uns["stimg"]` of an .h5ad, without reading the rest; empty where there is none, or no .h5ad."""
    import h5py
    from anndata.io import read_elem

    from .keys import UNS

    try:
        with h5py.File(path, "r") as file:
            return dict(read_elem(file[f"uns/{UNS}"])) if f"uns/{UNS}" in file else {}
    except (OSError, KeyError, RuntimeError):  # no HDF5, or a damaged one
        return {}


def has_embedding(slide: str, key: str) -> bool:
    """Whether a slide is an .h5ad with an embedding in it, without reading the rest."""
    import h5py

    if not Path(slide).is_file() or not slide.lower().endswith(".h5ad"):
        return False
    try:
        with h5py.File(slide, "r") as file:
            return f"obsm/{key}" in file
    except (OSError, KeyError, RuntimeError):  # read_slide says what is wrong with it
        return False


def changed_at(slide: Path) -> float:
    """When a slide's file, or what lies in its folder, was last written, in seconds; 0 where there is none."""
    paths = [slide, *(slide.iterdir() if slide.is_dir() else ())]
    return max((path.stat().st_mtime for path in paths if path.is_file()), default=0.0)


@dataclass(frozen=True)
class Processes:
    """One of several processes that share the slides: `number` of them, this one the `rank`-th, on its `device`."""

    number: int = 1
    rank: int = 0
    device: str | None = None

    @property
    def first(self) -> bool:
        """Whether this is the one that reports."""
        return self.rank == 0

    def all_of(self, mine: list[Any]) -> list[Any]:
        """The items of all processes; waits for them."""
        if self.number == 1:
            return mine
        from accelerate.utils import gather_object

        return gather_object(mine)


def this_process(device: str | None) -> Processes:
    """Which process of those that `accelerate launch` (or torchrun) started this is; the only one, where none did."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Processes()
    import torch
    from accelerate import PartialState

    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=_PATIENCE)
    return Processes(state.num_processes, state.process_index, str(state.device))


def for_every_slide(jobs: Sequence[Job], work: Callable[[Job], str], processes: Processes, quiet: bool) -> None:
    """Do the work of this process' share of the slides; one that fails does not stop the others.

    Args:
        work: does one slide, and says what it did in a sentence.

    Raises:
        ValueError: some failed, with what was wrong with each; of a single slide its own error.
    """
    from tqdm.auto import tqdm

    from .writing import NoRoomError

    failures: list[str] = []
    mine = jobs[processes.rank :: processes.number]
    bar = tqdm(mine, "slides", unit="slide", disable=quiet or len(jobs) == 1 or not processes.first)
    for job in bar:
        try:
            told = work(job)
            if not quiet:
                tqdm.write(told, file=sys.stderr)
        except Exception as error:
            if len(jobs) == 1:
                raise
            if not isinstance(error, TOLD):
                traceback.print_exc()
            message = sentence(error) if isinstance(error, TOLD) else f"{type(error).__name__}: {sentence(error)}"
            failures.append(message if job.slide in message else f"{job.slide}: {message}")
            tqdm.write(f"failed: {failures[-1]}", file=sys.stderr)
            if isinstance(error, NoRoomError):  # nor will there be for the next one
                break
    bar.close()
    failures = processes.all_of(failures)
    if failures and processes.first:
        raise ValueError(f"{len(failures)} of {len(jobs)} slides failed: {'; '.join(failures)}")
    if failures:
        raise typer.Exit(2)


def hush(quiet: bool) -> None:
    """Switch off the progress bars of other libraries."""
    if quiet:
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils import logging

        disable_progress_bars()
        logging.disable_progress_bar()
