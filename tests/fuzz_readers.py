r"""Damaged slides of every format, read until something else than a sentence comes of it.

    python tests/fuzz_readers.py --minutes 10 --seed 0 --keep runs/fuzz

Takes a valid file or folder of one of `KINDS`, damages it (`DAMAGES`), reads it as the command line does, and makes an
image of what is read. What comes of it is one of

- read: and what was read holds what `read_slide` promises;
- refused: an error that the command line tells in a sentence (`TOLD`);
- memory: refused because it asked for more than `MEMORY` bytes;
- HDF5: the HDF5 library hangs or crashes on a damaged file, within a call of h5py, where no reader can prevent it;
- a finding: any other error, a broken promise, more than `PATIENCE` seconds, or a crash of the process.

The input of the last two is kept in a folder, with what went wrong in `why.txt`. Case `number` of a seed is always the
same, whatever came before it: `--only NUMBER` reads it again. Exit status 1 where there are findings.
"""

import argparse
import contextlib
import faulthandler
import gzip
import io
import json
import multiprocessing as mp
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from slide_files import (
    SYMBOLS,
    annotating,
    legacy_names,
    make_slide,
    point,
    write_legacy,
    write_space_ranger,
    write_spatialdata,
)

from modeling_stimg import GeneVocabulary, STPatchProcessor, genes_stimg, read_slide
from modeling_stimg.cli_slides import TOLD, sentence

# Seconds. A damaged chunk of text in zarr may tell that it holds 500 million strings: they are waited for.
PATIENCE = 90.0
PATIENCE_WITH_HDF5 = 4.0  # where it is h5py that does not answer; undamaged, these files take milliseconds
MEMORY = 12 << 30  # bytes of address space, libraries included

# ---------------------------------------------------------------- valid slides of every kind


def _h5ad(convert: Callable[[sp.csr_matrix], Any], pixels_alone: bool = False) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        slide = make_slide()
        slide.X = convert(slide.X)
        if pixels_alone:
            rows, cols = np.divmod(np.arange(slide.n_obs), 3)
            slide.obs = slide.obs[["label"]]
            slide.obsm["spatial"] = np.stack([cols, rows], axis=1) * 100.0
        slide.write_h5ad(folder / "slide.h5ad")
        return folder / "slide.h5ad"

    return write


def _h5ad_of_layers(folder: Path) -> Path:
    """Counts in a layer and in `.raw`, normalised values in `X`."""
    slide = make_slide()
    slide.raw = slide.copy()
    slide.layers["counts"] = slide.X.copy()
    slide.X = slide.X * 0.5
    slide.write_h5ad(folder / "slide.h5ad", compression="gzip")
    return folder / "slide.h5ad"


def _space_ranger(matrix: str, positions: str = "tissue_positions.csv") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        from PIL import Image

        outs = write_space_ranger(folder / "outs", make_slide(), matrix, positions, proteins=2)
        scales = {"tissue_hires_scalef": 0.2, "spot_diameter_fullres": 90.5, "microns_per_pixel": 0.5}
        (outs / "spatial" / "scalefactors_json.json").write_text(json.dumps(scales))
        Image.new("RGB", (8, 8)).save(outs / "spatial" / "tissue_lowres_image.png")
        return outs

    return write


def _legacy(name: str, transposed: bool = False) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        slide = make_slide()
        spots = pd.DataFrame({"x": slide.obs["array_col"], "y": slide.obs["array_row"], "pixel_x": 1.5, "pixel_y": 2})
        spots.set_axis(legacy_names(slide)).to_csv(folder / "A1.spots.tsv", sep="\t")
        return write_legacy(folder / name, slide, transposed)

    return write


def _zarr(version: int) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        with anndata.settings.override(zarr_write_format=version):
            make_slide().write_zarr(folder / "slide.zarr")
        return folder / "slide.zarr"

    return write


def _spatialdata(folder: Path) -> Path:
    slide = make_slide()
    rows, cols = np.divmod(np.arange(slide.n_obs), 3)
    shapes = {
        "spots": (np.arange(slide.n_obs) + 100, [point(50.0 * x, 50.0 * y) for x, y in zip(cols, rows, strict=True)])
    }
    return write_spatialdata(folder / "slide.zarr", {"table": annotating(slide, "spots")}, shapes)


