"""The benchmarks: that they compare like with like, run from the command line, and hold what they promise of memory."""

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.run_throughput import app
from eval.throughput import PeakMemory, binned_phantom, textbook_window, window_non_zeros
from eval.training_throughput import VIT_MAE, StepSizes, build_model, full_windows, step_multiplications
from modeling_stimg import STImageMAEModel, STPatchProcessor

ROOT = Path(__file__).parents[1]
LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "eval" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        check=False,
    )


def test_bincount_and_textbook_work_on_the_same_window(images, processor: STPatchProcessor):
    image, corner = images["square"], (2, 3)
    batch = processor(image, windows=[corner], genes=image.measured)
    genes, values = window_non_zeros(image, corner, processor.window_size)
    dense = batch["pixel_values"][0]
    assert (dense != 0).sum() == len(genes)
    sums = np.bincount(genes, values, minlength=image.pad_id)[image.measured]
    np.testing.assert_allclose(sums, dense.sum((1, 2)), rtol=1e-5)
    textbook = textbook_window(image, corner, processor.window_size, 20, np.random.default_rng(0))
    assert textbook.shape == (20, 6, 6)
    channels = {channel.tobytes() for channel in dense}
    assert all(channel.tobytes() in channels for channel in textbook)


def test_windows_benchmark_runs_from_the_command_line(slides, tmp_path: Path):
    slides["square"].write_h5ad(tmp_path / "square.h5ad")
    options = ("--window-size", 6, "--num-channels", 32, "--num-batches", 2, "--batch-size", 4)
    run = run_script("run_throughput.py", "windows", tmp_path / "square.h5ad", "--output-dir", tmp_path, *options)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    record = results["records"][0]
    assert record["slide"] == "square"
    assert record["batch_ratio"] > 0
    assert f"{record['batch_ratio']:.2f}" in (tmp_path / "table.md").read_text()
    assert results["metadata"]["window_size"] == 6
    run = run_script("run_throughput.py", "windows", tmp_path / "none.h5ad")
    assert run.returncode == 2
    assert "No slide matches" in run.stderr


def test_panel_script_shows_that_a_cut_slide_keeps_its_values(tissue, tmp_path: Path):
    for seed in range(3):
        tissue.slide(seed, array="square", height=10, width=10).write_h5ad(tmp_path / f"s{seed}.h5ad")
    run = run_script(
        "run_panel.py",
        *("--slide", tmp_path / "s0.h5ad", "--corpus", tmp_path / "s*.h5ad", "--num_genes", 60),
        *("--output_dir", tmp_path / "out"),
    )
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["metadata"]["corpus"] == ["s1", "s2"], "the slide itself is left out"
    for record in results["records"]:
        assert record["10,000: inflation"] == pytest.approx(1 / record["share_here"], rel=0.1)
        assert record["panel: inflation"] == pytest.approx(1, abs=0.05)
        assert record["panel: error"] < 0.3 * record["10,000: error"]


