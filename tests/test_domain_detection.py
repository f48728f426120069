"""The evaluation script on a phantom slide: all rows, honest labels of what was seen, the same numbers every time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from anndata import AnnData

ROOT = Path(__file__).parents[1]
BASELINES = ["raw", "raw, 3x3 mean", "raw, 5x5 mean", "PCA", "PCA, 3x3 mean", "coordinates only"]


def evaluate(model: Path, slides: list[Path], output: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "eval" / "run_domain_detection.py"), "--model", str(model)]
    return subprocess.run(
        [*command, "--slides", *map(str, slides), "--output_dir", str(output), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        check=False,
    )


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory, tissue) -> Path:
    path = tmp_path_factory.mktemp("evaluation") / "held_out.h5ad"
    tissue.slide(8, height=18, width=18, median_counts=300).write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def report(slide: Path, checkpoint: Path) -> Path:
    output = slide.parent / "report"
    run = evaluate(checkpoint, [slide], output, "--num_splits", "3", "--mlp_epochs", "3")
    assert run.returncode == 0, run.stderr[-3000:]
    return output


def test_every_row_and_probe_is_there(report: Path):
    results = json.loads((report / "results.json").read_text())
    rows = {(r["features"], r["probe"]): r for r in results["records"]}
    models = [f"{m}{s}" for m in ("untrained, random start", "stimg") for s in ("", ", 3x3 mean")]
    assert set(rows) == {(f, p) for f in [*BASELINES, *models] for p in ("knn", "linear", "mlp")}
    for row in rows.values():
        assert 0 <= row["accuracy"] <= 1
        assert -1 <= row["ari"] <= 1
    assert rows["raw, 3x3 mean", "linear"]["ari"] > rows["raw", "linear"]["ari"]
    table = (report / "table.md").read_text()
    assert all(name in table for name in BASELINES)
    for figure in ("maps.png", "ari.png"):
        assert (report / figure).read_bytes().startswith(b"\x89PNG")


def test_results_tell_how_they_were_made(report: Path):
    metadata = json.loads((report / "results.json").read_text())["metadata"]
    assert metadata["slides"] == ["held_out"]
    assert metadata["num_splits"] == 3
    assert metadata["seed"] == 0
    assert str(ROOT) not in (report / "results.json").read_text()


def test_same_command_same_numbers(report: Path, slide: Path, checkpoint: Path):
    again = slide.parent / "again"
    assert evaluate(checkpoint, [slide], again, "--num_splits", "3", "--mlp_epochs", "3").returncode == 0
    a, b = (json.loads((folder / "results.json").read_text())["records"] for folder in (report, again))
    assert a == b


def test_bad_arguments_end_in_one_sentence(slide: Path, checkpoint: Path, slides: dict[str, AnnData], tmp_path: Path):
    run = evaluate(checkpoint, [slide], tmp_path / "out", "--probes", "forest")
    assert run.returncode == 2
    assert "Unknown probes ['forest']" in run.stderr.splitlines()[-1]
    unlabelled = slides["square"].copy()
    del unlabelled.obs["label"]
    unlabelled.write_h5ad(tmp_path / "unlabelled.h5ad")
    run = evaluate(checkpoint, [tmp_path / "unlabelled.h5ad"], tmp_path / "out")
    assert run.returncode == 2
    assert "obs has no column 'label'" in run.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
