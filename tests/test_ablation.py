"""Ablations on phantom slides: each row from the model it names, resumed wherever stopped, recomputed if changed."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import accuracy_score, adjusted_rand_score
from sklearn.neighbors import KNeighborsClassifier

from data_processing.phantom import PhantomTissue
from data_processing.splits import encode_labels, spot_splits
from eval import domain_scores, run_ablation, run_domain_detection
from eval import report as report_of_several
from eval.ablation import read_grid, runs_of, windows_to_read
from eval.baselines.shuffled import shuffle_spots
from eval.baselines.variants import content_sha256, make_variant, train_variant
from eval.domain_scores import Protocol, plan_set
from eval.embedders import EncoderEmbedder
from eval.evaluation_sets import load_given_set
from eval.probes import score as scored
from eval.resumable import ScoreLog
from eval.run_ablation import GRID, main
from modeling_stimg import STImageMAEModel, STPatchProcessor, embed_slide, read_slide
from train import run_pretrain

TRAINING = {
    "window_size": 6,
    "num_channels": 24,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
    "mask_unit": "mixed",
    "per_device_train_batch_size": 4,
    "max_steps": 6,
    "learning_rate": 2e-3,
    "logging_steps": 1,
    "save_steps": 2,
    "save_strategy": "steps",
    "use_cpu": True,
    "num_cpu_threads": 1,
    "disable_tqdm": True,
}
FACTORS = {
    "window size": {
        "unit": "sites",
        "variants": {4: {"training": {"window_size": 4}}, 6: {}},
    },
    "gene draws": {"unit": "draws", "variants": {1: {}, 2: {"embedding": {"num_gene_draws": 2}}}},
    "readout": {"variants": {"spot": {"embedding": {"readout": "spot"}}, "both": {"embedding": {"readout": "both"}}}},
}


def write_grid(path: Path, slides: Path, factors: dict, **training: object) -> Path:
    fields = {"slides": [f"{slides}/s*.h5ad"], **TRAINING, **training}
    path.write_text(
        yaml.safe_dump({"training": fields, "embedding": {"stride": 3}, "factors": factors}, sort_keys=False)
    )
    return path


def run(grid: Path, output: Path, *options: str) -> Path:
    slides = str(grid.parent / "slides" / "held_out.h5ad")
    main(["--slides", slides, "--output_dir", str(output), "--grid", str(grid), "--num_splits", "2", *options])
    return output


def records_of(folder: Path) -> dict[tuple[str, str], dict]:
    records = json.loads((folder / "results.json").read_text())["records"]
    return {(record["factor"], record["variant"]): record for record in records}


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory, tissue: PhantomTissue) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    (folder / "slides").mkdir()
    for number, name in enumerate(("s0", "s1", "held_out")):
        slide = tissue.slide(number, height=12, width=11, median_counts=400)
        slide.write_h5ad(folder / "slides" / f"{name}.h5ad")
    return write_grid(folder / "grid.yaml", folder / "slides", FACTORS)


@pytest.fixture(scope="module")
def report(grid: Path) -> Path:
    return run(grid, grid.parent / "report")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The rows that are computed, as they are."""
    rows: list[tuple[str, str]] = []
    original = run_ablation.evaluate_run

    def evaluate_run(row, *arguments):
        rows.append((row.factor, row.variant))
        return original(row, *arguments)

    monkeypatch.setattr(run_ablation, "evaluate_run", evaluate_run)
    return rows


# ---------------------------------------------------------------------------- what is written