@LINUX
def test_peak_memory_sees_what_is_gone_at_the_end():
    # Pages of its own: what NumPy asks for may come from memory that this process has freed and kept.
    with PeakMemory() as memory:
        before = memory.peak
        pages = mmap.mmap(-1, 320_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        np.frombuffer(pages, dtype=np.uint8)[:] = 1
        pages.close()
    assert memory.peak - before > 300e6


GENES = [f"PHANTOM{i}" for i in range(40)]


def test_binned_phantom_has_the_density_that_was_asked_for():
    adata = binned_phantom(50, GENES, 7, seed=0)
    assert (np.diff(adata.X.indptr) == 7).all()
    assert adata.X.has_canonical_format
    assert adata.X.data.min() >= 1
    with pytest.raises(ValueError, match="genes_per_bin is 50"):
        binned_phantom(5, GENES, 50, seed=0)


@LINUX
def test_half_a_million_bins_are_embedded_in_6_gb(tmp_path: Path):
    """From CSR to embeddings, as large as Visium HD; a matrix of bins x genes would take 36 GB."""
    run = run_script("run_throughput.py", "memory", "--output-dir", tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    (record,) = json.loads((tmp_path / "results.json").read_text())["records"]
    assert record["non_zeros"] >= 200 * 500_000
    assert record["embedding"] == [500_000, 128]
    assert record["finite"]
    assert record["csr_gb"] < record["peak_gb"] < 6


@LINUX
def test_memory_of_a_model_of_ones_own(checkpoint: Path, tmp_path: Path):
    options = ("--model", checkpoint, "--num-bins", 400, "--genes-per-bin", 5)
    run = run_script("run_throughput.py", "memory", "--output-dir", tmp_path, *options)
    assert run.returncode == 0, run.stderr[-3000:]
    (record,) = json.loads((tmp_path / "results.json").read_text())["records"]
    model = STImageMAEModel.from_pretrained(checkpoint)
    assert record["embedding"] == [400, model.config.hidden_size]
    assert record["genes"] == model.config.vocab_size - 1, "not the genes that it knows"
    assert record["finite"]


TINY = ("--window-size", 4, "--num-channels", 16, "--num-genes", 60, "--hidden-size", 64, "--num-layers", 1)


def test_embedding_benchmark_runs_from_the_command_line(slides, checkpoint: Path, tmp_path: Path):
    for name, slide in slides.items():
        slide.write_h5ad(tmp_path / f"{name}.h5ad")
    output = tmp_path / "out"
    command = ["embedding", str(tmp_path / "*.h5ad"), "--model", str(checkpoint), "--output-dir", str(output)]
    threads = torch.get_num_threads()
    app([*command, "--threads", str(threads)], standalone_mode=False)
    *records, total = json.loads((output / "results.json").read_text())["records"]
    assert {r["slide"]: r["spots"] for r in records} == {name: slide.n_obs for name, slide in slides.items()}
    assert total["spots"] == sum(r["spots"] for r in records)
    seconds = sum(total[part] for part in ("read_seconds", "embed_seconds", "write_seconds"))
    assert total["spots_per_second"] == pytest.approx(total["spots"] / seconds)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", *[".h5ad"] * len(slides)]


def test_training_benchmark_runs_from_the_command_line(tmp_path: Path):
    options = ("--batch-size", 2, "--num-rounds", 3, "--num-batches", 2, "--num-workers", 0)
    run = run_script("run_throughput.py", "training", "--output-dir", tmp_path, *TINY, *options)
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    steps = {r["model"]: r for r in results["records"] if "model" in r}
    assert list(steps) == ["vit_mae", "entry", "site", "mixed", "mixed+residual"]
    assert steps["vit_mae"]["step_ratio"] == 1
    assert all(r["forward_backward_ratio"] > 0 for r in steps.values())
    ready, made = (r for r in results["records"] if "source" in r)
    assert ready["of_ready_made"] == 1
    assert 0 < made["wait_share"] < 1
    assert results["metadata"]["batch_size"] == 2
    table = (tmp_path / "table.md").read_text()
    assert f"{steps['site']['step_ratio']:.2f}" in table
    assert f"{made['wait_share']:.1%}" in table


def test_both_models_of_the_training_benchmark_have_the_same_transformer():
    sizes = StepSizes(batch_size=2, window_size=4, num_channels=16, num_genes=60, hidden_size=64, num_layers=2)
    theirs, ours = (build_model(name, sizes, "sdpa") for name in (VIT_MAE, "site"))
    counts = [
        (sum(p.numel() for p in encoder.layers.parameters()), sum(p.numel() for p in layers.parameters()))
        for encoder, layers in ((theirs.vit, theirs.decoder.decoder_layers), (ours.stimg, ours.decoder.layers))
    ]
    assert counts[0] == counts[1]
    batch = full_windows(sizes, seed=0)
    assert batch["pixel_mask"].all()
    assert all(len(set(ids)) == 16 for ids in batch["gene_ids"].tolist())
    assert step_multiplications(sizes, "site") < step_multiplications(sizes, "entry")


@LINUX
def test_training_memory_benchmark_runs_from_the_command_line(tmp_path: Path):
    options = ("--batch-size", 2, "--large-window", 8)
    run = run_script("run_throughput.py", "training-memory", "--output-dir", tmp_path, *TINY, *options)
    assert run.returncode == 0, run.stderr[-3000:]
    records = json.loads((tmp_path / "results.json").read_text())["records"]
    assert [(r["batch_size"], r["window_size"]) for r in records] == [(2, 4), (1, 8)]
    assert all(0 < r["growth_gb"] < r["peak_gb"] for r in records)
