import csv
import json
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from eval import results
from eval.domain_figures import MAPS_FILE, _name_on_tissue, plot_bars, plot_maps_of_slide, plot_smoothing
from eval.domain_report import csv_table, results_table, slides_table
from eval.report import main, merged
from eval.results import run_metadata, write_results


def _record(slide, features, probe, accuracy=0.5, ari=0.25, set_name="her2", smoothing=0, split="spots", **extra):
    place = {"set": set_name, "slide": slide, "split": split, "features": features, "smoothing": smoothing}
    scores = {"accuracy": accuracy, "accuracy_sd": 0.01, "ari": ari, "ari_sd": 0.02, "macro_f1": 0.4}
    return place | {"probe": probe} | scores | {"macro_f1_sd": 0.03} | extra


@pytest.fixture
def records():
    """Two small slides of one set and a single one of another."""
    return [
        _record("B1", "raw", "knn", 0.5, 0.2),
        _record("B1", "raw", "knn", 0.6, 0.3, smoothing=1),
        _record("A1", "raw", "knn", 0.7, np.float64(0.4)),
        _record("A1", "raw", "knn", 0.8, 0.5, smoothing=1),
        _record("h1", "raw", "knn", 0.9, 0.8, set_name="heart"),
        _record("B1", "patch", "knn", 0.6, 0.3, seen="same patient"),
        _record("A1", "patch", "knn", 0.8, np.float32(0.5), seen="same patient"),
        _record("h1", "patch", "knn", 1.0, 0.9, set_name="heart", seen="unseen patient"),
        _record("B1", "raw", "mlp", 0.5, 0.2),
        {
            "set": "her2",
            "slide": "B1",
            "split": "no labels",
            "features": "raw",
            "smoothing": 0,
            "probe": "leiden",
            "ari": 0.7,
        },
    ]


def _write(records, metadata, folder):
    write_results(folder, records, metadata, "table")
    return folder / "results.json"


def test_means_are_taken_within_sets_and_then_over_sets(records):
    lines = results_table(records).splitlines()
    assert lines[lines.index("### spots, k-NN") + 2 :][:6] == [
        "Trained on 20 % of a slide's spots at random; 3 slide(s).",
        "",
        "| features | none | 3x3 | seen |",
        "| --- | --- | --- | --- |",
        # not the mean over three slides, 0.700 / 0.467
        "| raw | 0.750 / 0.550 | 0.700 / 0.400 (2 of 3) | – |",  # noqa: RUF001
        "| patch | 0.850 / 0.650 | – | 2 same patient, 1 unseen patient |",  # noqa: RUF001
    ]
    assert "| raw | 0.500 / 0.200 (1 of 3) | – |" in lines  # noqa: RUF001 - the MLP
    assert "| raw | 0.700 | – |" in lines  # noqa: RUF001 - Leiden knows no accuracy


def test_the_papers_layout_has_a_column_a_set(records):
    lines = results_table(records).splitlines()
    start = lines.index("## By set, features as they are")
    assert lines[start + 4 : start + 8] == [
        "| features | her2 | heart | mean |",
        "| --- | --- | --- | --- |",
        "| raw | 0.600 / 0.300 | 0.900 / 0.800 | 0.750 / 0.550 |",
        "| patch | 0.700 / 0.400 | 1.000 / 0.900 | 0.850 / 0.650 |",
    ]
    assert [line for line in lines if line.startswith("## ")] == [
        "## Mean over sets",
        "## By set, features as they are",
        "## Set her2",
        "## Set heart",
    ]
    one = results_table([record for record in records if record["set"] == "heart"])
    assert [line for line in one.splitlines() if line.startswith("## ")] == ["## Set heart"]


def test_notes_of_the_results_are_printed(records):
    metadata = {"sets": {"her2": {"notes": ["B1: trained on A1."]}}, "smaller_than_a_window": {"patch": ["h1"]}}
    lines = results_table(records, metadata).splitlines()
    assert lines[lines.index("## Notes") + 2 :] == ["- B1: trained on A1.", "- patch: no window fits into h1."]


def test_slides_stand_with_their_deviations(records):
    lines = slides_table(records).splitlines()
    start = lines.index("## her2: B1")
    assert lines[start + 2 : start + 8] == [
        "### spots, k-NN",
        "",
        "| features | none | 3x3 | seen |",
        "| --- | --- | --- | --- |",
        "| raw | 0.500 ± 0.010 / 0.200 ± 0.020 | 0.600 ± 0.010 / 0.300 ± 0.020 | – |",  # noqa: RUF001
        "| patch | 0.600 ± 0.010 / 0.300 ± 0.020 | – | same patient |",  # noqa: RUF001
    ]
    assert "| raw | 0.700 | – |" in lines  # noqa: RUF001


