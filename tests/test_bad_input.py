"""Every mistake that a user of `stimg` can make: one sentence, exit status 2, and nothing written."""

import json
import os
import pickle
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import scipy.sparse as sp
from anndata import AnnData
from command_line import little_room, stimg
from slide_files import (
    MATRIX,
    make_slide,
    position_table,
    write_legacy,
    write_positions,
    write_space_ranger,
    write_spatialdata,
)

from modeling_stimg import STImageMAEModel, STPatchProcessor, inspection, parsing

Build = Callable[["Bench"], Path]
HUGE = 10**12


@dataclass
class Bench:
    """Where a case makes its bad input.

    Attributes:
        place: an empty folder. out: the folder for outputs, in which a file lies already. good: a slide that is read,
            embedded already. model: a model that embeds it.
    """

    place: Path
    out: Path
    good: Path
    model: Path

    def slide(self) -> AnnData:
        return anndata.read_h5ad(self.good)


@dataclass(frozen=True)
class Case:
    """A mistake: how to make the input, the command, and what the sentence says.

    `{bad}`: what `build` made; `{in}`, `{out}`, `{good}`, `{model}`: as in `Bench`. `around`: what happens meanwhile.
    """

    build: Build
    says: str
    words: str = "embed {bad} --model {model} --output {out}/x.h5ad"
    status: int = 2
    around: Callable[[], AbstractContextManager] = ExitStack


# ---------------------------------------------------------------- how bad input is made


def good(bench: Bench) -> Path:
    return bench.good


def slide_with(change: Callable[[AnnData], AnnData | None]) -> Build:
    """An .h5ad of the good slide after `change`, which may give another."""

    def build(bench: Bench) -> Path:
        adata = bench.slide()
        changed = change(adata)
        path = bench.place / "slide.h5ad"
        (adata if changed is None else changed).write_h5ad(path)
        return path

    return build


def setting(**fields: Any) -> Build:
    """The good slide with `X`, `obs`, `obsm`, ... set to what these functions make of the slide."""

    def change(adata: AnnData) -> None:
        for name, value in fields.items():
            setattr(adata, name, value(adata))

    return slide_with(change)


def without_positions(adata: AnnData) -> None:
    adata.obs = adata.obs[["label"]].set_axis([f"spot_{i}" for i in range(adata.n_obs)])
    del adata.obsm["spatial"]


def with_pixels(pixels: Callable[[int], Any]) -> Build:
    """Pixel positions and no array."""

    def change(adata: AnnData) -> None:
        without_positions(adata)
        adata.obsm["spatial"] = pixels(adata.n_obs)

    return slide_with(change)


def one_value(value: float) -> Build:
    """One of the counts is `value`."""

    def change(adata: AnnData) -> None:
        adata.X.data[7] = value

    return slide_with(change)


def with_column(name: str, values: Callable[[AnnData], Any]) -> Build:
    return slide_with(lambda adata: adata.obs.__setitem__(name, values(adata)))


def called(name: Callable[[int], str]) -> Build:
    return setting(var_names=lambda adata: [name(i) for i in range(adata.n_vars)])


def in_file(name: str, content: str | bytes) -> Build:
    def build(bench: Bench) -> Path:
        path = bench.place / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return build


def cut(build: Build, share: float, inside: str = "") -> Build:
    """What `build` makes, of which a file keeps this share of its bytes."""

    def shorter(bench: Bench) -> Path:
        path = build(bench)
        shutil.copy(path, bench.place / path.name) if path == bench.good else None
        whole = bench.place / path.name / inside if inside else bench.place / path.name
        whole.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
        return bench.place / path.name

    return shorter


def edited_h5(build: Build, edit: Callable[[h5py.File], None], inside: str = "") -> Build:
    def build_and_edit(bench: Bench) -> Path:
        path = build(bench)
        if path == bench.good:
            path = Path(shutil.copy(path, bench.place / "slide.h5ad"))
        with h5py.File(path / inside if inside else path, "a") as file:
            edit(file)
        return path

    return build_and_edit


def claims(name: str, shape: tuple[int, ...]) -> Callable[[h5py.File], None]:
    """A dataset is replaced by one that holds nothing and says that it has this shape."""

    def edit(file: h5py.File) -> None:
        dtype, attributes = (
            (file[name].dtype, dict(file[name].attrs)) if isinstance(file[name], h5py.Dataset) else ("f4", {})
        )
        del file[name]
        file.create_dataset(name, shape, dtype, chunks=tuple(min(side, 100) for side in shape))
        file[name].attrs.update(attributes or {"encoding-type": "array", "encoding-version": "0.2.0"})

    return edit