KINDS: dict[str, Callable[[Path], Path]] = {
    "h5ad CSR": _h5ad(sp.csr_matrix),
    "h5ad CSC": _h5ad(sp.csc_matrix),
    "h5ad dense": _h5ad(lambda counts: counts.toarray()),
    "h5ad pixels": _h5ad(sp.csr_matrix, pixels_alone=True),
    "h5ad layers": _h5ad_of_layers,
    "10x h5": _space_ranger("h5"),
    "10x h5, list": _space_ranger("h5", "tissue_positions_list.csv"),
    "10x h5, parquet": _space_ranger("h5", "tissue_positions.parquet"),
    "10x mtx": _space_ranger("mtx"),
    "10x mtx.gz": _space_ranger("mtx.gz"),
    "legacy": _legacy("A1.tsv"),
    "legacy turned": _legacy("A1.txt", transposed=True),
    "legacy gz": _legacy("A1.tsv.gz"),
    "zarr 2": _zarr(2),
    "zarr 3": _zarr(3),
    "spatialdata": _spatialdata,
}

# ---------------------------------------------------------------- damages: each changes a file in place

Rng = np.random.Generator
_WORDS = (
    "",
    "nan",
    "inf",
    "-1",
    "0.5",
    "1e999",
    "99999999999999999999",
    "x",
    "1x1",
    "é",
    "\x00",
    '"',
    "null",
    "[]",
    "-",
    " ",
)
_VALUES = (
    None,
    True,
    -1,
    0,
    1,
    0.5,
    10**6,
    10**12,
    2**63,
    "",
    "x",
    "1x1",
    [],
    [1],
    {},
    {"a": 1},
    [10**12],
    float("nan"),
)
_NUMBERS = (-1, 0, 1, 255, 2**31, 2**62, np.nan, np.inf, -np.inf, 0.5, 1e300)


def pick(rng: Rng, items: Any) -> Any:
    """One of the items, as it is."""
    return items[int(rng.integers(len(items)))]


def damage_bytes(path: Path, rng: Rng) -> None:
    """Bytes flipped, cut off, overwritten, moved, doubled or left out; within a gzip, sometimes of what it holds."""
    content = path.read_bytes()
    inside = path.suffix == ".gz" and rng.random() < 0.5
    with contextlib.suppress(OSError, EOFError, zlib.error):  # it was damaged before
        content = gzip.decompress(content) if inside else content
    raw = bytearray(content)
    if not raw:
        return
    start, length = int(rng.integers(len(raw))), int(rng.integers(1, 65))
    how = int(rng.integers(6))
    if how == 0:
        for place in rng.integers(len(raw), size=int(rng.integers(1, 9))):
            raw[place] ^= 1 << int(rng.integers(8))
    elif how == 1:
        del raw[start:]
    elif how == 2:
        raw[start : start + length] = pick(rng, (b"\x00", b"\xff", rng.bytes(1))) * len(raw[start : start + length])
    elif how == 3:
        other = int(rng.integers(len(raw)))
        raw[other : other + length] = raw[start : start + length]
    elif how == 4:
        raw[start:start] = raw[start : start + length]
    else:
        del raw[start : start + length]
    path.write_bytes(gzip.compress(bytes(raw)) if inside else bytes(raw))


