"""A fetched source -> its slides, whatever the layout it was published in.

The layouts differ in where counts and positions lie; all end in `read_slide`, so that the checks are the same. `h5ad`,
`cellxgene` and `zarr` are AnnData; `space_ranger` is an output folder as it is; `geo` and `mtx` are the files of such a
folder under other names, which `space_ranger_samples` puts in order.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import scipy.sparse as sp
from anndata import AnnData, read_zarr
from anndata.io import read_elem

from data_processing.sources import Source
from data_processing.space_ranger_samples import MATRIX, Sample, arrange, find_samples, link
from modeling_stimg import read_slide
from modeling_stimg.archives import gunzip, is_archive, unpack
from modeling_stimg.counts_stimg import check_counts
from modeling_stimg.parsing import check_sparse, read_h5ad_file, reading
from modeling_stimg.spatialdata_reading import check_arrays

ReadSlide = Callable[[], AnnData]
_ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip")
_MAX_NESTING = 3


def open_source(path: str | Path, source: Source, work_dir: str | Path) -> dict[str, ReadSlide]:
    """The slides of a source, each as `read_slide` gives it, read when it is called: never all in memory.

    Args:
        path: what was fetched: a file, an archive, or a folder of either.
        source: its row; `layout` says how to read, `member` which part of an archive is meant. A local file or folder
            without a layout is one that `read_slide` knows.
        work_dir: archives are unpacked and files put in order here. It may be kept, which saves unpacking again, or
            removed once the slides are read.

    Returns:
        By id: the source's own, or of a collection `id/folder` with the slide's place in it. A call raises ValueError,
        in one sentence that names the source's id, where the content is no slide of this layout; OSError where the
        disk is full, for example.

    Raises:
        FileNotFoundError: `path` does not exist. ValueError, OSError: as above.
    """
    path, work_dir = Path(path), Path(work_dir)
    if not path.exists():
        raise FileNotFoundError(f"{source.id}: {path} does not exist: fetch the source first.")
    with _naming(source.id):
        slides = _open(path, source, work_dir)
        if source.contents == "collection":
            return {f"{source.id}/{name}": _named(source.id, read) for name, read in slides.items()}
        if len(slides) > 1:
            names = ", ".join(list(slides)[:4])
            raise ValueError(f"holds {len(slides)} slides ({names}), not one: set contents to collection or name one")
        (read,) = slides.values()
        return {source.id: _named(source.id, read)}


def _open(path: Path, source: Source, work_dir: Path) -> dict[str, ReadSlide]:
    if not source.layout:
        if not source.is_local or source.member or source.contents == "collection":
            raise ValueError(f"its layout is not known: put one of {', '.join(_READERS)} into the manifest")
        return {source.id: partial(read_slide, path)}
    files = _of_member(_files(path, work_dir), source.member)
    scratch = work_dir / "arranged" / source.id
    if scratch.exists():
        shutil.rmtree(scratch)
    scratch.mkdir(parents=True)
    return _READERS[source.layout](files, scratch)


def _named(source_id: str, read: ReadSlide) -> ReadSlide:
    def read_named() -> AnnData:
        with _naming(source_id):
            return read()

    return read_named


def _read_h5ad_files(files: Mapping[str, Path], scratch: Path) -> dict[str, ReadSlide]:
    def read(path: Path, folder: Path) -> AnnData:
        return read_slide(_plain_h5ad(path, folder))

    return {
        name: partial(read, path, scratch / str(number))
        for number, (name, path) in enumerate(_h5ad_files(files).items())
    }


def _read_cellxgene(files: Mapping[str, Path], scratch: Path) -> dict[str, ReadSlide]:
    def read(name: str, path: Path, folder: Path) -> AnnData:
        path = _plain_h5ad(path, folder)
        adata = read_h5ad_file(path)
        with _naming(name):
            return read_slide(_raw_counts_in_tissue(adata))

    return {
        name: partial(read, name, path, scratch / str(number))
        for number, (name, path) in enumerate(_h5ad_files(files).items())
    }


def _read_space_ranger(files: Mapping[str, Path], scratch: Path) -> dict[str, ReadSlide]:
    outs: dict[str, Path] = {}
    for label, path in sorted(files.items()):
        folder, _, name = label.rpartition("/")
        real = path.parent
        if name in ("matrix.mtx", "matrix.mtx.gz") and real.name == MATRIX:
            folder, real = folder.rpartition("/")[0], real.parent
        elif name != f"{MATRIX}.h5":
            continue
        if (real / "spatial").is_dir():
            outs[folder] = real
    binned = [folder for folder in outs if "binned_outputs" in folder.split("/")]
    if binned:
        raise ValueError(f"holds Visium HD, one slide at several bin sizes ({', '.join(binned[:3])}): give one of them")
    if not outs:
        raise _nothing(files, f"Space Ranger folder, {MATRIX}.h5 or {MATRIX}/ beside spatial/")
    slides: dict[str, ReadSlide] = {}
    for folder, real in outs.items():
        _add(slides, folder.removesuffix("/outs") or "outs", partial(read_slide, real))
    return slides


def _read_geo(files: Mapping[str, Path], scratch: Path) -> dict[str, ReadSlide]:
    return _read_samples(files, scratch, with_h5=True)


def _read_mtx(files: Mapping[str, Path], scratch: Path) -> dict[str, ReadSlide]:
    return _read_samples(files, scratch, with_h5=False)


def _read_samples(files: Mapping[str, Path], scratch: Path, with_h5: bool) -> dict[str, ReadSlide]:
    samples = find_samples(files, with_h5)
    if not samples:
        expected = "matrix.mtx, features.tsv and barcodes.tsv"
        raise _nothing(files, f"{MATRIX}.h5, or {expected}" if with_h5 else expected)
    slides: dict[str, ReadSlide] = {}
    for number, sample in enumerate(samples):
        name = sample.name or "outs"
        _add(slides, name, partial(_read_sample, sample, name, scratch / str(number) / name.replace("/", "_")))
    return slides


def _read_sample(sample: Sample, name: str, folder: Path) -> AnnData:
    slide = read_slide(arrange(sample, folder))
    # Every slide has the same barcodes, so the positions of another one would fit as well, but not its tissue.
    outside = int((slide.obs["in_tissue"] != 1).sum())
    if sample.is_filtered and outside:
        raise ValueError(
            f"{outside} of {slide.n_obs} spots of {name} lie outside of the tissue by their positions, "
            "expected none: counts and positions are of two slides"
        )
    return slide


def _read_zarr(files: Mapping[str, Path], scratch: Path) -> dict[str, ReadSlide]:
    """Tables of SpatialData stores, or stores of one AnnData; one slide for each region that a table annotates."""
    tables = _zarr_tables(files)
    stores = [_zarr_store(label) for label in tables]
    for store in stores:
        if stores.count(store) > 1:
            several = [label for label in tables if _zarr_store(label) == store]
            raise ValueError(f"{store or 'the store'} has several tables ({', '.join(several[:3])}): name one of them")
    if not tables:
        raise _nothing(files, "zarr store with an AnnData in tables/")
    slides: dict[str, ReadSlide] = {}
    for (label, folder), store in zip(tables.items(), stores, strict=True):
        check_arrays(folder)
        name = store.removesuffix(".zarr") or "table"
        for region in _regions(folder, label):
            read = partial(_read_region, folder, label or folder.name, region)
            _add(slides, f"{name}/{region}" if region else name, read)
    return slides


def _regions(folder: Path, label: str) -> list[str]:
    """The sections that one table annotates, by name; [""] where it is one."""
    import zarr

    with reading(label or folder.name, "an AnnData in zarr"):
        store = zarr.open_group(folder, mode="r")
        obs, uns = read_elem(store["obs"]), read_elem(store["uns"]) if "uns" in store else {}
    key = _region_key(uns, obs)
    return [""] if key is None else [str(region) for region in obs[key].unique()]


def _region_key(uns: Mapping[str, Any], obs: pd.DataFrame) -> str | None:
    """The column that tells sections apart, None where there is one section."""
    key = (uns.get("spatialdata_attrs") or {}).get("region_key")
    return key if key in obs and obs[key].nunique() > 1 else None


def _read_region(folder: Path, label: str, region: str) -> AnnData:
    with reading(label, "an AnnData in zarr"):
        adata = read_zarr(folder)
        check_sparse(adata)
    if region:
        adata = adata[adata.obs[_region_key(adata.uns, adata.obs)].astype(str) == region].copy()
    with _naming(label):
        return read_slide(adata)


_READERS: dict[str, Callable[[Mapping[str, Path], Path], dict[str, ReadSlide]]] = {
    "h5ad": _read_h5ad_files,
    "cellxgene": _read_cellxgene,
    "space_ranger": _read_space_ranger,
    "geo": _read_geo,
    "mtx": _read_mtx,
    "zarr": _read_zarr,
}


def _add(slides: dict[str, ReadSlide], name: str, read: ReadSlide) -> None:
    if name in slides:
        raise ValueError(f"holds two slides called {name!r}: name one of them, or give each a folder")
    slides[name] = read


# Files of a source, by their paths in it


def _files(path: Path, work_dir: Path, nesting: int = 0) -> dict[str, Path]:
    """All files, by their paths below `path` with `/`; those of archives as if the archive were a folder."""
    if path.is_file():
        if not is_archive(path):
            return {path.name: path}
        key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:10]
        path = unpack(path, work_dir / "unpacked" / f"{path.name}-{key}")
    files: dict[str, Path] = {}
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        for name in sorted(names):
            file = Path(folder, name)
            label = file.relative_to(path).as_posix()
            suffix = next((s for s in _ARCHIVE_SUFFIXES if name.lower().endswith(s)), None)
            if suffix and nesting < _MAX_NESTING and is_archive(file):
                inner = _files(file, work_dir, nesting + 1)
                files |= {f"{label[: -len(suffix)]}/{inside}": of for inside, of in inner.items()}
            elif not name.startswith(".") or name.startswith(".z"):  # of hidden files only the metadata of zarr
                files[label] = file
    return files


def _of_member(files: dict[str, Path], member: str) -> dict[str, Path]:
    """The one file, or those of the folder, that `member` names, by their paths in it."""
    member = member.strip("/")
    if not member:
        return files
    if member in files:
        return {member.rpartition("/")[2]: files[member]}
    inside = {label[len(member) + 1 :]: path for label, path in files.items() if label.startswith(f"{member}/")}
    if not inside:
        raise _nothing(files, repr(member))
    return inside


def _h5ad_files(files: Mapping[str, Path]) -> dict[str, Path]:
    """The .h5ad files, some compressed, by name without suffix; a single file may have any name."""
    found = {label: path for label, path in files.items() if label.lower().endswith((".h5ad", ".h5ad.gz"))}
    if not found and len(files) == 1:
        found = dict(files)
    if not found:
        raise _nothing(files, ".h5ad file")
    result = {}
    for label, path in found.items():
        name = label.removesuffix(".gz").removesuffix(".h5ad")
        if name in result:
            raise ValueError(f"holds {name}.h5ad twice, once compressed: name one of them")
        result[name] = path
    return result


def _plain_h5ad(path: Path, folder: Path) -> Path:
    """The file, uncompressed and named .h5ad, in `folder` where it has to be made."""
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    if not is_gzip and path.suffix == ".h5ad":
        return path
    target = folder / f"{path.name.removesuffix('.gz').removesuffix('.h5ad')}.h5ad"
    folder.mkdir()
    gunzip(path, target) if is_gzip else link(path, target)
    return target


# CELLXGENE


def _raw_counts_in_tissue(adata: AnnData) -> AnnData:
    """A slide of the CELLXGENE schema: the spots under tissue, raw counts in X (of `.raw` where X holds others)."""
    spatial = adata.uns.get("spatial")
    if isinstance(spatial, Mapping) and "is_single" in spatial and not bool(spatial["is_single"]):
        raise ValueError('holds several sections (uns["spatial"]["is_single"] is False): split it into slides first')
    if "in_tissue" in adata.obs:
        inside = (pd.to_numeric(adata.obs["in_tissue"].astype(str), errors="coerce") == 1).to_numpy()
        if not inside.any():
            raise ValueError(f'obs["in_tissue"] is 1 at none of {adata.n_obs} spots: expected the spots under tissue')
        adata = adata if inside.all() else adata[inside].copy()
    if adata.raw is None or _is_counts(adata.X):
        return adata
    counts = adata.raw.to_adata()
    if "feature_name" in adata.var and "feature_name" not in counts.var and adata.var_names.is_unique:
        symbols = adata.var["feature_name"].astype(object).reindex(counts.var_names)
        counts.var["feature_name"] = symbols.where(symbols.notna(), counts.var_names)
    return counts


def _is_counts(values: Any) -> bool:
    try:
        check_counts(values.data if sp.issparse(values) else values)
    except ValueError:
        return False
    return True


# Zarr


def _zarr_tables(files: Mapping[str, Path]) -> dict[str, Path]:
    """Folders that hold an AnnData, by their paths."""
    tables = {}
    for label, path in files.items():
        if path.name not in (".zattrs", "zarr.json"):
            continue
        with reading(label, "JSON"):
            content = json.loads(path.read_text(encoding="utf-8"))
            attributes = content if path.name == ".zattrs" else content.get("attributes", {})
            if attributes.get("encoding-type") == "anndata":
                tables[label.rpartition("/")[0]] = path.parent
    return tables


def _zarr_store(label: str) -> str:
    """The SpatialData store that a table belongs to: what stands before tables/, or table/ in older ones."""
    parts = label.split("/")
    return "/".join(parts[:-2]) if len(parts) > 1 and parts[-2] in ("tables", "table") else label


# Errors


def _nothing(files: Mapping[str, Path], expected: str) -> ValueError:
    labels = sorted(files)
    shown = f"{', '.join(labels[:6]) or 'nothing'}{', ...' if len(labels) > 6 else ''}"
    return ValueError(f"holds no {expected}, but {shown}: correct layout or url in the manifest")


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Say of which source, or of which part of it, an error is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).rstrip('.')}.") from error
