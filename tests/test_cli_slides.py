"""The `stimg` command over many slides: named, resumed, failing alone, interrupted, without room, in processes."""

import io
import os
import re
import signal
from pathlib import Path

import anndata
import numpy as np
import pytest
from anndata import AnnData
from command_line import little_room, stimg
from hypothesis import given, settings
from hypothesis import strategies as st
from small_pretraining import launch_words, start

from modeling_stimg import STImageMAEModel, STPatchProcessor, cli_slides, embed_slide, embedding, writing
from modeling_stimg.cli_options import several_times
from modeling_stimg.cli_slides import slide_name
from modeling_stimg.writing import NoRoomError, write_h5ad, written_whole


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory, slides: dict[str, AnnData]) -> list[Path]:
    """Three slides: a.h5ad, b.h5ad, c.h5ad."""
    folder = tmp_path_factory.mktemp("many")
    written = [folder / f"{name}.h5ad" for name in "abc"]
    for path, adata in zip(written, (slides["square"], slides["staggered"], slides["square"][20:]), strict=True):
        adata.write_h5ad(path)
        os.utime(path, (1, 1))  # older than all outputs
    return written


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_many_slides_are_embedded_and_what_is_there_is_kept(
    paths: list[Path], checkpoint: Path, slides: dict[str, AnnData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loads = []
    load = STImageMAEModel.from_pretrained
    monkeypatch.setattr(STImageMAEModel, "from_pretrained", lambda *a, **k: loads.append(a) or load(*a, **k))
    out = tmp_path / "out"
    words = ("embed", "--model", checkpoint, "--output", out)
    run = stimg(*words, *paths, "--plot", tmp_path / "maps")
    assert run.returncode == 0, run.stderr
    assert len(loads) == 1
    assert names(out) == ["a.h5ad", "b.h5ad", "c.h5ad"]
    assert names(tmp_path / "maps") == ["a.png", "b.png", "c.png"]
    here = slides["staggered"].copy()
    embed_slide(here, load(checkpoint), STPatchProcessor.from_pretrained(checkpoint), progress=False)
    np.testing.assert_array_equal(anndata.read_h5ad(out / "b.h5ad").obsm["X_stimg"], here.obsm["X_stimg"])

    (out / "b.h5ad").unlink()
    before = {name: (out / name).stat().st_mtime_ns for name in names(out)}
    run = stimg(*words, *paths)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("is there already") == 2
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert names(out) == ["a.h5ad", "b.h5ad", "c.h5ad"]

    run = stimg(*words, *paths, "--readout", "context", "--seed", "1")
    assert run.returncode == 2
    assert re.search(r"3 outputs are there that were made otherwise: a.h5ad \(seed, readout\)", run.stderr)
    os.utime(paths[0])
    try:
        run = stimg(*words, *paths[:2])
        assert run.returncode == 2
        assert "1 outputs are there that were made otherwise: a.h5ad (the slide has changed since)" in run.stderr
        assert "is there already" not in run.stderr
        run = stimg(*words, *paths[:2], "--overwrite", "--quiet")
        assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    finally:
        os.utime(paths[0], (1, 1))
    assert (out / "a.h5ad").stat().st_mtime_ns > before["a.h5ad"]
    assert (out / "c.h5ad").stat().st_mtime_ns == before["c.h5ad"]


def test_one_bad_slide_does_not_stop_the_others(paths: list[Path], checkpoint: Path, tmp_path: Path, monkeypatch):
    bad = tmp_path / "bad.h5ad"
    bad.write_text("no slide")
    broken = embedding.embed_slide

    def fails_for_b(adata, *arguments, **options):
        if adata.n_obs == anndata.read_h5ad(paths[1], backed="r").n_obs:
            raise RuntimeError("device ran away")
        broken(adata, *arguments, **options)

    monkeypatch.setattr(embedding, "embed_slide", fails_for_b)
    run = stimg("embed", bad, *paths, "--model", checkpoint, "--output", tmp_path / "out")
    assert run.returncode == 2
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("error: 2 of 4 slides failed: ")
    assert "bad.h5ad is damaged" in last
    assert f"{paths[1]}: RuntimeError: device ran away" in last
    assert "Traceback" in run.stderr, "what nobody foresaw is shown in full"
    assert names(tmp_path / "out") == ["a.h5ad", "c.h5ad"]


def test_mistakes_are_told_before_anything_is_computed(
    paths: list[Path], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(embedding, "embed_slide", lambda *_a, **_k: pytest.fail("too late"))
    twin = tmp_path / "A.h5ad"
    out = tmp_path / "out"
    for words, message in (
        (("embed", paths[0], twin, "--output", out), "are both called A, and outputs are called after slides"),
        (("embed", *paths, "--output", tmp_path / "x.h5ad"), "there are 3 slides: expected a folder"),
        (("embed", *paths, "--output", paths[0].parent), "would be overwritten: name another folder"),
        (("embed", *paths, "--output", out, "--plot", tmp_path / "map.png"), "expected a folder for the maps"),
    ):
        run = stimg(*words, "--model", checkpoint)
        assert (run.returncode, run.stdout) == (2, ""), run.stderr
        assert message in run.stderr
        assert run.stderr.count("\n") == 1
    assert names(tmp_path) == []


def test_slides_are_called_by_their_files_or_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for source, name in {
        "x/slide.h5ad": "slide",
        "x/151673.v2.h5ad": "151673.v2",
        "x/counts.tsv.gz": "counts",
        "sample_1/outs": "sample_1",
        "sample_1/outs/": "sample_1",
        "sample_1": "sample_1",
        ".": tmp_path.name,
    }.items():
        assert slide_name(source) == name


def test_domains_embeds_where_there_is_no_embedding(paths: list[Path], checkpoint: Path, tmp_path: Path, monkeypatch):
    model = ("--model", checkpoint)
    assert stimg("embed", paths[0], *model, "--output", tmp_path / "a.h5ad", "--readout", "both").returncode == 0
    normalised = anndata.read_h5ad(tmp_path / "a.h5ad")
    normalised.X = normalised.X * 0.5  # nobody looks at it any more
    normalised.write_h5ad(tmp_path / "a.h5ad")
    os.utime(tmp_path / "a.h5ad", (1, 1))
    words = ("domains", "--output", tmp_path / "out", "--plot", tmp_path / "maps", "--n-domains", "3")
    run = stimg(*words, tmp_path / "a.h5ad", paths[1], *model)
    assert run.returncode == 0, run.stderr
    assert names(tmp_path / "out") == ["a.h5ad", "b.h5ad"]
    assert names(tmp_path / "maps") == ["a.png", "b.png"]
    kept, made = (anndata.read_h5ad(tmp_path / "out" / f"{name}.h5ad") for name in "ab")
    np.testing.assert_array_equal(kept.obsm["X_stimg"], normalised.obsm["X_stimg"])
    assert kept.uns["stimg"]["embedding"]["X_stimg"]["readout"] == "both"
    assert made.uns["stimg"]["embedding"]["X_stimg"]["readout"] == "spot"
    for adata in (kept, made):
        assert adata.uns["stimg"]["domains"]["stimg_domain"]["method"] == "gmm"
        assert adata.obs["stimg_domain"].cat.categories.tolist() == ["0", "1", "2"]

    # Slides that are embedded need no model, and outputs that are there are kept.
    run = stimg(*words, tmp_path / "a.h5ad", "--model", "./nowhere")
    assert (run.returncode, run.stderr.count("is there already")) == (0, 1), run.stderr
    run = stimg(*words, tmp_path / "a.h5ad", "--smoothing", "1")
    assert run.returncode == 2
    assert "a.h5ad (smoothing, smoothed)" in run.stderr
    run = stimg("domains", tmp_path / "a.h5ad", "--output", tmp_path / "one.h5ad", "--smoothing", "1", "--quiet")
    assert (run.returncode, run.stderr) == (0, "")
    assert anndata.read_h5ad(tmp_path / "one.h5ad").uns["stimg"]["domains"]["stimg_domain"]["method"] == "leiden"


# ---------------------------------------------------------------- interruptions


def test_ctrl_c_ends_in_a_sentence_and_without_half_a_file(
    paths: list[Path], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write, written = anndata.experimental.write_dispatched, []

    def interrupted(*arguments, **options):
        written.append(arguments)
        write(*arguments, **options)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(anndata.experimental, "write_dispatched", interrupted)
    run = stimg("embed", *paths, "--model", checkpoint, "--output", tmp_path / "out")
    assert run.returncode == 130
    assert run.stderr.rstrip().splitlines()[-1].startswith("interrupted: no half-written file is left")
    assert "Traceback" not in run.stderr
    assert names(tmp_path / "out") == ["a.h5ad"]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_one_sentence(paths: list[Path], checkpoint: Path, tmp_path: Path):
    with little_room(20_000):
        run = stimg("embed", paths[0], "--model", checkpoint, "--output", tmp_path / "x.h5ad", "--quiet")
        assert run.returncode == 2
        assert re.fullmatch(r"error: \S*x.h5ad could not be written, .* \(EFBIG\): make room, .*\n", run.stderr)
        assert names(tmp_path) == []
        run = stimg("embed", *paths, "--model", checkpoint, "--output", tmp_path / "out", "--quiet")
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith("error: 1 of 3 slides failed: "), "the others were not tried"
    assert names(tmp_path / "out") == []


def test_a_disk_that_is_full_anywhere_in_a_file_is_told(slides: dict[str, AnnData], tmp_path: Path):
    """HDF5 reads again what it has written, and crashes the process where that is not there."""
    adata, path = slides["staggered"].copy(), tmp_path / "x.h5ad"
    adata.obsm["X_stimg"] = np.random.default_rng(0).random((adata.n_obs, 32), dtype=np.float32)
    write_h5ad(adata, path)
    size = path.stat().st_size
    for room in range(0, size, size // 97):
        with little_room(room), pytest.raises(NoRoomError, match="EFBIG"), written_whole(path) as temporary:
            write_h5ad(adata, temporary)
        assert names(tmp_path) == ["x.h5ad"]
    np.testing.assert_array_equal(anndata.read_h5ad(path).obsm["X_stimg"], adata.obsm["X_stimg"])


@given(st.data(), st.integers(0, 3000))
@settings(deadline=None, max_examples=100)
def test_a_file_without_room_reads_as_one_with_room(tmp_path_factory: pytest.TempPathFactory, data, room: int):
    # Pages smaller than what is written, so that it lies across several.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "_PAGE", 256)
        plain, patient = io.BytesIO(), writing._PatientFile(tmp_path_factory.mktemp("room") / "x")
        with patient, little_room(room):
            for start, length in data.draw(st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 900)), max_size=12)):
                content = bytes((start + i) % 251 for i in range(length))
                for file in (plain, patient):
                    file.seek(start)
                    assert file.write(content) == length
                    assert file.tell() == start + length
                where = data.draw(st.integers(0, 4000))
                found, expected = bytearray(1000), bytearray(1000)
                for file, into in ((plain, expected), (patient, found)):
                    file.seek(where)
                    read = file.readinto(into)
                    assert file.tell() == where + read
                assert found == expected
                assert patient.seek(0, os.SEEK_END) == plain.seek(0, os.SEEK_END) == len(plain.getvalue())
            assert (patient.error is None) == (len(plain.getvalue()) <= room)


# ---------------------------------------------------------------- several processes


def test_processes_share_the_slides_and_end_alike(paths: list[Path], checkpoint: Path, tmp_path: Path):
    bad = tmp_path / "bad.h5ad"
    bad.write_text("no slide")
    launch = launch_words()[:-1]
    words = ["embed", str(bad), *map(str, paths), "--model", str(checkpoint), "--output", str(tmp_path / "out")]
    process = start(*launch, "-m", "modeling_stimg.cli", *words, "--device", "cpu")
    told = process.communicate(timeout=500)[0]
    assert process.returncode != 0
    assert told.count("error: 1 of 4 slides failed") == 1, told
    assert len(re.findall(r"spots are embedded in", told)) == 3
    assert names(tmp_path / "out") == ["a.h5ad", "b.h5ad", "c.h5ad"]
    for path in paths:
        made = anndata.read_h5ad(tmp_path / "out" / path.name)
        assert made.uns["stimg"]["embedding"]["X_stimg"]["matched_genes"] == 120


def test_a_process_takes_every_second_slide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    jobs = [cli_slides.Job(str(i), tmp_path / f"{i}.h5ad", None, True) for i in range(5)]
    shares = []
    for rank in range(2):
        mine: list[str] = []
        processes = cli_slides.Processes(2, rank)
        monkeypatch.setattr(cli_slides.Processes, "all_of", lambda _self, items: items)
        cli_slides.for_every_slide(jobs, lambda job, to=mine: to.append(job.slide) or "", processes, quiet=True)
        shares.append(mine)
    assert shares == [["0", "2", "4"], ["1", "3"]]
    assert cli_slides.this_process("cpu") == cli_slides.Processes(1, 0, None)


# ---------------------------------------------------------------- reconstruction


def test_a_region_is_reconstructed_into_a_table_a_slide_and_maps(
    slides: dict[str, AnnData], checkpoint: Path, tmp_path: Path
):
    import pandas as pd

    from modeling_stimg import STImageMAEForPreTraining, reconstruct_region

    adata = slides["square"].copy()
    adata.obs["core"] = np.arange(adata.n_obs) % 9 == 0
    adata.obs["part"] = np.where(adata.obs["core"], "in", "out")
    adata.write_h5ad(tmp_path / "s.h5ad")
    genes = [str(name) for name in adata.var_names[[3, 1, 7]]]
    words = ("reconstruct", tmp_path / "s.h5ad", "--model", checkpoint)
    run = stimg(
        *words, "--spots", "core", "--genes", *genes, "--output", tmp_path / "p.tsv", "--plot", tmp_path / "p.png"
    )
    assert run.returncode == 0, run.stderr
    network = STImageMAEForPreTraining.from_pretrained(checkpoint)
    processor = STPatchProcessor.from_pretrained(checkpoint)
    expected = reconstruct_region(adata, network, processor, "core", genes=genes, progress=False)
    table = pd.read_csv(tmp_path / "p.tsv", sep="\t", index_col="spot")
    assert list(table.index) == list(expected.index)
    assert list(table.columns) == genes
    np.testing.assert_allclose(table, expected, rtol=1e-4)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")

    run = stimg(*words, "--spots", "part=in", "--genes", genes[0], "--output", tmp_path / "p.h5ad", "--quiet")
    assert (run.returncode, run.stderr) == (0, "")
    written = anndata.read_h5ad(tmp_path / "p.h5ad")
    np.testing.assert_array_equal(written.X[:, 0], expected[genes[0]])
    assert written.obs["part"].eq("in").all()
    np.testing.assert_array_equal(written.obsm["spatial"], adata[adata.obs["core"]].obsm["spatial"])


def test_genes_stand_behind_one_option():
    assert several_times(["s", "--genes", "A", "B", "--plot", "x"], ("--genes",)) == [
        *("s", "--genes", "A", "--genes", "B", "--plot", "x")
    ]
    assert several_times(["--genes", "--plot", "x"], ("--genes",)) == ["--plot", "x", "--genes"]