def damage_text(path: Path, rng: Rng) -> None:
    """A line or a word of a text file changed, doubled or left out."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="latin-1", newline="") as file:
        lines = file.read().split("\n")
    place = int(rng.integers(len(lines)))
    how = int(rng.integers(4))
    if how == 0:
        del lines[place]
    elif how == 1:
        lines.insert(place, pick(rng, lines))
    else:
        separator = pick(rng, [mark for mark in "\t, :" if mark in lines[place]] or [" "])
        words = lines[place].split(separator)
        column = int(rng.integers(len(words)))
        words[column : column + 1] = [] if how == 2 and rng.random() < 0.3 else [pick(rng, _WORDS)]
        lines[place] = separator.join(words)
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        file.write("\n".join(lines))


def damage_json(path: Path, rng: Rng) -> None:
    """A value of a JSON file, at any depth, replaced or left out."""
    content = json.loads(path.read_text(encoding="utf-8"))
    holder, key, inner = {"": content}, "", content
    while isinstance(inner, dict | list) and inner and rng.random() < 0.8:
        holder, key = inner, pick(rng, list(inner) if isinstance(inner, dict) else range(len(inner)))
        inner = holder[key]
    if rng.random() < 0.2 and key != "":
        del holder[key]
    else:
        holder[key] = pick(rng, _VALUES)
    path.write_text(json.dumps(holder[""] if key == "" and "" in holder else content), encoding="utf-8")


def damage_hdf5(path: Path, rng: Rng) -> None:
    """An object of an HDF5 file left out, replaced, moved over another one, or with other values or attributes."""
    with h5py.File(path, "a") as file:
        names: list[str] = []
        file.visit(names.append)
        name = pick(rng, names)
        item, how = file[name], int(rng.integers(7))
        attributes = dict(item.attrs)
        if how == 0:
            del file[name]
        elif how == 1:
            del file[name]
            shape = pick(
                rng, ((), (0,), (1,), (6,), (9,), (9, 6), (6, 9), (9, 2), (10**12,), (10**6, 10**6), (3, 3, 3))
            )
            kind = pick(rng, ("i1", "i8", "u8", "f4", "f8", "c16", "S3", h5py.string_dtype(), "?"))
            chunks = tuple(min(side, 10) or 1 for side in shape) if shape else None
            made = file.create_dataset(name, shape, kind, chunks=chunks)
            made.attrs.update(attributes if rng.random() < 0.7 else {})
        elif how == 2 and attributes:
            key = pick(rng, list(attributes))
            del item.attrs[key]
            if rng.random() < 0.7:
                item.attrs[key] = pick(rng, [value for value in _VALUES if not isinstance(value, dict | type(None))])
        elif how == 3:
            other = pick(rng, names)
            if not (other.startswith(f"{name}/") or name.startswith(f"{other}/") or other == name):
                del file[name]
                file.copy(other, name)
        elif isinstance(item, h5py.Dataset) and item.size and item.dtype.kind in "iuf":
            place = np.unravel_index(int(rng.integers(item.size)), item.shape)
            value = pick(rng, _NUMBERS)
            with contextlib.suppress(OverflowError, ValueError):
                item[place] = value if item.dtype.kind == "f" else int(value)
        elif isinstance(item, h5py.Dataset) and item.size and item.dtype.kind in "OS":
            item[np.unravel_index(int(rng.integers(item.size)), item.shape)] = pick(rng, _WORDS).replace("\x00", "")


def damage_parquet(path: Path, rng: Rng) -> None:
    """A column of a Parquet file left out, or its values replaced; or the file's metadata gone."""
    import pyarrow as pa
    from pyarrow import parquet

    table = parquet.read_table(path)
    place = int(rng.integers(table.num_columns))
    name, how = table.column_names[place], int(rng.integers(4))
    if how == 0:
        table = table.drop_columns([name])
    elif how == 1:
        values = pick(rng, ([None], ["x"], [-1], [np.nan], [b"\x01\x02"], [2**62], [[1, 2]])) * table.num_rows
        table = table.set_column(place, name, pa.array(values))
    elif how == 2:
        table = table.take(rng.integers(table.num_rows, size=table.num_rows))
    else:
        table = table.replace_schema_metadata({b"geo": pick(rng, (b"{}", b"null", b"\xff", b'{"primary_column": 1}'))})
    parquet.write_table(table, path)


def damage_files(path: Path, rng: Rng) -> None:
    """The file is gone, empty, a folder, or another one of its neighbours."""
    how = int(rng.integers(4))
    neighbours = [other for other in path.parent.iterdir() if other.is_file() and other != path]
    path.unlink()
    if how == 1:
        path.touch()
    elif how == 2:
        path.mkdir()
    elif how == 3 and neighbours:
        shutil.copy(pick(rng, sorted(neighbours)), path)


def cut(path: Path, rng: Rng) -> None:
    """The end of a file is missing."""
    path.write_bytes(path.read_bytes()[: int(rng.integers(path.stat().st_size + 1))])


def _damages(path: Path, bytes_of_hdf5: bool) -> list[Callable[[Path, Rng], None]]:
    """Those that suit a file, by its name."""
    special = {
        ".h5": [damage_hdf5] * 3,
        ".h5ad": [damage_hdf5] * 3,
        ".parquet": [damage_parquet] * 2,
        ".json": [damage_json] * 3,
        ".csv": [damage_text] * 2,
        ".tsv": [damage_text] * 2,
        ".txt": [damage_text] * 2,
        ".mtx": [damage_text] * 2,
        ".gz": [damage_text],
    }
    if path.suffix in (".h5", ".h5ad") and not bytes_of_hdf5:
        return [cut, *special[path.suffix]]
    is_zarr = path.name in (".zarray", ".zattrs", ".zgroup", ".zmetadata")
    return [damage_bytes, damage_bytes, *([damage_json] * 3 if is_zarr else special.get(path.suffix, []))]


