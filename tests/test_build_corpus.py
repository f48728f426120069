"""Building a corpus from the command line: what enters, what is told, and that a kill or a shard changes nothing."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from filelock import FileLock
from loopback import serving
from safetensors.numpy import load_file

from data_processing import build_corpus
from data_processing.assembling import assemble, load_vectors
from data_processing.open_corpus import Corpus
from data_processing.phantom import PhantomTissue
from data_processing.staging import row_file
from data_processing.window_dataset import WindowDataset
from modeling_stimg import STPatchProcessor, read_slide

ROOT = Path(__file__).parents[1]
RULES = ("--min_counts", "60", "--min_genes", "100", "--rank", "8")


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "data_processing" / "build_corpus.py"), *map(str, arguments)]


def build(*arguments: object) -> subprocess.CompletedProcess:
    """Run the command in this process: the start of another takes longer than most builds here."""
    command = list(map(str, (*RULES, *arguments)))
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        returncode = build_corpus.command_line(command)
    return subprocess.CompletedProcess(command, returncode, out.getvalue(), err.getvalue())


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tissue: PhantomTissue) -> Path:
    """Slides of many kinds, and a slides.tsv that says which are for evaluation."""
    folder = tmp_path_factory.mktemp("slides")
    rng = np.random.default_rng(0)
    slides = {f"s{i}": tissue.slide(i, array=("visium", "square")[i % 2], median_counts=300) for i in range(4)}
    evaluation = tissue.slide(9, median_counts=600)
    slides["held_out"] = evaluation
    # The evaluation slide under another name, shuffled, and with a third of its genes.
    slides["other_name"] = evaluation.copy()
    slides["shuffled"] = evaluation[rng.permutation(evaluation.n_obs)].copy()
    slides["third"] = evaluation[:, np.sort(rng.permutation(evaluation.n_vars)[:70])].copy()
    slides["twice"] = slides["s1"][rng.permutation(slides["s1"].n_obs)].copy()
    slides["shallow"] = tissue.slide(5, median_counts=5)
    for name, adata in slides.items():
        adata.write_h5ad(folder / f"{name}.h5ad")
    (folder / "broken.h5ad").write_text("no slide")
    (folder / "sub").mkdir()
    slides["s0"].write_h5ad(folder / "sub" / "s0.h5ad")
    table = pd.DataFrame({"name": ["held_out", "s0"], "role": ["labelled", "unlabelled"], "organ": ["", "phantom"]})
    table.to_csv(folder / "slides.tsv", sep="\t", index=False)
    genes = "".join(f"{gene}\t{gene}\n" for gene in evaluation.var_names)
    (folder / "genes.tsv").write_text(f"gene_id\tgene_name\n{genes}")
    return folder


@pytest.fixture(scope="module")
def corpus(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("corpus") / "corpus"
    run = build("--slides", folder, "--gene_table", folder / "genes.tsv", "--output", output, "--min_genes", 60)
    assert run.returncode == 1, run.stderr[-3000:]
    assert "failed: broken: could not be read" in run.stderr
    assert "Traceback" not in run.stderr
    return output


def test_only_slides_that_may_enter_are_in_and_every_other_has_a_reason(corpus: Path):
    records = {record["id"]: record for record in report_of(corpus)["records"]}
    names = {"s0", "s1", "s2", "s3", "other_name", "shuffled", "third", "twice", "shallow", "broken", "held_out"}
    assert set(records) == names
    assert "evaluation slide by its role" in records["held_out"]["leak"]
    for name in ("other_name", "shuffled", "third"):
        assert "has the content of evaluation slide held_out" in records[name]["leak"], name
    assert "twice has the content of s1" in records["twice"]["duplicate"]
    assert "at least 60 counts" in records["shallow"]["refused"]
    assert "could not be read" in records["broken"]["refused"]
    assert Corpus(corpus).column("id") == ["s0", "s1", "s2", "s3"]
    assert sorted(p.stem for p in (corpus / "data").iterdir()) == ["s0", "s1", "s2", "s3"]
    card = (corpus / "README.md").read_text()
    for name in ("third", "twice", "shallow", "broken"):
        assert name in card


def test_rows_hold_the_counts_of_the_slides(corpus: Path, folder: Path):
    built = Corpus(corpus)
    processor = STPatchProcessor(built.vocabulary, window_size=6, num_channels=32)
    images = built.images(processor)
    records = {record["id"]: record for record in report_of(corpus)["records"]}
    for number, name in enumerate(built.column("id")):
        adata = read_slide(folder / f"{name}.h5ad")
        kept = adata[np.asarray(adata.X.sum(1)).ravel() >= 60].copy()
        assert records[name]["spots_low_counts"] == adata.n_obs - kept.n_obs
        expected = processor.slide_to_image(kept)
        np.testing.assert_array_equal(np.asarray(images[number].values), expected.values)
        a, b = (processor(image, num_windows=4) for image in (images[number], expected))
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_published_and_training_form_load_and_agree(corpus: Path, tmp_path: Path):
    published = datasets.load_dataset(str(corpus), split="train", cache_dir=str(tmp_path))
    trained = datasets.load_from_disk(str(corpus / "arrow"))
    assert published.features == trained.features
    assert published["id"] == trained["id"] == ["s0", "s1", "s2", "s3"]
    assert published["organ"][0] == "phantom"
    for row in range(4):
        for name in ("indptr", "indices", "counts", "barcode", "array_col"):
            assert published[row][name] == trained[row][name]


def test_a_corpus_without_its_training_form_is_opened_from_its_shards(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "rows")
    order = [corpus / "data" / f"s{number}.parquet" for number in (2, 0, 3)]
    folder = tmp_path / "downloaded"
    (folder / "data").mkdir(parents=True)
    shards = [Path(shutil.copy(file, folder / "data")) for file in order]
    built = assemble(folder, shards, Corpus(corpus).vocabulary, rank=0, progress=False)
    assert built.column("id") == ["s2", "s0", "s3"]
    rows = built.dataset.data.table.to_pylist()
    shutil.rmtree(folder / "arrow")
    opened = Corpus(folder)
    assert opened.dataset.data.table.to_pylist() == rows, "in the order of the build, not in that of the names"
    image = opened.images(STPatchProcessor(opened.vocabulary, window_size=6, num_channels=16))[0]
    assert not image.values.counts.flags.owndata
    assert not image.values.counts.flags.writeable, "the counts are the file's own pages"

    shutil.copy(corpus / "data" / "s1.parquet", shards[1])  # as a download of another revision does
    assert Corpus(folder).column("id") == ["s2", "s1", "s3"]
    shards[1].write_bytes(shards[1].read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"rows of .*downloaded cannot be read \(.*\): download the corpus again"):
        Corpus(folder).column("id")
    assert load_vectors(Corpus(corpus), 1e4, 4, smoothing=1) is None, "the corpus holds those of single spots"
    vectors = tmp_path / "downloaded" / "gene_vectors.safetensors"
    vectors.write_bytes((corpus / vectors.name).read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"gene_vectors.safetensors of .*downloaded is damaged or cut off"):
        load_vectors(Corpus(folder), 1e4, 4)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 3 shards, e.g. data/s0.parquet: download"):
        Corpus(folder).column("id")


def test_statistics_are_those_of_the_slides(corpus: Path):
    vocabulary = Corpus(corpus).vocabulary
    images = Corpus(corpus).images(STPatchProcessor(vocabulary))
    dense = []
    for image in images:
        values = np.zeros((image.num_spots, len(vocabulary)))
        for spot in range(image.num_spots):
            genes, of_spot, _ = image.expression(np.array([spot]))
            values[spot, genes] = of_spot
        dense.append(values)
    dense = np.concatenate(dense)
    np.testing.assert_allclose(vocabulary.mean, dense.mean(0), rtol=1e-4)
    np.testing.assert_allclose(vocabulary.share.sum(), 1, rtol=1e-4)
    vectors = load_file(corpus / "gene_vectors.safetensors")["vectors"]
    assert vectors.shape == (len(vocabulary), 8)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(8), atol=1e-4)


def test_windows_are_drawn_in_proportion_to_tissue_and_need_no_copy_of_the_counts(corpus: Path):
    built = Corpus(corpus)
    processor = STPatchProcessor(built.vocabulary, window_size=6, num_channels=16)
    windows = WindowDataset(built.images(processor), processor, 4000)
    drawn = [windows.slide_of(index).name for index in range(4000)]
    spots = np.array(built.column("num_spots"))
    shares = np.array([drawn.count(name) for name in built.column("id")]) / 4000
    np.testing.assert_allclose(shares, spots / spots.sum(), atol=0.03)
    image = windows.images[0]
    assert not image.values.counts.flags.owndata
    assert not image.values.counts.flags.writeable, "the counts are the file's own pages"


def test_a_second_run_builds_nothing_anew(corpus: Path, folder: Path):
    before = {p.name: p.stat().st_mtime_ns for p in (corpus / "data").iterdir()}
    content = report_of(corpus)["extra"]["content_sha256"]
    run = build("--slides", folder, "--gene_table", folder / "genes.tsv", "--output", corpus, "--min_genes", 60)
    assert run.returncode == 1
    assert {p.name: p.stat().st_mtime_ns for p in (corpus / "data").iterdir()} == before
    assert report_of(corpus)["extra"]["content_sha256"] == content


def test_shards_and_processes_build_the_same(corpus: Path, folder: Path, tmp_path: Path):
    """Each shard on a machine of its own: the slides lie elsewhere there, and were written at another time."""
    parts = tmp_path / "parts"
    for number in range(2):
        machine = tmp_path / f"machine{number}"
        shutil.copytree(folder, machine / "slides", copy_function=shutil.copyfile)
        options = ("--slides", machine / "slides", "--gene_table", folder / "genes.tsv", "--min_genes", 60)
        run = build(*options, "--output", machine / "corpus", "--shard", f"{number}/2")
        assert run.returncode == ("broken" in run.stderr), run.stderr
        assert not (machine / "corpus" / "arrow").exists()
        shutil.copytree(machine / "corpus", parts, dirs_exist_ok=True)
    rows = {path.name: path.stat().st_mtime_ns for path in (parts / "data").iterdir()}
    assert len(rows) == 5, "the duplicate is not known before all are together"
    options = ("--slides", folder, "--gene_table", folder / "genes.tsv", "--min_genes", 60)
    assert build(*options, "--output", parts, "--num_proc", 2).returncode == 1
    assert {p.name: p.stat().st_mtime_ns for p in (parts / "data").iterdir()}.items() <= rows.items(), "built anew"
    assert report_of(tmp_path / "parts") == report_of(corpus)
    assert (tmp_path / "parts" / "genes.json").read_bytes() == (corpus / "genes.json").read_bytes()


def test_killed_in_the_middle_and_run_again_is_the_same(corpus: Path, folder: Path, tmp_path: Path):
    options = ("--slides", folder, "--gene_table", folder / "genes.tsv", "--min_genes", 60, "--output", tmp_path / "c")
    process = subprocess.Popen(command(*RULES, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "c" / "data").glob("*.parquet"))) < 2:
        assert process.poll() is None, "the build ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "c" / "arrow").exists()
    with pytest.raises(FileNotFoundError, match="built to its end"):
        Corpus(tmp_path / "c")
    assert build(*options).returncode == 1
    assert report_of(tmp_path / "c") == report_of(corpus)
    for name in ("genes.json", "README.md"):
        assert (tmp_path / "c" / name).read_bytes() == (corpus / name).read_bytes()


def test_what_was_left_out_once_comes_back_when_asked_for(folder: Path, tmp_path: Path):
    options = ("--slides", folder / "s0.h5ad", folder / "s1.h5ad", folder / "twice.h5ad", "--output", tmp_path / "c")
    options += ("--gene_table", folder / "genes.tsv")
    assert build(*options).returncode == 0
    whole = report_of(tmp_path / "c")
    waiting = tmp_path / "c" / ".build" / "duplicates" / "twice.parquet"
    written = waiting.stat().st_mtime_ns
    assert build(*options, "--exclude", "s1").returncode == 0
    assert Corpus(tmp_path / "c").column("id") == ["s0", "twice"]
    records = {record["id"]: record for record in report_of(tmp_path / "c")["records"]}
    assert records["s1"]["excluded"] == "by its name."
    assert (tmp_path / "c" / "data" / "twice.parquet").stat().st_mtime_ns == written, "not read a second time"
    assert build(*options, "--exclude", "s0", "--rank", 0).returncode == 0
    assert Corpus(tmp_path / "c").column("id") == ["s1"]
    assert not (tmp_path / "c" / "gene_vectors.safetensors").exists(), "those of other slides"
    (tmp_path / "c" / "data" / "s9.parquet.tmp1").write_text("what a killed build left")
    assert build(*options).returncode == 0
    assert report_of(tmp_path / "c") == whole
    assert sorted(p.name for p in (tmp_path / "c" / "data").iterdir()) == ["s0.parquet", "s1.parquet"]
    run = build(*options, "--exclude", "s7")
    assert run.returncode == 2
    assert "no slide or source 's7'" in run.stderr


def test_a_source_that_fails_today_is_tried_again_tomorrow(folder: Path, tmp_path: Path):
    slides = tmp_path / "slides"
    slides.mkdir()
    for name in ("s0.h5ad", "s1.h5ad"):
        (slides / name).write_bytes((folder / name).read_bytes())
    options = ("--slides", slides, "--gene_table", folder / "genes.tsv", "--output", tmp_path / "c")
    (slides / "s1.h5ad").chmod(0)
    blocked = not os.access(slides / "s1.h5ad", os.R_OK)
    content = (slides / "s1.h5ad").read_bytes() if not blocked else b""
    stamp = (slides / "s1.h5ad").stat()
    if not blocked:  # root reads everything: cut the file instead, and keep its size and time
        (slides / "s1.h5ad").write_bytes(b"\0" * stamp.st_size)
        os.utime(slides / "s1.h5ad", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    run = build(*options)
    assert run.returncode == 1
    assert Corpus(tmp_path / "c").column("id") == ["s0"]
    (slides / "s1.h5ad").chmod(0o644)
    if content:
        (slides / "s1.h5ad").write_bytes(content)
        os.utime(slides / "s1.h5ad", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert build(*options).returncode == 0
    assert Corpus(tmp_path / "c").column("id") == ["s0", "s1"]


def test_when_nothing_may_enter_the_reasons_are_told(folder: Path, tmp_path: Path):
    options = ("--gene_table", folder / "genes.tsv", "--output", tmp_path / "c")
    run = build("--slides", folder / "shallow.h5ad", *options)
    assert run.returncode == 2
    assert "None of 1 slides may enter the corpus (shallow: " in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("role", ["test", "Labeled"])
def test_an_unknown_role_is_no_licence_to_train(folder: Path, tmp_path: Path, role: str):
    (tmp_path / "s0.h5ad").write_bytes((folder / "s0.h5ad").read_bytes())
    (tmp_path / "slides.tsv").write_text(f"name\trole\ns0\t{role}\n")
    run = build("--slides", tmp_path / "s0.h5ad", "--output", tmp_path / "c", "--gene_table", folder / "genes.tsv")
    assert run.returncode == 2
    assert f"role '{role}'" in run.stderr


def test_rows_of_different_slides_never_share_a_file(tmp_path: Path):
    names = ["a/b", "a__b", "a@b", "a@00002Fb", "a/b c", "a/b_c", "x" * 300, "x" * 299 + "y"]
    files = {row_file(tmp_path, name) for name in names}
    assert len(files) == len(names)
    assert all(len(file.name) < 200 and file.parent == tmp_path / "data" for file in files)


def test_a_model_is_pretrained_on_a_corpus(corpus: Path, tmp_path: Path):
    small = "--hidden_size 8 --num_attention_heads 2 --num_hidden_layers 1 --intermediate_size 16 --window_size 6"
    small += " --decoder_hidden_size 8 --decoder_num_hidden_layers 1 --decoder_num_attention_heads 2 --num_channels 16"
    run = subprocess.run(
        [
            *(sys.executable, str(ROOT / "train" / "run_pretrain.py"), "--corpus", str(corpus)),
            *("--output_dir", str(tmp_path / "model"), "--max_steps", "2", "--dataloader_num_workers", "1"),
            *("--normalization", "standardized", *small.split()),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads((tmp_path / "model" / "pretraining.json").read_text())
    assert [slide["name"] for slide in told["slides"]] == ["s0", "s1", "s2", "s3"]
    assert STPatchProcessor.from_pretrained(tmp_path / "model").vocabulary == Corpus(corpus).vocabulary


def test_a_manifest_is_fetched_and_one_failure_stops_no_other(folder: Path, tmp_path: Path):
    with serving(folder) as server:
        rows = [
            ("one", "h5ad", server.address("s0.h5ad"), "corpus"),
            ("gone", "h5ad", server.address("nowhere.h5ad"), "corpus"),
            ("two", "h5ad", server.address("s1.h5ad"), "corpus"),
            ("held_out", "h5ad", server.address("held_out.h5ad"), "evaluation", "other_section_1234567"),
            ("copy", "h5ad", server.address("shuffled.h5ad"), "corpus"),
            ("other_section_1234567", "h5ad", server.address("s3.h5ad"), "corpus"),
            ("local", "", f"file://{folder / 's2.h5ad'}", "corpus"),
            ("nowhere", "", "", "evaluation"),
        ]
        columns = ["id", "layout", "url", "role", "aliases"]
        pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "sources.tsv", sep="\t", index=False)
        options = (
            "--manifest",
            tmp_path / "sources.tsv",
            "--gene_table",
            folder / "genes.tsv",
            "--output",
            tmp_path / "c",
        )
        run = build(*options)
        requests = len(server.requests)
        again = build(*options)
        assert [request.path for request in server.requests[requests:]] == ["/nowhere.h5ad"] * 1, "what is there stays"
    for each in (run, again):
        assert each.returncode == 1, each.stderr[-2000:]
        assert "failed: gone:" in each.stderr
        assert "404" in each.stderr
        assert "1 evaluation slides, e.g. nowhere, are known by id alone" in each.stderr
        assert "Traceback" not in each.stderr
    assert Corpus(tmp_path / "c").column("id") == ["one", "two", "local"]
    records = {record["id"]: record for record in report_of(tmp_path / "c")["records"]}
    assert [name for name, record in records.items() if record.get("refused")] == ["gone"]
    assert "has the content of evaluation slide held_out" in records["copy"]["leak"]
    assert "is evaluation slide other_section_1234567 by its id" in records["other_section_1234567"]["leak"]
    assert report_of(tmp_path / "c")["extra"]["evaluation_by_id_alone"] == ["nowhere"]


def test_no_corpus_without_the_content_of_evaluation_slides_that_have_an_address(folder: Path, tmp_path: Path):
    rows = [("one", "h5ad", folder / "s0.h5ad", "corpus"), ("held_out", "h5ad", tmp_path / "gone.h5ad", "evaluation")]
    table = pd.DataFrame(rows, columns=["id", "layout", "url", "role"])
    table.to_csv(tmp_path / "sources.tsv", sep="\t", index=False)
    options = ("--manifest", tmp_path / "sources.tsv", "--gene_table", folder / "genes.tsv", "--output", tmp_path / "c")
    run = build(*options)
    assert run.returncode == 2
    assert "1 evaluation slides could not be fetched or read (held_out: " in run.stderr
    assert not list((tmp_path / "c" / "data").iterdir())
    assert build(*options, "--evaluation_by_id", "true").returncode == 0
    assert report_of(tmp_path / "c")["extra"]["evaluation_by_id_alone"] == ["held_out"]


def test_a_collection_loses_only_the_slide_that_is_broken(folder: Path, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in ("s0", "broken", "s2", "shuffled"):
            archive.write(folder / f"{name}.h5ad", f"of/{name}.h5ad")
    with zipfile.ZipFile(tmp_path / "held.zip", "w") as archive:
        archive.write(folder / "held_out.h5ad", "held_out.h5ad")
    rows = [
        ("mine", "h5ad", tmp_path / "all.zip", "corpus", "collection"),
        ("held", "h5ad", tmp_path / "held.zip", "evaluation", "collection"),
        ("again", "h5ad", folder / "s2.h5ad", "corpus", "slide"),
    ]
    table = pd.DataFrame(rows, columns=["id", "layout", "url", "role", "contents"])
    table.to_csv(tmp_path / "sources.tsv", sep="\t", index=False)
    options = ("--manifest", tmp_path / "sources.tsv", "--gene_table", folder / "genes.tsv", "--output", tmp_path / "c")
    run = build(*options)
    assert run.returncode == 1, run.stderr[-2000:]
    assert "failed: mine/of/broken: could not be read" in run.stderr
    assert Corpus(tmp_path / "c").column("id") == ["mine/of/s0", "mine/of/s2"]
    records = {record["id"]: record for record in report_of(tmp_path / "c")["records"]}
    assert "has the content of mine/of/s2" in records["again"]["duplicate"]
    assert "has the content of evaluation slide held/held_out" in records["mine/of/shuffled"]["leak"]


def test_without_a_gene_table_the_genes_are_those_of_the_slides_that_enter(folder: Path, tmp_path: Path):
    slides = tmp_path / "slides"
    slides.mkdir()
    for name, given in (("s0", "sample 1"), ("s2", "s.1"), ("s3", "s.2"), ("broken", "broken")):
        shutil.copyfile(folder / f"{name}.h5ad", slides / f"{given}.h5ad")
    adata = read_slide(folder / "s1.h5ad")
    adata.var_names = [f"OTHER{number}" for number in range(adata.n_vars)]
    adata.write_h5ad(slides / "left_out.h5ad")
    (slides / "._sample 1.h5ad").write_bytes(b"what macOS leaves")
    run = build("--slides", slides, "--exclude", "left_out", "--output", tmp_path / "c", "--min_genes", 60)
    assert run.returncode == 1, run.stderr[-2000:]
    assert "failed: broken: could not be read" in run.stderr
    assert "Traceback" not in run.stderr
    assert Corpus(tmp_path / "c").column("id") == ["s.1", "s.2", "sample_1"]
    assert not [gene for gene in Corpus(tmp_path / "c").vocabulary.gene_ids if gene.startswith("OTHER")]


def test_two_builds_in_one_folder_do_not_disturb_each_other(folder: Path, tmp_path: Path):
    options = ("--slides", folder / "s0.h5ad", "--gene_table", folder / "genes.tsv", "--output", tmp_path / "c")
    with FileLock(tmp_path / "c" / ".build" / "build.lock"):
        run = build(*options)
    assert run.returncode == 2
    assert "Another build works in" in run.stderr
    assert not list((tmp_path / "c" / "data").iterdir())


def test_fingerprints_of_a_corpus_given_back_to_it_are_no_more(folder: Path, tmp_path: Path):
    options = ("--slides", folder / "s0.h5ad", "--gene_table", folder / "genes.tsv", "--output", tmp_path / "c")
    assert build(*options, "--evaluation", folder / "held_out.h5ad").returncode == 0
    prints = tmp_path / "c" / "evaluation.npz"
    before = prints.read_bytes()
    assert build(*options, "--evaluation", prints, folder / "held_out.h5ad").returncode == 0
    assert prints.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "No slides were given"),
        (("--slides", "nowhere"), "No slide matches"),
        (("--slides", "{folder}", "--shard", "2/2"), "expected i/n"),
        (("--slides", "{folder}", "--shard", "0/2"), "A gene table is needed"),
        (("--slides", "{folder}/s0.h5ad", "{folder}/sub/s0.h5ad"), "Two sources are called 's0' ("),
        (("--slides", "{folder}/s0.h5ad", "--min_counts", "0"), "min_counts is 0"),
    ],
)
def test_mistakes_end_in_one_sentence(folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str):
    run = build("--output", tmp_path / "c", *(a.format(folder=folder) for a in arguments))
    assert run.returncode == 2
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "c" / "arrow").exists()


@pytest.mark.real_data
def test_the_real_corpus_has_37_sections(real_data: Path, tmp_path: Path):
    run = subprocess.run(
        command(
            *("--slides", real_data / "slides", "--gene_table", real_data / "genes" / "ensembl_symbol.tsv"),
            *("--output", tmp_path / "c", "--rank", 0),
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    totals = report_of(tmp_path / "c")
    assert sum(record.get("spots_in", 0) for record in totals["records"]) == 23_390
    built = Corpus(tmp_path / "c")
    assert len(built) == 37
    assert sum(built.column("num_spots")) == sum(r.get("num_spots", 0) for r in totals["records"]) > 22_000
    labelled = pd.read_csv(real_data / "slides.tsv", sep="\t").query("role == 'labelled'")["name"]
    assert not set(built.column("id")) & set(labelled)


def test_anndata_is_not_changed_by_its_row(slides: dict[str, AnnData], vocabulary):
    from data_processing.st_corpus import slide_row

    adata, before = slides["square"], slides["square"].copy()
    slide_row(adata, vocabulary, "x")
    assert (adata.X != before.X).nnz == 0
    pd.testing.assert_frame_equal(adata.obs, before.obs)