def test_rows_tables_and_figures_are_there(report: Path):
    rows = records_of(report)
    baselines = [("baseline", name) for name in ("raw", "raw, 3x3 mean", "raw, 5x5 mean", "raw, 7x7 mean")]
    of_grid = [(factor, str(v)) for factor, told in FACTORS.items() for v in told["variants"]]
    assert list(rows) == [*baselines, *of_grid]
    assert len({rows[row]["model"] for row in of_grid}) == 2, "one training a window size"
    assert rows["window size", "6"]["scores"] == rows["gene draws", "1"]["scores"] == rows["readout", "spot"]["scores"]
    assert rows["gene draws", "2"]["scores"] != rows["gene draws", "1"]["scores"]
    budget = rows["window size", "4"]["trained"]
    assert (budget["max_steps"], budget["num_windows"]) == (6, 24)
    assert 12 * 16 < budget["num_spots_seen"] <= 24 * 16
    for (factor, _), record in rows.items():
        columns = [(score["split"], score["smoothing"], score["probe"]) for score in record["scores"]]
        assert columns == [("spots", radius, probe) for radius in (0, 1) for probe in ("knn", "linear")]
        seen = {score.get("seen") for score in record["scores"]}
        assert seen == ({None} if factor == "baseline" else {"unseen patient"})
    table = (report / "table.md").read_text()
    assert [line[3:] for line in table.splitlines() if line.startswith("## ")] == ["baseline", *FACTORS]
    assert table.count("(base)") == 3
    assert "k-NN, 3x3 mean" in table
    with (report / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == (4 + 6) * 4 * 3, "of the slide, of the set, of all sets"
    first = [line for line in lines if (line["factor"], line["variant"]) == ("window size", "4")]
    assert [line["level"] for line in first] == ["slide"] * 4 + ["set"] * 4 + ["all"] * 4
    assert len({line["ari"] for line in first[::4]}) == 1, "one slide"
    ari, base = (rows["window size", size]["scores"][0]["ari"] for size in ("4", "6"))
    assert float(first[0]["ari"]) == ari
    assert float(first[0]["ari_less_base"]) == ari - base
    assert f"| {ari:.3f} ({ari - base:+.3f}) |" in table
    pictures = sorted(path.name for path in report.glob("*.png"))
    assert pictures == ["gene_draws.png", "window_size.png"], "factors of numbers have a curve"
    assert (report / "window_size.png").read_bytes().startswith(b"\x89PNG")
    assert str(report.parent) not in (report / "results.json").read_text(), (
        "this machine's folders are nobody's business"
    )
    assert not list(report.glob("models/*/checkpoint-*"))


def test_its_results_make_a_report(report: Path, tmp_path: Path):
    report_of_several.main([str(report / "results.json"), "--output_dir", str(tmp_path)])
    assert (report / "table.md").read_text() in (tmp_path / "report.md").read_text()
    assert (tmp_path / "ablation.csv").read_bytes() == (report / "table.csv").read_bytes()
    curves = {path.name for path in report.glob("*.png")}
    assert curves
    assert {path.name for path in tmp_path.glob("*.png")} == curves


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory, tissue: PhantomTissue) -> Path:
    """Two named sets, of two slides and of one, and a slide that nobody asks for."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "slides").mkdir()
    names = ("her2st_A1", "her2st_B1", "her2st_C1", "aspheart_1")
    for number, name in enumerate(names, start=3):
        slide = tissue.slide(number, array="square", height=12, width=12, median_counts=300)
        slide.write_h5ad(folder / "slides" / f"{name}.h5ad")
    rows = [f"{name}\tlabelled\t{name}" for name in names]
    (folder / "slides.tsv").write_text("\n".join(["name\trole\tpatient", *rows]) + "\n")
    return folder


ONLY = ("--only", "her2st_A1", "her2st_B1", "aspheart_1", "--tile_side", "3", "--num_splits", "1")


def run_on_sets(grid: Path, output: Path, sets: Path, patch: pytest.MonkeyPatch, *options: str) -> list[str]:
    """Names of the slides that were embedded, in their order."""
    embedded: list[str] = []
    original = EncoderEmbedder.embed
    with patch.context() as patched:
        patched.setenv("STIMG_DATA", str(sets))
        patched.setattr(
            EncoderEmbedder, "embed", lambda self, slide: (embedded.append(slide.name), original(self, slide))[1]
        )
        main(["--sets", "her2", "heart", "--output_dir", str(output), "--grid", str(grid), *ONLY, *options])
    return embedded


def test_named_sets_are_scored_as_domain_detection_scores_them(
    report: Path, grid: Path, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Exactly the same numbers for the same model and for raw expression; means within sets come first."""
    output = Path(shutil.copytree(report, tmp_path / "sets"))
    embedded = run_on_sets(grid, output, sets, monkeypatch, "--factors", "window size")
    assert sorted(embedded) == sorted(2 * ["her2st_A1", "her2st_B1", "aspheart_1"]), "once a slide, for all splits"
    rows = records_of(output)
    small, base = rows["window size", "4"], rows["window size", "6"]
    monkeypatch.setenv("STIMG_DATA", str(sets))
    domains = ["--sets", "her2", "heart", "--exclude", "her2st_C1", "--model", str(output / base["model"])]
    domains += ["--output_dir", str(tmp_path / "domains"), "--clusterings", "none", "--probes", "knn", "linear"]
    domains += ["--smoothings", "0", "1", "--rows", "raw", "stimg", "--figures", "false", *ONLY[-4:]]
    run_domain_detection.main(domains)
    records = json.loads((tmp_path / "domains" / "results.json").read_text())["records"]
    assert {(record["set"], record["split"]) for record in records} == {
        *(("her2", split) for split in ("spots", "blocks", "slides")),
        *(("heart", split) for split in ("spots", "blocks")),  # a slide alone has no other to train on
    }
    for name, row in (("stimg", base), ("raw", rows["baseline", "raw"])):
        expected = [{**record, "shuffled": False} for record in records if record["features"] == name]
        assert [{**score, "features": name} for score in row["scores"]] == expected
    raw = [record for record in records if record["features"] == "raw" and record["smoothing"] == 1]
    mean = [score for score in rows["baseline", "raw, 3x3 mean"]["scores"] if score["smoothing"] == 0]
    assert [record["ari"] for record in raw] == [score["ari"] for score in mean]

    with (output / "table.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if (line["variant"], line["split"]) == ("4", "blocks")]
    (of_all,) = (li for li in lines if (li["level"], li["probe"], li["smoothing"]) == ("all", "linear", "0"))
    cells = {
        score["slide"]: score["ari"]
        for score in small["scores"]
        if (score["split"], score["probe"], score["smoothing"]) == ("blocks", "linear", 0)
    }
    her2 = (cells["her2st_A1"] + cells["her2st_B1"]) / 2
    assert float(of_all["ari"]) == pytest.approx((her2 + cells["aspheart_1"]) / 2)
    (of_set,) = (
        li for li in lines if (li["set"], li["slide"], li["probe"], li["smoothing"]) == ("her2", "", "linear", "0")
    )
    assert float(of_set["ari"]) == pytest.approx(her2)
    table = (output / "table.md").read_text()
    assert f"{float(of_all['ari']):.3f} ({float(of_all['ari_less_base']):+.3f})" in table
    assert "(her2: her2st_A1, her2st_B1; heart: aspheart_1)" in table
    for split in ("spots", "blocks", "slides"):
        assert f"| {split}, k-NN | {split}, k-NN, 3x3 mean | {split}, linear |" in table


def test_a_row_goes_on_in_the_middle_and_means_share_an_embedding(
    report: Path, grid: Path, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    variants = {0: {}, 2: {"embedding": {"smoothing": 2, "centered": False}}, "not": {"untrained": True}}
    other = write_grid(tmp_path / "grid.yaml", grid.parent / "slides", {"mean": {"variants": variants}})
    (tmp_path / "out").mkdir()
    shutil.copytree(report / "models", tmp_path / "out" / "models")
    monkeypatch.setattr(run_pretrain, "main", lambda argv: pytest.fail("nothing is to be trained"))
    options = ("--baselines", "none", "--probes", "knn", "--smoothings", "0", "--splits", "spots", "slides")
    knn, calls = domain_scores.PROBES["knn"], []

    def interrupted(*arguments):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(1)
        return knn(*arguments)

    with monkeypatch.context() as patched:
        patched.setitem(domain_scores.PROBES, "knn", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_on_sets(other, tmp_path / "out", sets, patched, *options)
    assert not (tmp_path / "out" / "results.json").exists()
    monkeypatch.setitem(domain_scores.PROBES, "knn", lambda *a: (calls.append(1), knn(*a))[1])
    embedded = run_on_sets(other, tmp_path / "out", sets, monkeypatch, *options)
    assert embedded == ["her2st_A1", "her2st_B1", "aspheart_1"], "those of the model at step 0 alone"
    rows = records_of(tmp_path / "out")
    # Both slides of her2 within and across, the one of heart within.
    assert len(calls) == sum(len(record["scores"]) for record in rows.values()) == 3 * 5
    base, mean, start = (rows["mean", variant] for variant in ("0", "2", "not"))
    assert (base["trained"]["num_windows"], start["trained"]) == (
        24,
        {"max_steps": 0, "num_windows": 0, "num_spots_seen": 0},
    )
    assert start["model"] == f"{base['model']}/untrained"
    name = "her2st_A1"
    adata = read_slide(sets / "slides" / f"{name}.h5ad")
    codes, _ = encode_labels(adata.obs["label"].astype(str).to_numpy())
    for record, smoothing in ((mean, 2), (start, 0)):
        folder = tmp_path / "out" / record["model"]
        model, processor = STImageMAEModel.from_pretrained(folder), STPatchProcessor.from_pretrained(folder)
        embed_slide(adata, model, processor, stride=3, smoothing=smoothing, progress=False)
        splits = spot_splits(codes, 1)
        values = scored(codes, knn(adata.obsm["X_stimg"], codes, splits, 0), splits)["ari"][0]
        (found,) = (s for s in record["scores"] if (s["slide"], s["split"]) == (name, "spots"))
        assert found["ari"] == pytest.approx(values, abs=1e-3)
    assert len({record["scores"][0]["ari"] for record in rows.values()}) == 3


def test_control_reads_the_same_slide_with_its_counts_elsewhere(report: Path, grid: Path, tmp_path: Path):
    output = Path(shutil.copytree(report, tmp_path / "control"))
    run(grid, output, "--factors", "gene draws", "--control", "--probes", "linear", "--baselines", "none")
    record, before = records_of(output)["gene draws", "1"], records_of(report)["gene draws", "1"]
    plain, shuffled = ([s for s in record["scores"] if s["shuffled"] == there] for there in (False, True))
    assert plain == [score for score in before["scores"] if score["probe"] == "linear"]
    assert len(shuffled) == len(plain) == 2
    assert all(there["ari"] < here["ari"] for there, here in zip(shuffled, plain, strict=True))
    assert "linear, 3x3 mean, counts shuffled" in (output / "table.md").read_text()
    adata = read_slide(grid.parent / "slides" / "held_out.h5ad")
    moved = shuffle_spots(adata, 0)
    assert moved.obs.equals(adata.obs)
    assert np.array_equal(np.sort(moved.X.sum(1).A1), np.sort(adata.X.sum(1).A1))
    assert (moved.X != adata.X).nnz > 0
    assert (shuffle_spots(adata, 0).X != moved.X).nnz == 0


def test_scores_are_those_of_the_model_that_the_row_names(report: Path, grid: Path):
    record = records_of(report)["gene draws", "2"]
    folder = report / record["model"]
    processor, model = STPatchProcessor.from_pretrained(folder), STImageMAEModel.from_pretrained(folder).eval()
    adata = read_slide(grid.parent / "slides" / "held_out.h5ad")
    image = processor.slide_to_image(adata)
    features = model.embed(image, processor, stride=3, num_gene_draws=2)[image.spot_of_obs]
    labels, _ = encode_labels(adata.obs["label"].astype(str).to_numpy())
    site = np.stack([adata.obs["array_row"], adata.obs["array_col"] // 2], axis=1)
    near = np.abs(site[:, None] - site).max(-1) <= 1
    smooth = near @ features / near.sum(1, keepdims=True)
    for radius, values in ((0, features), (1, smooth)):
        accuracy, ari = [], []
        for train, test in spot_splits(labels, 2):
            predicted = KNeighborsClassifier(10).fit(values[train], labels[train]).predict(values[test])
            accuracy.append(accuracy_score(labels[test], predicted))
            ari.append(adjusted_rand_score(labels[test], predicted))
        (found,) = (s for s in record["scores"] if (s["smoothing"], s["probe"]) == (radius, "knn"))
        assert found["accuracy"] == pytest.approx(np.mean(accuracy), abs=1e-3)
        assert found["ari"] == pytest.approx(np.mean(ari), abs=5e-3)


# ---------------------------------------------------------------------------- resuming


def test_second_call_computes_nothing(report: Path, grid: Path, tmp_path: Path, computed: list, monkeypatch):
    again = Path(shutil.copytree(report, tmp_path / "again"))
    monkeypatch.setattr(run_pretrain, "main", lambda argv: pytest.fail("nothing is to be trained"))
    run(grid, again)
    assert computed == []
    assert records_of(again) == records_of(report)


def test_interrupted_in_the_middle_of_a_training_it_goes_on_to_the_same_numbers(
    report: Path, grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    from small_pretraining import Interrupted, interrupt, same_weights, stop

    output = tmp_path / "report"
    only = ("--factors", "gene draws", "window size")
    reordered = {name: FACTORS[name] for name in ("gene draws", "window size")}
    other = write_grid(grid.parent / "reordered.yaml", grid.parent / "slides", reordered)
    (output / "models").mkdir(parents=True)
    base = records_of(report)["gene draws", "1"]["model"]
    shutil.copytree(report / base, output / base)
    with monkeypatch.context() as patched:
        interrupt(patched, 5, stop)
        with pytest.raises(Interrupted):
            run(other, output, *only)
    assert [row for row in records_of(output) if row[0] != "baseline"] == [("gene draws", "1"), ("gene draws", "2")]
    assert (output / "table.md").read_text().count("–") > 2, "rows that are still to come"  # noqa: RUF001
    run(other, output, "--dry_run")
    assert "goes on from step 4" in capsys.readouterr().out
    run(other, output, *only)
    rows, whole = records_of(output), records_of(report)
    assert {row: record["scores"] for row, record in rows.items()} == {row: whole[row]["scores"] for row in rows}
    small = whole["window size", "4"]["model"]
    assert same_weights(output / small, report / small)


def test_changed_rows_alone_are_computed_anew(report: Path, grid: Path, tmp_path: Path, computed: list, monkeypatch):
    output = Path(shutil.copytree(report, tmp_path / "changed"))
    monkeypatch.setattr(run_pretrain, "main", lambda argv: pytest.fail("nothing is to be trained"))
    factors = {**FACTORS, "gene draws": {"variants": {1: {}, 2: {"embedding": {"num_gene_draws": 3}}}}}
    changed = write_grid(grid.parent / "changed.yaml", grid.parent / "slides", factors)
    run(changed, output)
    assert computed == [("gene draws", "2")]
    before, after = records_of(report), records_of(output)
    assert after["gene draws", "2"]["embedding"]["num_gene_draws"] == 3
    assert {row for row in before if before[row]["scores"] != after[row]["scores"]} == {("gene draws", "2")}
    computed.clear()
    run(changed, output, "--factors", "window size", "--probes", "knn")
    assert computed == [("window size", "4"), ("window size", "6")], "another scoring"
    kept = {row for row in records_of(output) if row[0] != "baseline"}
    assert kept == set(computed), "rows of the old scoring are not mixed with these"


def test_what_decides_the_weights_names_the_folder(grid: Path, tmp_path: Path):
    slides = grid.parent / "slides"
    fields = {**TRAINING, "slides": [f"{slides}/s*.h5ad"]}

    def folder(**changes: object) -> str:
        return make_variant({**fields, **changes}, tmp_path).folder.name

    same = [folder(), folder(mask_ratio=0.3), folder(logging_steps=3), folder(save_steps=5)]
    assert len(set(same)) == 1, "a default that is written out, or what is logged, changes nothing"
    others = [folder(seed=1), folder(window_size=4), folder(learning_rate=1e-3), folder(exclude=["s1"])]
    assert len({*same, *others}) == 5
    copies = Path(shutil.copytree(slides, tmp_path / "slides"))
    assert folder(slides=[f"{copies}/s*.h5ad"]) == same[0], "the same slides, wherever they are"
    shutil.copy(copies / "held_out.h5ad", copies / "s1.h5ad")
    assert folder(slides=[f"{copies}/s*.h5ad"]) != same[0], "the same name with another content"


# ---------------------------------------------------------------------------- the dry run


def test_dry_run_counts_and_leaves_nothing(grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    run(grid, tmp_path / "dry", "--dry_run")
    printed = capsys.readouterr().out
    assert not (tmp_path / "dry").exists()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    assert rows[2] == ["baseline", "raw", "to do", "no model", "0", "0"]
    assert [row[:5] for row in rows[6:9]] == [
        ["window size", "4", "to do", "to train", "24"],
        ["window size", "6", "to do", "to train", "24"],
        ["gene draws", "1", "to do", "trained for a row above", "24"],
    ]
    assert "at least 48 windows of training" in printed


def test_windows_to_read_are_those_that_the_encoder_gets(report: Path, grid: Path, tmp_path: Path, monkeypatch):
    """With another grid of the slide, a smaller window, several draws and hidden quarters."""
    protocol = Protocol(("spots",), ("knn",), (), num_splits=1, smoothings=(0,))
    plan = plan_set(load_given_set([grid.parent / "slides" / "held_out.h5ad"]), protocol)
    slides = list(plan.slides.values())
    options = {"stride": 2, "num_gene_draws": 2, "readout": "both"}
    factors = {
        "all": {"variants": {"x": {"embedding": options, "processor": {"window_size": 4, "compaction": "rank"}}}}
    }
    other = write_grid(grid.parent / "other.yaml", grid.parent / "slides", factors)
    (row,), _ = read_grid(other, {}, report / "models", {})
    assert row.trained.finished
    got = 0
    original = STImageMAEModel.forward

    def forward(self, pixel_values, *arguments, **named):
        nonlocal got
        got += len(pixel_values)
        return original(self, pixel_values, *arguments, **named)

    monkeypatch.setattr(STImageMAEModel, "forward", forward)
    run_ablation.evaluate_run(row, [plan], protocol, ScoreLog(tmp_path / "scores.jsonl"), tmp_path)
    assert windows_to_read(row, slides) == got > 100


@pytest.mark.parametrize(
    ("shipped", "wanted", "max_spots"),
    [
        (
            GRID,
            "window size, channels, gene rule in training, gene rule at inference, compaction, mask unit, "
            "start of gene embeddings, stride at inference, gene draws at inference",
            {600_000},
        ),
        (
            GRID.with_name("recipe.yaml"),
            "seed, untrained, position, normalization, start of gene embeddings, reconstruction, target smoothing, "
            "mask unit, mask ratio, readout, genes at inference, centered, smoothing, stride, learning rate, budget, "
            "depth, window size, projection, width, dropout",
            {150_000, 300_000, 600_000},
        ),
    ],
    ids=["ablation", "recipe"],
)
def test_shipped_grid_holds_its_base_once_a_factor(tmp_path: Path, shipped: Path, wanted: str, max_spots: set[int]):
    for name in ("corpus.json", "genes.json"):
        (tmp_path / name).write_text("{}")
    runs, base = read_grid(shipped, {"corpus": str(tmp_path)}, tmp_path / "models", {})
    assert set(wanted.split(", ")) <= {row.factor for row in runs}
    for factor in dict.fromkeys(row.factor for row in runs):
        of_factor = runs_of(runs, [factor])
        assert [row.key for row in of_factor].count(base) == 1, factor
        assert len({row.key for row in of_factor}) == len(of_factor), factor
    sites = [row.trained.window_size**2 * row.trained.fields["per_device_train_batch_size"] for row in runs]
    assert min(sites) > 0.85 * 2048
    assert max(sites) < 1.15 * 2048
    assert {row.trained.fields["max_spots"] for row in runs} == max_spots
    assert {row.factor for row in runs if row.trained.fields["max_spots"] not in (150_000, 600_000)} <= {"budget"}


# ---------------------------------------------------------------------------- bad input

BAD_GRIDS = [
    ({"x": {"variants": {"y": {"training": {"windowsize": 4}}}}}, r"x: y: Training fields \['windowsize'\] cannot be"),
    ({"x": {"variants": {"y": {"training": {"window_size": "many"}}}}}, "x: y: The training fields are refused.*many"),
    ({"x": {"variants": {"y": {"training": {"output_dir": "a"}}}}}, "x: y: Training fields .*output_dir"),
    ({"x": {"variants": {"y": {"embedding": {"strid": 4}}}}}, r"x: y: Unknown embedding options \['strid'\]"),
    ({"x": {"variants": {"y": {"embedding": {"stride": 7}}}}}, "x: y: stride is 7, larger than the window"),
    ({"x": {"variants": {"y": {"processor": {"target_sum": 1}}}}}, "x: y: Processor options .*target_sum"),
    ({"x": {"variants": {"y": {"model": {}}}}}, r"x: y overrides \['model'\]"),
    ({"x": {"variants": {"y": {"untrained": "yes"}}}}, "x: y: untrained is 'yes': expected true or false"),
    ({"x": {"variants": {"y": {"embedding": {"gene_selection": "all"}}}}}, "x: y: gene_selection is 'all'"),
    ({"x": {"variants": {"y": {"embedding": {"smoothing": -1}}}}}, "x: y: smoothing is -1"),
    ({"baseline": {"variants": {"y": {}}}}, "has a factor 'baseline'"),
    ({"x": {"y": {}}}, "x: expected variants"),
    ({}, "names no factors"),
]


@pytest.mark.parametrize(("factors", "told"), BAD_GRIDS, ids=[told for _, told in BAD_GRIDS])
def test_bad_grids_are_told_before_anything_is_trained(grid: Path, tmp_path: Path, factors: dict, told: str):
    bad = write_grid(tmp_path / "bad.yaml", grid.parent / "slides", factors)
    with pytest.raises(ValueError, match=told):
        main(["--slides", str(grid.parent / "slides" / "held_out.h5ad"), *words(tmp_path / "out", bad)])
    assert not (tmp_path / "out").exists()


def words(output: Path, grid: Path) -> list[str]:
    return ["--output_dir", str(output), "--grid", str(grid)]


def test_bad_arguments_are_told_in_one_sentence(grid: Path, tmp_path: Path, slides: dict):
    with pytest.raises(ValueError, match=r"Unknown factors \['colour'\]: the grid has \['window size', 'gene draws'"):
        run(grid, tmp_path / "out", "--factors", "colour")
    with pytest.raises(ValueError, match=r"Unknown probes \['forest'\]: expected any of"):
        run(grid, tmp_path / "out", "--probes", "forest")
    with pytest.raises(ValueError, match=r"Unknown splits \['rows'\]: expected any of \['spots', 'blocks', 'slides'\]"):
        run(grid, tmp_path / "out", "--splits", "rows")
    with pytest.raises(ValueError, match=r"Unknown baselines \['PCA'\]: expected any of \['raw', 'pca', 'coord"):
        run(grid, tmp_path / "out", "--baselines", "PCA")
    with pytest.raises(ValueError, match=r"Slides to keep \['held'\] are not among the 1 slides found"):
        run(grid, tmp_path / "out", "--only", "held")
    with pytest.raises(ValueError, match="give --sets or --slides"):
        main(words(tmp_path / "out", grid))
    with pytest.raises(ValueError, match="--training is no valid JSON"):
        run(grid, tmp_path / "out", "--training", "max_steps=3")
    with pytest.raises(FileNotFoundError, match=r"There is no .*nowhere\.yaml"):
        run(grid, tmp_path / "out", "--grid", str(tmp_path / "nowhere.yaml"))
    with pytest.raises(ValueError, match="held_out: obs has no column 'layer'"):
        run(grid, tmp_path / "out", "--label_key", "layer")
    with pytest.raises(ValueError, match="held_out: 6 spots train, fewer than the k-NN probe's 10 neighbours"):
        run(grid, tmp_path / "out", "--train_share", "0.05")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text('{"metadata": {}, "records": []}')
    with pytest.raises(ValueError, match="holds no results of an ablation"):
        run(grid, tmp_path / "out")


def test_threads_of_a_training_do_not_stay(grid: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(run_pretrain, "main", lambda argv: torch.set_num_threads(3))
    before = torch.get_num_threads()
    train_variant(make_variant({**TRAINING, "slides": [f"{grid.parent}/slides/s*.h5ad"]}, tmp_path))
    assert torch.get_num_threads() == before


def test_fingerprint_of_slides_reads_folders_too(tmp_path: Path):
    (tmp_path / "outs").mkdir()
    (tmp_path / "outs" / "matrix").write_text("1")
    first = content_sha256([tmp_path / "outs"])
    (tmp_path / "outs" / "matrix").write_text("22")
    assert content_sha256([tmp_path / "outs"]) != first