def test_the_csv_holds_every_level(records):
    rows = list(csv.DictReader(csv_table(records).splitlines()))
    assert [row["level"] for row in rows].count("slide") == len(records)
    place = {"split": "spots", "features": "raw", "smoothing": "0", "probe": "knn"}
    found = {(r["level"], r["set"]): r for r in rows if r["level"] != "slide" and place.items() <= r.items()}
    assert set(found) == {("set", "her2"), ("set", "heart"), ("all", "")}
    assert float(found["set", "her2"]["ari"]) == pytest.approx(0.3)
    assert float(found["set", "her2"]["ari_sd"]) == pytest.approx(0.1)  # over slides
    assert float(found["all", ""]["ari"]) == pytest.approx(0.55)
    assert float(found["all", ""]["ari_sd"]) == pytest.approx(0.25)  # over sets
    assert found["all", ""]["num_slides"] == "3"


def test_several_results_make_one_report(records, tmp_path, capsys):
    first = _write(records[:5], {"sets": {"her2": {"notes": ["one."]}}}, tmp_path / "a")
    second = _write(records[4:], {"sets": {"heart": {"notes": ["two."]}}}, tmp_path / "b")  # one cell in both
    maps = {"slide": "B1", "positions": [[0, 0], [1, 0], [0, 1]], "pitch": 1.0, "classes": ["x", "y"]}
    maps["maps"] = {"labels": ["x", "y", None], "raw": ["y", "y", "x"]}
    second.with_name(MAPS_FILE).write_text(json.dumps({"her2": maps}))
    main([str(first), str(second), "--output_dir", str(tmp_path / "report")])
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text + "\n"
    assert results_table(records) in text
    assert "- one.\n- two." in text
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {"report.md", "slides.md", "report.csv", "ari.png", "smoothing.png", "maps_her2.png"}


def test_results_that_contradict_each_other_or_are_none_are_refused(records, tmp_path):
    first = _write(records, {}, tmp_path / "a")
    second = _write([records[0] | {"ari": 0.9}], {}, tmp_path / "b")
    with pytest.raises(ValueError, match="other numbers than the files before it"):
        merged([first, second])
    (tmp_path / "other.json").write_text("[]")
    for text in ("[]", "{}", '{"records": [], "metadata": {}}', '{"records": [{"set": "her2"}], "metadata": {}}', "a"):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=r"other\.json does not hold results of eval/run_domain_detection"):
            merged([tmp_path / "other.json"])


def _region(slide, window, predictor, mse, mask=4, **extra):
    sizes = {"region": "square", "mask_size": mask, "window_size": window}
    errors = {name: mse for metric in ("mse", "mae", "pearson") for name in (metric, f"{metric}_sd")}
    return {"slide": slide, **sizes, "predictor": predictor, **errors, "pearson_genes": 9.0, **extra}


def test_regions_have_their_tables_curves_and_maps(tmp_path, drawn):
    of_slide = {
        name: [_region(name, window, p, mse) for window in (8, 12) for p, mse in (("zeros", 9.0), ("kriging", value))]
        for name, value in (("a", 0.25), ("b", 0.75))
    }
    told = {"units": "log1p of counts per 10,000", "skipped": []}
    of_slide["c"] = [_region("c", 8, "kriging", 5.0)]  # in some windows alone: it would bend the curve
    paths = [_write(found, told, tmp_path / name) for name, found in of_slide.items()]
    maps = {"title": "a", "units": "u", "predictor": "stimg", "positions": [[0, 0], [1, 0]], "hidden": [True, False]}
    maps |= {"genes": ["G1"], "measured": [[1.0, 2.0]], "predicted": [[1.5, 2.0]]}
    paths[1].with_name("gene_maps.json").write_text(json.dumps(maps))
    main([*map(str, paths), "--output_dir", str(tmp_path / "report")])
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {"report.md", "regions.csv", "regions.png", "genes_1.png"}
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "| kriging | 2.0000 | 2.0000 | 2.0000 | 9 | – |" in text  # noqa: RUF001
    rows = list(csv.DictReader((tmp_path / "report" / "regions.csv").read_text(encoding="utf-8").splitlines()))
    assert [(row["slide"], float(row["mse"])) for row in rows if row["predictor"] == "kriging"] == [
        *[("a", 0.25)] * 2,
        *[("b", 0.75)] * 2,
        ("c", 5.0),
    ]
    curve = drawn[0].axes[0]
    (line,) = curve.get_lines()  # zeros would flatten the rest
    assert line.get_xydata().tolist() == [[8, 0.5], [12, 0.5]]
    assert line.get_label() == "kriging"
    assert "log1p" in drawn[0].get_supylabel()
    assert [ax.get_title() for ax in drawn[1].axes[:3]] == ["G1: measured", "predicted (stimg)", "predicted - measured"]