def outs(matrix: str = "h5", change: Callable[[Path], None] = lambda _outs: None, **options: Any) -> Build:
    """A Space Ranger folder after `change`."""

    def build(bench: Bench) -> Path:
        folder = write_space_ranger(bench.place / "outs", make_slide(), matrix, **options)
        change(folder)
        return folder

    return build


def positions_file(change: Callable[[Any], Any]) -> Build:
    table = position_table(make_slide())
    return outs(change=lambda folder: write_positions(folder / "spatial" / "tissue_positions.csv", change(table)))


def lists_for_barcodes(folder: Path) -> None:
    path = folder / "spatial" / "tissue_positions.parquet"
    table = pd.read_parquet(path)
    table.assign(barcode=[[barcode] for barcode in table["barcode"]]).to_parquet(path)


def two_genomes(bench: Bench) -> Path:
    adata = bench.slide()
    adata.var_names = [f"{'GRCh38_' if i % 2 else 'mm10___'}{name}" for i, name in enumerate(adata.var_names)]
    adata.write_h5ad(bench.place / "slide.h5ad")
    return bench.place / "slide.h5ad"


def store(change: Callable[[Path], None]) -> Build:
    """A SpatialData store after `change`."""

    def build(bench: Bench) -> Path:
        path = write_spatialdata(bench.place / "slide.zarr", {"table": make_slide()})
        change(path)
        return path

    return build


def array_metadata(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Every array of a store after `edit` of its metadata."""

    def change(path: Path) -> None:
        for file in [*path.rglob("zarr.json"), *path.rglob(".zarray")]:
            content = json.loads(file.read_text())
            if "shape" in content:
                edit(content)
                file.write_text(json.dumps(content))

    return change


def unknown_codec(metadata: dict[str, Any]) -> None:
    metadata.update({"compressor": {"id": "pickle"}} if "compressor" in metadata else {"codecs": [{"name": "pickle"}]})


def claims_much(metadata: dict[str, Any]) -> None:
    metadata["shape"] = [HUGE] * len(metadata["shape"])


class Evil:
    """What unpickling it does would be seen."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.abort, ()


def model_with(change: Callable[[Path], None]) -> Build:
    """A copy of the model after `change`."""

    def build(bench: Bench) -> Path:
        change(Path(shutil.copytree(bench.model, bench.place / "model")))
        return bench.place / "model"

    return build


def in_json(name: str, **fields: Any) -> Build:
    """The model with other values in one of its files."""

    def change(folder: Path) -> None:
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **fields}))

    return model_with(change)


