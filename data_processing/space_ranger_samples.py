"""The files of Space Ranger outputs under any names -> Space Ranger folders that `read_slide` knows.

Authors deposit the files of many samples in one heap and tell them apart by what stands before the usual name, a prefix
or a folder: `GSM1_A_filtered_feature_bc_matrix.h5`, `GSM1_A_tissue_positions_list.csv.gz`, `A/spatial/...`. A sample is
a matrix; its other files are those that begin like it, and like no other matrix more.
"""

import gzip
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from modeling_stimg.archives import gunzip

MATRIX = "filtered_feature_bc_matrix"
_H5 = re.compile(rf"{MATRIX}\.h5(?:\.gz)?$")
_TRIPLE = re.compile(r"(matrix\.mtx|(?:features|genes)\.tsv|barcodes\.tsv)(?:\.gz)?$")
_SPATIAL = re.compile(
    r"(tissue_positions(?:_list)?\.(?:csv|parquet)|scalefactors_json\.json|tissue_(?:hires|lowres)_image\.png)(?:\.gz)?$"
)
_NEUTRAL = re.compile(r"(?:(?:outs|spatial)[/_.-])*")  # words that name no sample
_LAST_WORD = re.compile(r"[^/_.-]*[/_.-]+$|[^/_.-]+$")


@dataclass(frozen=True)
class Sample:
    """The files of one slide.

    Attributes:
        name: what stands before the names of its matrix, "" where nothing does.
        matrix: by their names in a Space Ranger folder; one HDF5 file, or matrix.mtx, features.tsv and barcodes.tsv.
        spatial: likewise, of the folder spatial/; positions are among them.
        is_filtered: whether the matrix says that it holds the spots under tissue alone.
    """

    name: str
    matrix: Mapping[str, Path]
    spatial: Mapping[str, Path]
    is_filtered: bool


def find_samples(files: Mapping[str, Path], with_h5: bool) -> list[Sample]:
    """The samples among `files` (by their paths in the deposit), sorted by name.

    Args:
        with_h5: take HDF5 matrices as well as those of three text files, and where there are both the HDF5.

    Raises:
        ValueError: a matrix that lacks a file of three, or without positions, or with several.
    """
    matrices = _triples(files)
    if with_h5:
        matrices |= {_H5.sub("", label): {f"{MATRIX}.h5": label} for label in files if _H5.search(label)}
    samples = []
    for prefix, matrix in sorted(matrices.items()):
        spatial = _spatial_of(prefix, list(matrices), sorted(files, key=lambda label: (len(label), label)))
        samples.append(
            Sample(
                name=prefix.strip("/_.-").removesuffix("/outs"),
                matrix={name: files[label] for name, label in matrix.items()},
                spatial={name: files[label] for name, label in spatial.items()},
                is_filtered=any(MATRIX in label for label in matrix.values()),
            )
        )
    return samples


def arrange(sample: Sample, outs: Path) -> Path:
    """Make the Space Ranger folder `outs` of a sample, by links where the files can stay as they are.

    Raises:
        ValueError: a `.gz` file that is damaged.
    """
    (outs / "spatial").mkdir(parents=True)
    for name, path in sample.spatial.items():
        _place(path, outs / "spatial" / name)
    if f"{MATRIX}.h5" in sample.matrix:
        _place(sample.matrix[f"{MATRIX}.h5"], outs / f"{MATRIX}.h5")
        return outs
    (outs / MATRIX).mkdir()
    for name, path in sample.matrix.items():
        if name == "features.tsv":
            _write_features(path, outs / MATRIX / name)
        else:  # these may stay compressed
            link(path, outs / MATRIX / (f"{name}.gz" if _is_gzip(path) else name))
    return outs


def link(path: Path, target: Path) -> None:
    """`target` as a link to `path`, or as a copy where the file system knows no links."""
    try:
        target.symlink_to(path.resolve())
    except (OSError, NotImplementedError):
        shutil.copyfile(path, target)


def _triples(files: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """By prefix of the sample: labels of matrix.mtx, features.tsv and barcodes.tsv. Unfiltered ones are left out."""
    found: dict[str, dict[str, str]] = {}
    for label in files:
        match = _TRIPLE.search(label)
        if match and "raw_feature_bc_matrix" not in label:
            name = "features.tsv" if match[1] == "genes.tsv" else match[1]
            found.setdefault(label[: match.start()], {})[name] = label
    triples: dict[str, dict[str, str]] = {}
    for prefix, triple in found.items():
        if "matrix.mtx" not in triple:
            continue
        missing = {"features.tsv", "barcodes.tsv"} - set(triple)
        if missing:
            raise ValueError(f"{triple['matrix.mtx']} has no {min(missing)} beside it: all three files are needed")
        triples[re.sub(rf"{MATRIX}[/_.-]*$", "", prefix)] = triple
    return triples


def _spatial_of(prefix: str, prefixes: list[str], labels: list[str]) -> dict[str, str]:
    """The files of spatial/, by name, of the matrix with this prefix.

    They begin like the matrix. Where no positions do, less of the prefix will do, word by word, as long as no other
    matrix begins in the same way, and nothing else names a sample: the counts of A/counts/ lie at the positions of
    A/spatial/, but not at those of A/other/spatial/.
    """
    for start in _shortened(prefix):
        rivals = [other for other in prefixes if other != prefix and other.startswith(start)]
        if rivals and start != prefix:
            break
        mine: dict[str, list[str]] = {}
        for label in labels:
            match = _SPATIAL.search(label)
            if not match or not label.startswith(start) or any(label.startswith(rival) for rival in rivals):
                continue
            if start == prefix or _NEUTRAL.fullmatch(label[len(start) : match.start()]):
                mine.setdefault(match[1], []).append(label)
        positions = [label for name in mine if name.startswith("tissue_positions") for label in mine[name]]
        if len(positions) > 1:
            raise ValueError(f"{prefix}{MATRIX} has several files of positions ({', '.join(positions[:3])}): leave one")
        if positions:
            return {name: of_name[0] for name, of_name in mine.items()}  # of images the one with the shortest path
    raise ValueError(
        f"no tissue_positions file begins like the matrix {prefix + '...'!r} and like no other: "
        "counts need the positions of their slide"
    )


def _shortened(prefix: str) -> Iterator[str]:
    """The prefix, and what is left of it without its last word, and so on: GSM1_A_, GSM1_, nothing."""
    yield prefix
    while prefix:
        prefix = _LAST_WORD.sub("", prefix)
        yield prefix


def _place(path: Path, target: Path) -> None:
    """A file that has to be there uncompressed."""
    if _is_gzip(path):
        gunzip(path, target)
    else:
        link(path, target)


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _write_features(path: Path, target: Path) -> None:
    """Three columns (id, symbol, type): genes.tsv of older versions has two, some have one."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if _is_gzip(path) else path.open(encoding="utf-8") as file:
            rows = [line.rstrip("\r\n").split("\t") for line in file]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or no table of genes ({error}): fetch it again") from error
    with target.open("w", encoding="utf-8") as file:
        for row in rows:
            row = (
                [*row, *row[-1:], "Gene Expression"] if len(row) == 1 else [*row[:2], *(row[2:] or ["Gene Expression"])]
            )
            file.write("\t".join(row) + "\n")
