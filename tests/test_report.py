import json
import shutil
import subprocess
import sys
from datetime import datetime

import numpy as np
import pytest

from eval import results
from eval.report import plot_ari, results_table, write_report
from eval.results import run_metadata


def _record(slide, features, probe, accuracy=0.5, ari=0.25, **extra):
    deviations = {"accuracy_sd": 0.01, "ari_sd": 0.02, "macro_f1_sd": 0.03}
    named = {"slide": slide, "features": features, "probe": probe, "accuracy": accuracy, "ari": ari, "macro_f1": 0.4}
    return named | deviations | extra


@pytest.fixture
def records():
    return [
        _record("B1", "raw", "knn", 0.5, 0.2),
        _record("A1", "raw", "knn", 0.7, np.float64(0.4)),
        _record("B1", "raw", "mlp", 0.6, 0.3, seen="yes"),
        _record("B1", "PCA", "mlp", 0.8, np.float32(0.5)),
    ]


def test_the_table_averages_over_slides_in_order_of_appearance(records):
    lines = results_table(records).splitlines()
    assert lines[2:6] == [
        "| features | k-NN | MLP |",
        "| --- | --- | --- |",
        "| raw | 0.600 / 0.300 | 0.600 / 0.300 (1 of 2) |",
        "| PCA | – | 0.800 / 0.500 (1 of 2) |",  # noqa: RUF001
    ]
    assert [line for line in lines if line.startswith("## ")] == ["## B1", "## A1"]
    assert "| raw | 0.500 ± 0.010 / 0.200 ± 0.020 | 0.600 ± 0.010 / 0.300 ± 0.020 | yes |" in lines  # B1
    assert lines[-1] == "| raw | 0.700 ± 0.010 / 0.400 ± 0.020 | – |"  # noqa: RUF001 - A1: no "seen" there


def test_report_files_hold_records_and_metadata(records, tmp_path):
    text = write_report(records, {"seed": np.int64(3), "shape": np.arange(2)}, tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert (folder / "table.md").read_text(encoding="utf-8") == text == results_table(records)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["metadata"] == {"seed": 3, "shape": [0, 1]}
    assert results["records"] == records
    assert sorted(path.name for path in folder.iterdir()) == ["results.json", "table.md"]


@pytest.mark.parametrize(("metadata", "error"), [({"x": float("nan")}, ValueError), ({"x": object()}, TypeError)])
def test_what_json_cannot_hold_is_refused_and_an_old_report_stays(records, tmp_path, metadata, error):
    write_report(records, {"run": 1}, tmp_path)
    with pytest.raises(error):
        write_report(records[:1], metadata, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["metadata"] == {"run": 1}
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == results_table(records)


def test_an_interrupted_write_leaves_the_old_file_and_no_rest(records, tmp_path, monkeypatch):
    write_report(records, {"run": 1}, tmp_path)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(results.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_report(records, {"run": 2}, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["metadata"] == {"run": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "table.md"]


def test_incomplete_or_repeated_records_are_refused(records, tmp_path):
    with pytest.raises(ValueError, match="no records"):
        write_report([], {}, tmp_path)
    with pytest.raises(ValueError, match="lacks ari_sd"):
        results_table([{key: value for key, value in records[0].items() if key != "ari_sd"}])
    with pytest.raises(ValueError, match="two records of slide 'B1'"):
        plot_ari([records[0], records[0]], tmp_path / "ari.png")


def test_metadata_tell_seed_versions_date_and_extras():
    metadata = run_metadata(5, slides=["A1"])
    assert metadata["seed"] == 5
    assert metadata["slides"] == ["A1"]
    assert metadata["versions"]["numpy"] == np.__version__
    assert set(metadata["versions"]) == {"python", "torch", "transformers", "scikit-learn", "numpy", "anndata"}
    assert datetime.fromisoformat(metadata["date"]).utcoffset().total_seconds() == 0
    json.dumps(metadata)


def test_the_command_line_names_no_folder_of_the_machine(monkeypatch, tmp_path):
    command = [f"{tmp_path}/run.py", "--config", f"{tmp_path}/a.yaml", f"--output={tmp_path}/deep//out/"]
    command += [f"--slides={tmp_path}/x.h5ad,{tmp_path}/y.h5ad", "train/configs/b.yaml", "hub/name", "https://x.org/a"]
    monkeypatch.setattr(sys, "argv", command)
    expected = ["run.py", "--config", "a.yaml", "--output=out/", "--slides=x.h5ad,y.h5ad"]
    assert run_metadata(0)["command"] == [*expected, "train/configs/b.yaml", "hub/name", "https://x.org/a"]


def _git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_the_checkout(tmp_path):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    assert results._commit(checkout) is None  # no repository
    _git(checkout, "init")
    assert results._commit(checkout) is None  # no commit yet
    (checkout / "file").write_text("1")
    _git(checkout, "add", "file")
    _git(checkout, "commit", "-m", "one")
    head = _git(checkout, "rev-parse", "HEAD")
    assert results._commit(checkout) == head
    (checkout / "results.json").write_text("{}")  # outputs do not make the code another
    assert results._commit(checkout) == head
    (checkout / "file").write_text("2")
    assert results._commit(checkout) == f"{head}-dirty"
    (checkout / "copy").mkdir()
    assert results._commit(checkout / "copy") is None  # another project's repository


def test_no_git_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_metadata(0)["commit"] is None


def test_the_figure_is_a_png_that_shows_every_row(records, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (drawn.append(self), save(self, *args, **kwargs))[1]
    )
    plot_ari(records, tmp_path / "ari.png")
    assert (tmp_path / "ari.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["ari.png"]
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["raw", "PCA"]
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers]
    np.testing.assert_allclose(widths, [[0.3, np.nan], [0.3, 0.5]], rtol=1e-6)