def weights(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Build:
    def rewrite(folder: Path) -> None:
        path = folder / "model.safetensors"
        safetensors.numpy.save_file(change(safetensors.numpy.load_file(path)), path, metadata={"format": "pt"})

    return model_with(rewrite)


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def encoder_alone(folder: Path) -> None:
    STImageMAEModel.from_pretrained(folder).save_pretrained(folder)


# ---------------------------------------------------------------- what happens meanwhile


@contextmanager
def instead(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """`function(original, ...)` in the place of a function or a method."""
    original = getattr(owner, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, lambda *arguments, **options: function(original, *arguments, **options))
        yield


def then_ctrl_c(original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    result = original(*arguments, **options)
    os.kill(os.getpid(), signal.SIGINT)
    return result


def out_of_memory(_original: Callable[..., Any], *_arguments: Any, **_options: Any) -> Any:
    raise MemoryError("Unable to allocate 7.28 TiB for an array")


def ctrl_c_after(owner: Any, name: str) -> Callable[[], AbstractContextManager]:
    return lambda: instead(owner, name, then_ctrl_c)


# ---------------------------------------------------------------- the table

INSPECT = "inspect {bad}"
EMBED_GOOD = "embed {good} --model {model} --output {out}/x.h5ad"
WITH_MODEL = "embed {good} --model {bad} --output {out}/x.h5ad"
DOMAINS = "domains {good} --output {out}/x.h5ad"
RECONSTRUCT = "reconstruct {good} --model {model} --output {out}/x.tsv --spots core"
INTERRUPTED = "interrupted: no half-written file is left"
DAMAGED = "is damaged, cut short or not"
# What to do is said in one of these words.
ADVICE = re.compile(
    r"\b(pass|give|take|name|add|make|fetch|download|expected|see|keep|leave|try|looked for|ask|must be|reads|needs|"
    r"not read)\b"
)

CASES = {
    # ---------------- counts and genes
    "normalised": Case(setting(X=lambda a: a.X * 0.5), r"X holds non-integers \(max .*pass raw counts"),
    "negative": Case(one_value(-1), r"X holds negative values \(min -1\): pass raw counts"),
    "NaN": Case(one_value(np.nan), "X holds 1 NaN or infinite values: pass raw counts"),
    "infinite": Case(one_value(np.inf), "X holds 1 NaN or infinite values: pass raw counts", INSPECT),
    "counts in another layer": Case(
        setting(layers=lambda a: {"umi": a.X.copy()}, X=lambda a: a.X * 0.5), r'pass layer="umi"', INSPECT
    ),
    "no gene matched": Case(called(lambda i: f"FOREIGN{i}"), r"matched 0 of 120 genes .*at least 50 genes and 5%"),
    "too few genes": Case(
        called(lambda i: f"PHANTOM{i:04d}" if i < 49 else f"FOREIGN{i}"), r"matched 49 of 120 genes .* name genes by"
    ),
    "mouse ids": Case(
        called(lambda i: f"ENSMUSG{i:011d}"),
        "genes of the mouse, and the model knows human ones: take a model of mouse",
    ),
    "mouse symbols": Case(
        called(lambda i: f"Actb{i}"), "look like genes of the mouse", "inspect {bad} --model {model}"
    ),
    "two genomes": Case(two_genomes, r"start with a genome \(GRCh38, mm10\): keep the genes of one genome"),
    "no spots": Case(slide_with(lambda a: a[:0].copy()), r"slide is empty \(0 spots, 120 genes\): pass one"),
    "no genes": Case(
        slide_with(lambda a: a[:, :0].copy()), r"slide is empty \(\d+ spots, 0 genes\): pass one", INSPECT
    ),
    # ---------------- positions
    "no positions": Case(slide_with(without_positions), r'no array positions: looked for .*add obs\["array_row"\]'),
    "text as position": Case(
        with_column("array_row", lambda _a: "left"), r'obs\["array_row"\] holds \d+ values .*the first: left at spot'
    ),
    "NaN as position": Case(
        with_column("array_col", lambda a: np.where(a.obs["array_col"] == 3, np.nan, 1.0)), "no finite number", INSPECT
    ),
    "infinite position": Case(with_column("array_col", lambda _a: np.inf), "give every spot its position, or leave"),
    "position beyond integers": Case(with_column("array_col", lambda _a: 1e300), "no finite number .*1e.300 at spot"),
    "pixels that are text": Case(
        with_pixels(lambda n: np.array([["a", "b"]] * n)), r'obsm\["spatial"\] is a .*: expected numbers', INSPECT
    ),
    "one pixel column": Case(with_pixels(lambda n: np.arange(n)[:, None]), r"shape \(\d+, 1\): expected numbers"),
    "pixels that are NaN": Case(with_pixels(lambda n: np.full((n, 2), np.nan)), "pixel coordinates that are no finite"),
    "cells": Case(
        with_pixels(lambda n: np.random.default_rng(0).random((n, 2)) * 1e4), "no regular array .*bin_size=50"
    ),
    "all spots on one site": Case(
        setting(obs=lambda a: a.obs.assign(array_row=3, array_col=4)),
        r"all \d+ spots stand on one array position, row 3 and column 4: give every spot",
    ),
    "coordinates as array positions": Case(
        setting(obs=lambda a: a.obs.assign(array_row=np.arange(a.n_obs) * 91, array_col=np.arange(a.n_obs) * 97)),
        r"make a grid of [\d,]+ x [\d,]+ sites: expected rows and columns of an array; .*--bin-size 50",
        "inspect {bad} --compaction minmax",
    ),
    # ---------------- files
    "missing file": Case(good, r"gone\.h5ad does not exist: read_slide reads", "inspect {in}/gone.h5ad"),
    "text called .h5ad": Case(in_file("slide.h5ad", "no slide"), f"slide.h5ad {DAMAGED} an .h5ad file .*: fetch or"),
    "pickle called .h5ad": Case(in_file("slide.h5ad", pickle.dumps(Evil())), f"{DAMAGED} an .h5ad file"),
    "empty .h5ad": Case(in_file("slide.h5ad", ""), f"{DAMAGED} an .h5ad file", INSPECT),
    **{f"h5ad cut at {share:.0%}": Case(cut(good, share), DAMAGED, INSPECT) for share in (0.02, 0.3, 0.6, 0.99)},
    "CSR indices out of bounds": Case(
        edited_h5(good, lambda file: file["X/indices"].__setitem__(0, 5000)),
        rf"slide.h5ad {DAMAGED} an .h5ad file \(X: indices must be",
    ),
    # Either of these two crashed the process.
    "CSR that ends in nothing": Case(
        edited_h5(good, lambda file: file["X/indptr"].__setitem__(-1, 0)),
        r"X: indptr must be a non-decreasing",
        INSPECT,
    ),
    "10x indices out of bounds": Case(
        edited_h5(outs(proteins=2), lambda file: file["matrix/indices"].__setitem__(0, 10**9), f"{MATRIX}.h5"),
        f"{DAMAGED} a 10x count matrix .indices must be",
        INSPECT,
    ),
    "h5ad that says it holds terabytes": Case(
        edited_h5(good, claims("X", (HUGE, HUGE))), r"says that it holds 4\.0e\+24 bytes, and has"
    ),
    "unknown kind of file": Case(in_file("slide.csv", "a,b"), "unknown kind of slide: read_slide reads", INSPECT),
    "matrix without its folder": Case(
        in_file(f"{MATRIX}.h5", ""), "counts without positions: pass the Space Ranger folder", INSPECT
    ),
    "folder of something else": Case(
        lambda b: b.place, "not a Space Ranger output folder: .*found nothing: pass", INSPECT
    ),
    "no matrix": Case(
        outs(change=lambda f: (f / f"{MATRIX}.h5").unlink()), "not a Space Ranger output folder: looked for", INSPECT
    ),
    "no positions file": Case(
        outs(change=lambda f: (f / "spatial" / "tissue_positions.csv").unlink()),
        "holds no positions: looked for tissue_positions.csv, .*, add one of them",
        INSPECT,
    ),
    **{
        f"10x matrix cut at {share:.0%}": Case(
            cut(outs(), share, f"{MATRIX}.h5"), f"{DAMAGED} a 10x count matrix", INSPECT
        )
        for share in (0.1, 0.5, 0.95)
    },
    "10x matrix that says it holds terabytes": Case(
        edited_h5(outs(), claims("matrix/data", (HUGE,)), f"{MATRIX}.h5"), "says that it holds 4.0e.12 bytes", INSPECT
    ),
    "matrix.mtx that says it holds terabytes": Case(
        outs(
            "mtx",
            lambda f: (f / MATRIX / "matrix.mtx").write_text(
                f"%%MatrixMarket matrix coordinate integer general\n6 9 {HUGE}\n1 1 1\n"
            ),
        ),
        "says that it holds 1,000,000,000,000 entries",
        INSPECT,
    ),
    "matrix.mtx with bytes of 0": Case(
        outs(
            "mtx",
            lambda f: (f / MATRIX / "matrix.mtx").write_bytes(
                (f / MATRIX / "matrix.mtx").read_bytes().rstrip() + bytes(40)
            ),
        ),
        r"is damaged, cut short or not a 10x count matrix \(bytes of 0 among its numbers\)",
        INSPECT,
    ),
    "matrix.mtx of another shape": Case(
        outs(
            "mtx",
            lambda f: (f / MATRIX / "matrix.mtx").write_text(
                f"%%MatrixMarket matrix coordinate integer general\n{HUGE} 9 1\n1 1 1\n"
            ),
        ),
        "1000000000000 x 9 counts for 6 features and 9 barcodes",
        INSPECT,
    ),
    "gzipped barcodes cut short": Case(cut(outs("mtx.gz"), 0.5, f"{MATRIX}/barcodes.tsv.gz"), DAMAGED, INSPECT),
    "lists for barcodes": Case(
        outs(positions="tissue_positions.parquet", change=lists_for_barcodes),
        "9 of 9 barcodes of the matrix have no position .*: counts and spatial/ must be of one Space Ranger run",
        INSPECT,
    ),
    "barcodes that disagree": Case(
        positions_file(lambda table: table.assign(barcode=table["barcode"].str.lower())),
        "9 of 9 barcodes of the matrix have no position .*: counts and spatial/ must be of one Space Ranger run",
        INSPECT,
    ),
    "barcode with two positions": Case(
        positions_file(lambda table: table.iloc[[0, *range(len(table))]]),
        "more than once: give each barcode one",
        INSPECT,
    ),
    "positions without a column": Case(
        positions_file(lambda table: table.drop(columns="array_col")),
        f"tissue_positions.csv {DAMAGED} spot positions",
        INSPECT,
    ),
    "text among the positions": Case(
        positions_file(lambda table: table.assign(array_row="x")), r'obs\["array_row"\] holds 9 values', INSPECT
    ),
    "infinite pixel": Case(
        positions_file(lambda table: table.assign(pxl_col_in_fullres=np.inf)),
        "pxl_col_in_fullres holds 9 values",
        INSPECT,
    ),
    "scale factors that are none": Case(
        outs(change=lambda f: (f / "spatial" / "scalefactors_json.json").write_text("[1]")),
        "holds a list: expected scale factors by name",
        INSPECT,
    ),
    "legacy table of text": Case(in_file("t.tsv", "\tACTB\n1x1\tmany\n"), "'many' where a count was expected", INSPECT),
    "legacy table without spots": Case(
        in_file("t.tsv", "\tA\tB\nx\t1\t2\n"), "neither all rows .* are spots named XxY such as 10x13, name", INSPECT
    ),
    "legacy table with an empty header": Case(in_file("t.tsv", "\n1x1\t1\t2\n"), f"{DAMAGED} a legacy ST", INSPECT),
    "legacy table that is not UTF-8": Case(
        in_file("t.tsv", "\tGÈNE\n1x1\t1\n".encode("latin-1")), f"{DAMAGED} a legacy ST count table .*utf-8", INSPECT
    ),
    "gzipped legacy table cut short": Case(
        cut(lambda b: write_legacy(b.place / "t.tsv.gz", make_slide()), 0.7), f"{DAMAGED} a legacy ST", INSPECT
    ),
    "gzip that is none": Case(in_file("t.tsv.gz", "\tA\n1x1\t1\n"), f"{DAMAGED} a legacy ST", INSPECT),
    "store without a table": Case(
        store(lambda path: shutil.rmtree(path / "tables")), "the store holds no table of counts: looked for", INSPECT
    ),
    "store with an unknown codec": Case(
        store(array_metadata(unknown_codec)), "asks for the codec 'pickle', which", INSPECT
    ),
    "store that says it holds terabytes": Case(store(array_metadata(claims_much)), "says that it holds", INSPECT),
    # ---------------- how slides are to be read
    "unknown layer": Case(good, "there is no layer 'umi': expected one of X", "inspect {good} --layer umi"),
    "unknown slide key": Case(
        good, "no column 'sample' of slides: expected one of", f"{EMBED_GOOD} --slide-key sample"
    ),
    "bins of nothing": Case(good, "bin_size is 0.0: expected a positive number", "inspect {good} --bin-size 0"),
    "bins of no number": Case(good, "bin_size is nan: expected a positive number", f"{EMBED_GOOD} --bin-size nan"),
    "one bin for all": Case(good, "lie in one bin of 1e.06 um: give positions", f"{EMBED_GOOD} --bin-size 1000000"),
    "bins without end": Case(
        good, "would make a grid of .* Then give microns_per_pixel", "inspect {good} --bin-size 1e-9"
    ),
    "scale without bins": Case(good, "given without bin_size", "inspect {good} --microns-per-pixel 2"),
    # ---------------- models
    "no such model": Case(good, "There is no model folder", "embed {good} --model ./nowhere --output {out}/x.h5ad"),
    "empty model folder": Case(lambda b: b.place, "holds no preprocessor_config.json: expected a model", WITH_MODEL),
    "damaged config": Case(
        model_with(lambda f: (f / "config.json").write_text("{")), "holds no config .*: download the model", WITH_MODEL
    ),
    "config of wrong values": Case(in_json("config.json", hidden_size="wide"), "hidden_size", WITH_MODEL),
    "config of another width": Case(
        in_json("config.json", hidden_size=64),
        r"do not fit its config\.json in \d+ places .*: download or copy",
        WITH_MODEL,
    ),
    "model of another kind": Case(
        in_json("config.json", model_type="bert"), "type 'bert' .*: expected 'st_image", WITH_MODEL
    ),
    "damaged processor": Case(
        model_with(lambda f: (f / "preprocessor_config.json").write_text("{")), "preprocessor_config.json", WITH_MODEL
    ),
    "processor of wrong values": Case(
        in_json("preprocessor_config.json", window_size="wide"), "window_size is 'wide': expected a whole", WITH_MODEL
    ),
    "genes of another model": Case(
        in_json("genes.json", gene_names=["A"] * 120), "not the file that the processor was saved with", WITH_MODEL
    ),
    "weights cut short": Case(model_with(cut_weights), "is damaged or cut off at .* download or copy it", WITH_MODEL),
    "pickled weights alone": Case(
        model_with(pickled_weights), "only pytorch_model.bin, .*safetensors alone", WITH_MODEL
    ),
    "weights that are missing": Case(
        weights(lambda tensors: {name: tensors[name] for name in list(tensors)[::2]}),
        r"lacks \d+ weights \(e\.g\. ",
        WITH_MODEL,
    ),
    "encoder alone": Case(
        model_with(encoder_alone),
        r"lacks \d+ weights of its decoder \(e\.g\. .*STImageMAEForPreTraining",
        "reconstruct {good} --model {bad} --output {out}/x.tsv --spots core",
    ),
    "revision of a folder": Case(good, "is a folder and has no revision 'v1'", f"{EMBED_GOOD} --revision v1"),
    # ---------------- outputs
    "no folder for the output": Case(
        good, "does not exist: make it first", "embed {good} --model {model} --output {out}/no/x.h5ad"
    ),
    "output below a file": Case(
        good, "is a file: name a place in a folder", "embed {good} --model {model} --output {out}/kept.txt/x.h5ad"
    ),
    "table in no folder": Case(good, "does not exist: make it first", "inspect {good} --table {out}/no/t.tsv"),
    "table that is a folder": Case(good, "a folder: expected a file name", "inspect {good} --table {out}"),
    "table over the slide": Case(
        slide_with(lambda _a: None), "would be overwritten: name another", "inspect {bad} --table {bad}"
    ),
    "output over the slide": Case(
        slide_with(lambda _a: None), "would be overwritten: name another", "embed {bad} --model {model} --output {bad}"
    ),
    "prediction over the slide": Case(
        slide_with(lambda _a: None),
        "would be overwritten: name another",
        "reconstruct {bad} --model {model} --output {in}/slide.h5ad --spots core",
    ),
    "prediction into a folder": Case(good, "expected a file name that ends in", RECONSTRUCT.replace("/x.tsv", "")),
    "prediction of another kind": Case(
        good, r"ends in \.tsv, \.tsv\.gz or \.h5ad", RECONSTRUCT.replace("x.tsv", "x.csv")
    ),
    "output of another kind": Case(good, r"a file name that ends in \.h5ad", EMBED_GOOD.replace("x.h5ad", "x.csv")),
    "map of no kind": Case(good, "map is no image file name: expected one", f"{EMBED_GOOD} --plot {{out}}/map"),
    "full disk: a slide": Case(
        good,
        r"could not be written, .* \(EFBIG\): make room",
        f"{DOMAINS} --n-domains 3",
        around=lambda: little_room(20_000),
    ),
    "full disk: a table": Case(
        good,
        r"could not be written, .* \(EFBIG\): make room",
        "inspect {good} --table {out}/t.tsv",
        around=lambda: little_room(10),
    ),
    "full disk: a prediction": Case(
        good, r"could not be written, .* \(EFBIG\): make room", RECONSTRUCT, around=lambda: little_room(1000)
    ),
    # ---------------- options
    "unknown command": Case(good, "No such command 'embedd'.*: see stimg --help", "embedd {good}"),
    "unknown option": Case(good, "No such option.*--sed.*: see stimg embed --help", f"{EMBED_GOOD} --sed 1"),
    "option that is no number": Case(
        good, "Invalid value for '--seed'.*: see stimg embed --help", f"{EMBED_GOOD} --seed x"
    ),
    "no output": Case(good, "Missing option '--output'.*: see stimg embed --help", "embed {good}"),
    "no slide": Case(good, "Missing argument.*: see stimg inspect --help", "inspect"),
    "batches of nothing": Case(
        good, "Invalid value for '--batch-size': .*: see stimg embed --help", f"{EMBED_GOOD} --batch-size 0"
    ),
    "negative seed": Case(good, "Invalid value for '--seed': .*: see stimg embed --help", f"{EMBED_GOOD} --seed -1"),
    "seed beyond its range": Case(good, "seed is .*: expected", f"{DOMAINS} --seed {2**70} --n-domains 3"),
    "stride of nothing": Case(good, "stride is 0: expected an integer from 1", f"{EMBED_GOOD} --stride 0"),
    "stride beyond the window": Case(good, r"stride is 7, larger than the window \(6\)", f"{EMBED_GOOD} --stride 7"),
    "unknown readout": Case(good, "readout is 'all': expected one of", f"{EMBED_GOOD} --readout all"),
    "unknown gene selection": Case(
        good, "gene_selection is 'best': expected one of", f"{EMBED_GOOD} --gene-selection best"
    ),
    "negative smoothing": Case(good, "smoothing is -1: expected a radius", f"{EMBED_GOOD} --smoothing -1"),
    "no channels": Case(good, "num_channels is 0: expected an integer from 1", f"{EMBED_GOOD} --num-channels 0"),
    "no draws": Case(good, "num_gene_draws is 0: expected an integer from 1", f"{EMBED_GOOD} --num-gene-draws 0"),
    "projection that is not there": Case(good, "projected is True .*: expected", f"{EMBED_GOOD} --projected"),
    "unknown device": Case(good, 'device "warp" cannot be used here .*: try "cpu"', f"{EMBED_GOOD} --device warp"),
    "device that is not there": Case(good, 'device "cuda:99" cannot be used', f"{EMBED_GOOD} --device cuda:99"),
    "more domains on the map than spots": Case(
        good, "--num-domains is 9999, but the slide has", f"{EMBED_GOOD} --plot {{out}}/m.png --num-domains 9999"
    ),
    "more domains than spots": Case(good, "n_domains is 9999, but .*: expected fewer", f"{DOMAINS} --n-domains 9999"),
    "one domain": Case(
        good, "Invalid value for '--n-domains': .*: see stimg domains --help", f"{DOMAINS} --n-domains 1"
    ),
    "unknown method": Case(good, "method is 'best': expected one of", f"{DOMAINS} --method best"),
    "method without a number": Case(good, 'method is "gmm", which needs n_domains: tell', f"{DOMAINS} --method gmm"),
    "resolution of nothing": Case(good, "resolution is 0.0: expected a positive number", f"{DOMAINS} --resolution 0"),
    "domains of one spot": Case(
        slide_with(lambda a: a[:1].copy()),
        "has one spot: expected at least two",
        "domains {bad} --output {out}/x.h5ad --n-domains 2",
    ),
    "unknown compaction": Case(good, "compaction is 'hexagon': expected one of", "inspect {good} --compaction hexagon"),
    "model and genes": Case(
        good, "Both --model and --genes are given: pass one", "inspect {good} --genes {good} --model {model}"
    ),
    "genes of no table": Case(good, "good.h5ad is no gene table .*: expected text", "inspect {good} --genes {good}"),
    "unknown gene": Case(
        good, "not in the vocabulary, e.g. 'NOGENE': it holds 120 genes", f"{RECONSTRUCT} --genes NOGENE"
    ),
    "gene given twice": Case(good, "given twice: name each", f"{RECONSTRUCT} --genes PHANTOM0001 PHANTOM0001"),
    "unknown column": Case(good, "obs has no column 'tumour': expected one of", RECONSTRUCT.replace("core", "tumour")),
    "unknown value of a column": Case(
        good, r"obs\['label'\] is 'tumour' nowhere: expected one of", RECONSTRUCT.replace("core", "label=tumour")
    ),
    "column that tells no region": Case(
        good, "expected True or False for every spot", RECONSTRUCT.replace("core", "label")
    ),
    "empty region": Case(good, "is True for no spot: expected a region", RECONSTRUCT.replace("core", "nowhere")),
    "whole slide as region": Case(
        good, "holds all .* positions of the slide: leave some out", RECONSTRUCT.replace("core", "everywhere")
    ),
    # ---------------- what is nobody's fault
    "too little memory": Case(
        good,
        r"There is not enough memory \(Unable to allocate .*\): expected a smaller slide",
        "inspect {good}",
        around=lambda: instead(parsing, "read_h5ad", out_of_memory),
    ),
    "Ctrl-C while a slide is read": Case(good, INTERRUPTED, EMBED_GOOD, 130, ctrl_c_after(parsing, "read_h5ad")),
    "Ctrl-C while a slide is written": Case(
        good, INTERRUPTED, EMBED_GOOD, 130, ctrl_c_after(anndata.experimental, "write_dispatched")
    ),
    "Ctrl-C while a slide is looked at": Case(
        good, INTERRUPTED, "inspect {good} --table {out}/t.tsv", 130, ctrl_c_after(inspection, "compact")
    ),
    "Ctrl-C while domains are written": Case(
        good, INTERRUPTED, f"{DOMAINS} --n-domains 3", 130, ctrl_c_after(anndata.experimental, "write_dispatched")
    ),
    "Ctrl-C while a region is predicted": Case(
        good, INTERRUPTED, RECONSTRUCT, 130, ctrl_c_after(STPatchProcessor, "slide_to_image")
    ),
}
if Path("/proc/self").exists():
    # A folder that takes no file, even of its owner.
    CASES["read-only folder"] = Case(
        good, "cannot be written .*: name another folder", EMBED_GOOD.replace("{out}", "/proc")
    )


# ---------------------------------------------------------------- the test


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, slides: dict[str, AnnData]) -> Path:
    """The folder of a good slide, with an embedding and columns that tell regions."""
    folder = tmp_path_factory.mktemp("shared")
    adata = slides["square"].copy()
    adata.obs = adata.obs.assign(core=np.arange(adata.n_obs) % 9 == 0, nowhere=False, everywhere=True)
    adata.obsm["X_stimg"] = np.random.default_rng(0).normal(size=(adata.n_obs, 4)).astype(np.float32)
    adata.write_h5ad(folder / "good.h5ad")
    return folder


def bytes_in(*folders: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for folder in folders for path in folder.rglob("*")}


def lines_of(stderr: str) -> list[str]:
    """Without progress bars."""
    return [line for line in re.split(r"[\r\n]+", stderr) if line.strip() and not re.search(r"\d%\|", line)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_sentence_status_2_and_nothing_written(
    name: str, shared: Path, checkpoint: Path, tmp_path: Path
):
    case = CASES[name]
    bench = Bench(tmp_path / "in", tmp_path / "out", shared / "good.h5ad", checkpoint)
    bench.place.mkdir()
    bench.out.mkdir()
    (bench.out / "kept.txt").write_text("was there before")
    places = {"in": bench.place, "out": bench.out, "good": bench.good, "model": bench.model, "bad": case.build(bench)}
    before = bytes_in(tmp_path, shared, checkpoint)
    with case.around():
        run = stimg(*(word.format(**places) for word in case.words.split()))

    assert run.returncode == case.status, run.stderr
    assert "Traceback" not in run.stderr
    assert "error" not in run.stdout
    *others, last = lines_of(run.stderr)
    assert re.search(case.says, last), last
    assert not [line for line in others if not re.match(r"warning: |matched [\d,]+ of ", line)], run.stderr
    if case.status == 2:
        assert re.match(r"error: \S.{30,}$", last), last
        assert ADVICE.search(last), last
    assert bytes_in(tmp_path, shared, checkpoint) == before


# ---------------------------------------------------------------- what looks like a mistake and is none


def embedded(checkpoint: Path, folder: Path, adata: AnnData, *options: str) -> AnnData:
    """What `stimg embed` makes of a slide."""
    adata.write_h5ad(folder / "slide.h5ad")
    run = stimg("embed", folder / "slide.h5ad", "--model", checkpoint, "--output", folder / "x.h5ad", *options)
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["slide.h5ad", "x.h5ad"]
    (folder / "x.h5ad").rename(folder / "read.h5ad")
    made = anndata.read_h5ad(folder / "read.h5ad")
    (folder / "read.h5ad").unlink()
    assert made.n_obs == adata.n_obs
    assert np.isfinite(made.obsm["X_stimg"]).all()
    return made


def part_of(shared: Path, spots: Any = slice(None)) -> AnnData:
    adata = anndata.read_h5ad(shared / "good.h5ad")
    del adata.obsm["X_stimg"]
    return adata[spots].copy()


@pytest.mark.filterwarnings("ignore")
def test_names_that_repeat_change_nothing(shared: Path, checkpoint: Path, tmp_path: Path):
    """Spots of one name keep their rows; columns of one gene are added up."""
    plain = embedded(checkpoint, tmp_path, part_of(shared)).obsm["X_stimg"]
    twins = part_of(shared)
    twins.obs_names = ["AAAC-1"] * twins.n_obs
    np.testing.assert_array_equal(embedded(checkpoint, tmp_path, twins).obsm["X_stimg"], plain)

    split = part_of(shared)
    first = split.X.toarray()
    first[:, 5] = np.floor(first[:, 5] / 2)
    halves = AnnData(
        sp.csr_matrix(np.hstack([first, split.X.toarray()[:, [5]] - first[:, [5]]])), obs=split.obs, obsm=split.obsm
    )
    halves.var_names = [*split.var_names, split.var_names[5]]
    np.testing.assert_array_equal(embedded(checkpoint, tmp_path, halves).obsm["X_stimg"], plain)


@pytest.mark.filterwarnings("ignore")
def test_a_spot_a_row_and_few_genes_are_enough(shared: Path, checkpoint: Path, tmp_path: Path):
    one = embedded(checkpoint, tmp_path, part_of(shared, slice(1)))
    assert one.obsm["X_stimg"].shape == (1, 32)
    pixels_alone = part_of(shared, slice(1))
    pixels_alone.obs = pixels_alone.obs[["label"]].set_axis(["spot"])
    assert embedded(checkpoint, tmp_path, pixels_alone).obs["array_row"].tolist() == [0]
    adata = part_of(shared)
    row = embedded(checkpoint, tmp_path, part_of(shared, adata.obs["array_row"] == 6), "--smoothing", "100000")
    assert row.n_obs > 5
    few = part_of(shared)
    few.var_names = [name if i < 50 else f"FOREIGN{i}" for i, name in enumerate(few.var_names)]
    made = embedded(checkpoint, tmp_path, few)
    assert made.uns["stimg"]["embedding"]["X_stimg"]["matched_genes"] == 50
    assert len(np.unique(made.obsm["X_stimg"], axis=0)) > few.n_obs / 2


def test_two_spots_on_a_site_are_told_in_a_warning(shared: Path, checkpoint: Path, tmp_path: Path):
    adata = part_of(shared)
    adata.obs.iloc[4, :2] = adata.obs.iloc[9, :2]
    adata.write_h5ad(tmp_path / "slide.h5ad")
    run = stimg("embed", tmp_path / "slide.h5ad", "--model", checkpoint, "--output", tmp_path / "x.h5ad")
    assert run.returncode == 0
    assert re.search(r"warning: 1 of \d+ spots stand on an array position that another spot has", run.stderr)
    rows = anndata.read_h5ad(tmp_path / "x.h5ad").obsm["X_stimg"]
    np.testing.assert_array_equal(rows[4], rows[9])


def test_without_words_the_help_is_shown():
    run = stimg()
    assert run.returncode == 2
    assert all(command in run.stdout for command in ("inspect", "embed", "domains", "reconstruct"))
    assert stimg("embed", "--help").returncode == 0