def damage(slide: Path, rng: Rng, bytes_of_hdf5: bool = True) -> None:
    """One to three damages of the files of a slide; those beside a file belong to it.

    Args:
        bytes_of_hdf5: whether HDF5 files are damaged byte by byte, too: the library may hang or crash then.
    """
    folder = slide if slide.is_dir() else slide.parent
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    steps = []
    for path in rng.permutation(np.array(files, dtype=object))[: int(rng.choice([1, 1, 1, 2, 3]))]:
        of_the_file = damage_files if rng.random() < 0.03 else pick(rng, _damages(path, bytes_of_hdf5))
        steps.append((of_the_file, path))
        if rng.random() < 0.2:
            steps.append((pick(rng, _damages(path, bytes_of_hdf5)), path))
    # Structures while there are some: HDF5 would hang or crash here, too.
    for change, path in sorted(steps, key=lambda step: step[0] in (damage_bytes, damage_files, cut)):
        with contextlib.suppress(OSError, ValueError, KeyError, RuntimeError, EOFError, TypeError):
            change(path, rng)


# ---------------------------------------------------------------- one case


@dataclass(frozen=True)
class Outcome:
    """What came of a case: "read", "refused", "memory", "HDF5" or "finding", and why."""

    what: str
    why: str = ""


@cache
def valid(kind: str) -> tuple[Path, str]:
    """A folder with a valid slide in it, and the name of the slide there."""
    folder = Path(tempfile.mkdtemp(prefix="stimg_fuzz_"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return folder, KINDS[kind](folder).relative_to(folder).as_posix()


@cache
def small_processor() -> STPatchProcessor:
    return STPatchProcessor(GeneVocabulary(list(make_slide().var_names), SYMBOLS), window_size=4, num_channels=4)


def make_case(kind: str, rng: Rng, folder: Path, bytes_of_hdf5: bool = True) -> tuple[Path, dict[str, Any]]:
    """A damaged slide in `folder`, and the options that it is read with."""
    whole, name = valid(kind)
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    damage(folder / name, rng, bytes_of_hdf5)
    layer = {"layer": "counts"} if kind == "h5ad layers" else {}
    options = pick(rng, ({}, {}, layer, {"bin_size": 50}, {"slide_key": "label"}))
    return folder / name, options


def read(slide: Path, options: dict[str, Any]) -> Outcome:
    """Read a slide as the command line does, and make an image of it."""
    matched, genes_stimg.MIN_MATCHED_GENES = genes_stimg.MIN_MATCHED_GENES, 1
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            adata = read_slide(slide, **options)
            broken = broken_promise(adata)
            if broken:
                return Outcome("finding", f"read, but {broken}")
            image = small_processor().slide_to_image(adata, on_duplicate="first")
            return Outcome("read") if np.isfinite(image.values).all() else Outcome("finding", "values are not finite")
    except MemoryError as error:
        return Outcome("memory", str(error))
    except TOLD as error:
        told = sentence(error)
        clear = len(told) > 20 and "Traceback" not in told
        return (
            Outcome("refused", told)
            if clear
            else Outcome("finding", f"says no more than {told!r}\n{traceback.format_exc()}")
        )
    except Exception:
        return Outcome("finding", traceback.format_exc())
    finally:
        genes_stimg.MIN_MATCHED_GENES = matched


def broken_promise(adata: anndata.AnnData) -> str:
    """What `read_slide` promises and does not hold; "" where it holds everything."""
    counts = adata.X
    if not isinstance(counts, sp.csr_matrix) or counts.shape != adata.shape or 0 in adata.shape:
        return f"X is a {type(counts).__name__} {getattr(counts, 'shape', '')} of {adata.shape}"
    if counts.nnz and (counts.indices.min() < 0 or counts.indices.max() >= counts.shape[1]):
        return "indices are out of bounds"
    if not np.isfinite(counts.data).all() or (counts.data < 0).any() or (counts.data != np.rint(counts.data)).any():
        return "X holds what is no count"
    if any(adata.obs[name].dtype != np.int64 for name in ("array_row", "array_col")):
        return "array positions are no int64"
    return ""


# ---------------------------------------------------------------- many cases, in a process that may crash


def rng_of(seed: int, number: int) -> Rng:
    return np.random.default_rng([seed, number])


def work(pipe: Connection, trace: Path) -> None:
    """Read the cases whose folders come through the pipe; where it hangs or crashes is written to `trace`."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    small_processor()
    with trace.open("w") as file:
        faulthandler.enable(file)
        pipe.send("ready")
        for slide, options in iter(pipe.recv, None):
            faulthandler.dump_traceback_later(PATIENCE_WITH_HDF5 - 1, repeat=True, file=file)
            outcome = read(slide, options)
            faulthandler.cancel_dump_traceback_later()
            pipe.send((outcome.what, outcome.why))


class Reader:
    """A process that reads slides; another one after it hung or crashed."""

    def __init__(self, trace: Path) -> None:
        self.trace, self.process = trace, None

    def start(self) -> None:
        self.pipe, other = mp.Pipe()
        self.process = mp.get_context("spawn").Process(target=work, args=(other, self.trace), daemon=True)
        self.process.start()
        other.close()
        self.pipe.recv()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def read(self, slide: Path, options: dict[str, Any]) -> Outcome:
        """What comes of a slide. What crashed is read again: a trace of a thread that runs may crash a process too."""
        outcome = self.read_once(slide, options)
        return self.read_once(slide, options) if "the process crashed" in outcome.why else outcome

    def read_once(self, slide: Path, options: dict[str, Any]) -> Outcome:
        if self.process is None:
            self.start()
        self.pipe.send((slide, options))
        try:
            for patience in (PATIENCE_WITH_HDF5, PATIENCE - PATIENCE_WITH_HDF5):
                if self.pipe.poll(patience):
                    return Outcome(*self.pipe.recv())
                if self.in_hdf5():
                    break
            why = "no answer"
        except (EOFError, ConnectionResetError):
            self.process.join(10)
            why = f"the process crashed (exit code {self.process.exitcode})"
        what = "HDF5" if self.in_hdf5() else "finding"
        trace = self.trace.read_text()
        self.stop()
        return Outcome(what, f"{trace}\n{why}" + (" of HDF5" if what == "HDF5" else ""))

    def in_hdf5(self) -> bool:
        """Whether the last that is known of the process is a call of h5py."""
        *_, last = ["", *re.split(r"(?:Current t|T)hread .*:\n", self.trace.read_text())]
        return "/h5py/" in last.strip().split("\n")[0]


def keep_finding(keep: Path, seed: int, number: int, kind: str, case: Path, options: dict[str, Any], why: str) -> Path:
    folder = keep / f"finding_{seed}_{number}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(case, folder)
    (folder / "why.txt").write_text(f"{kind}, seed {seed}, number {number}, read_slide(..., **{options})\n\n{why}\n")
    return folder


def cases(seed: int, minutes: float, only: int | None) -> Iterator[int]:
    if only is not None:
        yield only
        return
    end, number = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < end:
        yield number
        number += 1


def main(argv: list[str] | None = None) -> int:
    """Read damaged slides; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="How long.")
    parser.add_argument("--seed", type=int, default=0, help="Of the damages.")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="Folder for the inputs of findings.")
    parser.add_argument("--only", type=int, help="Read this case alone.")
    arguments = parser.parse_args(argv)
    counts = {kind: Counter() for kind in KINDS}
    reader = Reader(Path(tempfile.mkdtemp(prefix="stimg_fuzz_")) / "trace.txt")
    reasons: Counter[str] = Counter()
    number = -1
    for number in cases(arguments.seed, arguments.minutes, arguments.only):
        rng = rng_of(arguments.seed, number)
        kind = pick(rng, list(KINDS))
        with tempfile.TemporaryDirectory(prefix="stimg_case_") as folder:
            slide, options = make_case(kind, rng, Path(folder))
            outcome = reader.read(slide, options)
            counts[kind][outcome.what] += 1
            if outcome.what in ("finding", "HDF5"):
                last = outcome.why.strip().splitlines()[-1]
                reasons[last] += 1
                if reasons[last] <= 3:  # the same again and again says no more
                    keep_finding(arguments.keep, arguments.seed, number, kind, Path(folder), options, outcome.why)
                    print(f"{outcome.what} {number} ({kind}): {last}", flush=True)
            elif arguments.only is not None:
                print(f"{kind}: {outcome.what}: {outcome.why}")
    reader.stop()
    table = pd.DataFrame(counts, index=["read", "refused", "memory", "HDF5", "finding"]).T.fillna(0).astype(int)
    table.loc["all"] = table.sum()
    print(table.to_string())
    print(f"{number + 1:,} cases of seed {arguments.seed}" + (f"; see {arguments.keep}" if reasons else ""))
    return 1 if table.loc["all", "finding"] else 0


if __name__ == "__main__":
    sys.exit(main())