def test_results_in_other_units_are_not_averaged(tmp_path):
    for name, units in (("a", "log1p of counts per 1,000"), ("b", "log1p of counts per 10,000")):
        _write([_region(name, 8, "kriging", 0.5)], {"units": units, "skipped": []}, tmp_path / name)
    with pytest.raises(ValueError, match=r"/a, .*/b differ in units"):
        main([str(tmp_path / name / "results.json") for name in "ab"] + ["--output_dir", str(tmp_path / "report")])
    assert not (tmp_path / "report").exists()


def test_results_of_other_settings_make_no_report_together(records, tmp_path):
    """Sets that were scored in other ways share no cell that could contradict; their mean means nothing."""
    output = tmp_path / "report"

    def report(first: dict, second: dict) -> None:
        for name, told, set_name in (("a", first, "her2"), ("b", second, "heart")):
            _write([r for r in records if r["set"] == set_name], told, tmp_path / name)
        main([*(str(tmp_path / name / "results.json") for name in "ab"), "--output_dir", str(output)])

    protocol = {"splits": ["spots"], "probes": ["knn"], "num_splits": 10, "train_share": 0.4, "tile_side": 6}
    for setting in ({"num_splits": 2}, {"train_share": 0.5}):
        with pytest.raises(ValueError, match=f"/b were made with another {next(iter(setting))} than those of .*/a"):
            report({"protocol": protocol}, {"protocol": protocol | setting})
    with pytest.raises(ValueError, match=r"/b were made with another model called 'stimg' than those of .*/a"):
        report({"models": {"stimg": {"slides": ["x"]}}}, {"models": {"stimg": {"slides": ["y"]}}})
    assert not output.exists()
    report({"protocol": protocol}, {"protocol": protocol | {"tile_side": 3}})  # no tiles in either
    assert "Trained on 40 % of a slide's spots" in (output / "report.md").read_text(encoding="utf-8")


def test_regions_of_other_models_or_settings_are_not_averaged(tmp_path):
    told = {"units": "u", "skipped": [], "settings": {"num_genes": 512, "weights": {"stimg": "abc"}}}
    others = {"num_genes": {"num_genes": 20}, "model called 'stimg'": {"weights": {"stimg": "def"}}}
    for name, changed in others.items():
        _write([_region("a", 8, "stimg", 0.5)], told, tmp_path / "a")
        _write([_region("b", 8, "stimg", 0.7)], told | {"settings": told["settings"] | changed}, tmp_path / "b")
        with pytest.raises(ValueError, match=f"/b were made with another {name} than those of"):
            main([*(str(tmp_path / n / "results.json") for n in "ab"), "--output_dir", str(tmp_path / "report")])


def test_the_table_tells_the_share_that_trained(records):
    text = results_table(records, {"protocol": {"train_share": 0.35}})
    assert "Trained on 35 % of a slide's spots at random; 3 slide(s)." in text
    assert "20 %" not in text


def test_a_slide_in_two_sets_counts_in_both(records):
    again = _record("B1", "raw", "knn", 0.5, 0.2, set_name="slides")
    assert "| raw | 0.667 / 0.433 |" in results_table([*records, again])
    assert " of 1)" not in results_table([records[0], again])
    assert "2 slide(s)" in results_table([records[0], again])


def test_report_files_hold_records_and_metadata(records, tmp_path):
    write_results(tmp_path / "new" / "folder", records, {"seed": np.int64(3), "shape": np.arange(2)}, "table")
    folder = tmp_path / "new" / "folder"
    assert (folder / "table.md").read_text(encoding="utf-8") == "table"
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert content["metadata"] == {"seed": 3, "shape": [0, 1]}
    assert content["records"] == records
    assert sorted(path.name for path in folder.iterdir()) == ["results.json", "table.md"]


@pytest.mark.parametrize(("metadata", "error"), [({"x": float("nan")}, ValueError), ({"x": object()}, TypeError)])
def test_what_json_cannot_hold_is_refused_and_an_old_report_stays(records, tmp_path, metadata, error):
    write_results(tmp_path, records, {"run": 1}, "old")
    with pytest.raises(error):
        write_results(tmp_path, records[:1], metadata, "new")
    assert json.loads((tmp_path / "results.json").read_text())["metadata"] == {"run": 1}
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == "old"


def test_an_interrupted_write_leaves_the_old_file_and_no_rest(records, tmp_path, monkeypatch):
    write_results(tmp_path, records, {"run": 1}, "old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(results.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_results(tmp_path, records, {"run": 2}, "new")
    assert json.loads((tmp_path / "results.json").read_text())["metadata"] == {"run": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "table.md"]


def test_incomplete_or_repeated_records_are_refused(records, tmp_path):
    with pytest.raises(ValueError, match="no records"):
        results_table([])
    with pytest.raises(ValueError, match="lacks ari"):
        results_table([{key: value for key, value in records[0].items() if key != "ari"}])
    with pytest.raises(ValueError, match="two records of set 'her2', slide 'B1'"):
        plot_bars([records[0], records[0]], tmp_path / "ari.png")


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


@pytest.fixture
def drawn(monkeypatch):
    """Every figure that is saved."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))[1]
    )
    return figures


def test_bars_show_every_row_with_its_value(records, tmp_path, drawn):
    plot_bars(records, tmp_path / "ari.png")
    assert (tmp_path / "ari.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["ari.png"]
    spots, no_labels = drawn[0].axes
    assert [label.get_text() for label in spots.get_yticklabels()] == ["raw", "patch"]
    widths = [[bar.get_width() for bar in bars] for bars in spots.containers]
    np.testing.assert_allclose(widths, [[0.55, 0.65], [0.2, np.nan]], rtol=1e-6)
    assert spots.get_xlabel() == no_labels.get_xlabel() == "adjusted Rand index"
    fills = [(bars[0].get_facecolor(), bars[0].get_hatch()) for bars in (*spots.containers, *no_labels.containers)]
    assert len(set(fills)) == len({hatch for _, hatch in fills}) == 3  # told apart without colours, too
    assert drawn[0].get_suptitle() == "Features as they are: mean over 2 set(s), 3 slide(s)"
    plot_bars([record for record in records if record["smoothing"] == 1], tmp_path / "ari.png")
    assert drawn[1].get_suptitle() == "Features after a 3x3 mean: mean over 1 set(s), 2 slide(s)"


def test_curves_over_smoothing_are_named_and_marked(records, tmp_path, drawn):
    more = [_record("h1", name, "knn", ari=0.1 * r, set_name="heart", smoothing=r) for name in "ab" for r in (0, 1)]
    plot_smoothing([*records, *more], tmp_path / "smoothing.png")
    (axes,) = [ax for ax in drawn[0].axes if ax.axison]
    assert axes.get_xlabel() == "sites of the neighbourhood mean"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["none", "3x3"]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.55, 0.4])
    assert [text.get_text() for text in axes.texts] == ["a", "b", "raw"]  # by the height of their ends
    assert len({line.get_marker() for line in axes.lines}) == 3


def test_maps_give_each_domain_one_colour_and_name_it(tmp_path: Path, drawn):
    positions = np.stack(np.divmod(np.arange(40), 8), axis=1)
    classes = [f"domain {i}" for i in range(10)]
    labels = [classes[i % 10] for i in range(39)] + [None]
    maps = {"labels": labels, "raw": labels[::-1]}
    content = {"slide": "B1", "positions": positions.tolist(), "pitch": 1.0, "classes": classes, "maps": maps}
    plot_maps_of_slide(content, tmp_path / "maps.png")
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")
    figure = drawn[0]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*classes, "no label"]
    handles = [(handle.get_color(), handle.get_marker()) for handle in legend.legend_handles]
    assert len(set(handles)) == 11
    assert [text.get_text() for text in figure.axes[0].texts] == classes
    for collections in zip(*(ax.collections for ax in figure.axes), strict=True):
        assert len({tuple(c.get_facecolor()[0]) for c in collections}) == 1


def test_a_domains_name_stands_in_its_thickest_part_however_many_spots_it_has():
    from modeling_stimg.plotting import new_figure

    rng = np.random.default_rng(0)
    positions = rng.integers(0, 60, (400, 2)).astype(float)
    ax = new_figure(1, 1).subplots()
    _name_on_tissue(ax, positions, np.ones(400, dtype=bool), "here")
    crowd = (np.abs(positions[:, None] - positions).max(-1) < 6).sum(1)
    assert ax.texts[0].get_position() == tuple(positions[crowd.argmax()])
    many = rng.random((60_000, 2)) * 3_000  # a matrix of their distances would take 58 GB
    _name_on_tissue(ax, many, np.ones(60_000, dtype=bool), "there")
