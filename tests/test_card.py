"""The card of a published model: every number in it is one of the files it is made of."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from model_results import FEATURES, SETS, SPLITS, write_domains, write_regions, write_throughput

from data_processing.corpus import SlideRecord, save_pretraining
from eval.features import BY_DEFAULT
from model_cards.card import main, make_card
from model_cards.training_slides import by_source
from train.arguments import parse_arguments

ARGUMENTS = {
    "window_size": 6,
    "num_channels": 32,
    "hidden_size": 32,
    "compaction": "lattice",
    "embedding_defaults": {"stride": 3},
    "window_sizes": [6, 8],
    "max_steps": 40,
    "learning_rate": 0.002,
    "bf16": False,
    "num_windows": 320,
    "num_spots_seen": 7777,
}
SLIDES = [
    SlideRecord("her2st_A2", "A", 323),
    SlideRecord("her2st_B2", "B", 268),
    SlideRecord("V1_Human_Heart", "", 4247),
    SlideRecord("mine", "me", 50),
]
COST = {"seconds": 1234.5, "steps": 30, "processes": 2, "device": "cpu"}
NUMBER = re.compile(r"(?<![\w.\-/])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?(?![\w/])")


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Path) -> Path:
    """A model's folder with its card."""
    path = tmp_path / "model"
    shutil.copytree(checkpoint, path)
    save_pretraining(path, SLIDES, ARGUMENTS, {"cost": COST})
    (path / "loss.png").write_bytes(b"a curve")
    results, regions = write_domains(tmp_path / "domains", ARGUMENTS), write_regions(tmp_path / "regions")
    words = ["--repo", "org/tiny", "--results", str(results), "--regions", str(regions), "--watts", "65"]
    words += ["--throughput", str(write_throughput(tmp_path / "throughput"))]
    main([str(path), *words, "--datasets", "org/corpus"])
    return path


def records_of(folder: Path, name: str = "results.json") -> list[dict]:
    return json.loads((folder / name).read_text())["records"]


def mean_of_sets(records: list[dict], metric: str, **place: object) -> float | None:
    """Over slides within a set, then over sets: written out here, apart from the project's own."""
    by_set: dict[str, list[float]] = {}
    for record in records:
        if all(record[key] == value for key, value in place.items()) and metric in record:
            by_set.setdefault(record["set"], []).append(record[metric])
    return float(np.mean([np.mean(values) for values in by_set.values()])) if by_set else None


def tables(text: str) -> dict[str, list[list[str]]]:
    """Cells of every table, by the heading above it."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|") and not line.startswith("| ---"):
            found.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def section(text: str, start: str, end: str) -> str:
    return text.split(f"\n## {start}\n")[1].split(f"\n{end}\n")[0]


def test_every_cell_of_the_tables_is_the_mean_of_its_records(folder: Path):
    text, records = (folder / "README.md").read_text(), records_of(folder)
    by_place = section(text, "Domain detection", "### By set, features as they are")
    probes = {"knn": "k-NN", "linear": "linear", "k-means": "k-means"}
    compared = 0
    for split, of_split in SPLITS.items():
        for probe in of_split:
            header, *rows = tables(by_place)[f"{split}, {probes[probe]}"]
            assert header == ["features", "none", "3x3", "seen"]
            assert [row[0] for row in rows] == list(FEATURES), "simple features and the model stand in one table"
            for row in rows:
                for radius in (0, 1):
                    place = {"split": split, "probe": probe, "features": row[0], "smoothing": radius}
                    ari, accuracy = (mean_of_sets(records, metric, **place) for metric in ("ari", "accuracy"))
                    told = "–" if ari is None else f"{ari:.3f}"  # noqa: RUF001
                    assert row[1 + radius] == (told if accuracy is None else f"{accuracy:.3f} / {ari:.3f}")
                    compared += 1
    assert compared == 4 * len(FEATURES) * 2


def test_every_number_outside_of_code_is_in_a_file_of_the_folder(folder: Path):
    text = (folder / "README.md").read_text()
    body = re.sub(r"```.*?```|`[^`\n]*`|!?\[[^]]*\]\([^)]*\)", " ", text.split("---\n", 2)[2], flags=re.DOTALL)
    records, regions = records_of(folder), records_of(folder, "regions.json")
    known: set[str] = set()

    def add(value: object) -> None:
        if isinstance(value, dict):
            for inner in value.values():
                add(inner)
        elif isinstance(value, list):
            for inner in value:
                add(inner)
        elif isinstance(value, str):
            known.update(re.findall(r"\d+", value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            known.update(f"{value:{form}}" for form in ("g", ",.0f", ".3f", ".4f", ".4g", ",.1f"))

    for name in ("config.json", "preprocessor_config.json", "pretraining.json", "card.json"):
        add(json.loads((folder / name).read_text()))
    content = json.loads((folder / "results.json").read_text())
    add(content["metadata"])
    add(records_of(folder, "throughput.json"))
    for source in by_source(SLIDES):  # rows of the manifest
        add([source.source, source.citation])
    known |= {"30"}  # 100 times the share of training spots, which the results tell as 0.3
    places = {(r["split"], r["probe"], r["features"], r["smoothing"]) for r in records}
    for split, probe, features, smoothing in places:
        place = {"split": split, "probe": probe, "features": features, "smoothing": smoothing}
        for metric in ("ari", "accuracy"):
            add(mean_of_sets(records, metric, **place))
            for name in SETS:
                add(mean_of_sets([r for r in records if r["set"] == name], metric, **place))
    for predictor in ("zeros", "mean", "stimg"):
        for metric in ("mse", "mae", "pearson", "pearson_genes"):
            add(float(np.mean([r[metric] for r in regions if r["predictor"] == predictor])))
    counts = [len(SLIDES), sum(s.num_spots for s in SLIDES), 323 + 268, 4247, 50]
    counts += [len(SETS), *(len(slides) for slides in SETS.values()), sum(map(len, SETS.values()))]
    vocabulary = json.loads((folder / "genes.json").read_text())["gene_ids"]
    model = ModelCard.load(folder / "README.md").text
    parameters = int(re.search(r"- ([\d,]+) parameters", model).group(1).replace(",", ""))
    add([*counts, len(vocabulary), parameters, sum(map(len, SPLITS.values())), 1, 2])
    known |= {f"{COST['seconds'] * 40 / 30 * 65 / 3.6e6:.3g}"}

    (speed,) = tables(text)["Speed and memory"][1:2]
    first = records_of(folder, "throughput.json")[0]
    assert speed == [first["slide"], str(first["non_zeros"]), f"{first['windows_per_second']:.4g}", "–"]  # noqa: RUF001

    found = NUMBER.findall(body)
    assert len(found) > 150
    assert not {number for number in found if number not in known}


def test_the_number_of_parameters_is_the_models(folder: Path):
    from modeling_stimg import STImageMAEForPreTraining

    number = sum(p.numel() for p in STImageMAEForPreTraining.from_pretrained(folder).parameters())
    assert f"- {number:,} parameters" in (folder / "README.md").read_text()


def test_the_model_index_has_every_metric_of_the_models_rows(folder: Path):
    card, records = ModelCard.load(folder / "README.md"), records_of(folder)
    assert card.data.library_name == "transformers"
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "feature-extraction"
    assert card.data.datasets == ["org/corpus"]
    ours = [r for r in records if r["features"].startswith("stimg")]
    means = {}
    for name in SETS:
        for split, probe, features, radius in {(r["split"], r["probe"], r["features"], r["smoothing"]) for r in ours}:
            cells = [
                r
                for r in ours
                if (r["set"], r["split"], r["probe"], r["features"], r["smoothing"])
                == (name, split, probe, features, radius)
            ]
            for metric in ("accuracy", "ari", "macro_f1"):
                if metric in cells[0]:
                    means[name, split, probe, features, radius, metric] = np.mean([r[metric] for r in cells])
    told = [r for r in card.data.eval_results if r.task_type == "tissue-domain-detection"]
    assert sorted(r.metric_value for r in told) == sorted(round(float(value), 6) for value in means.values())
    assert {(r.dataset_type, r.dataset_config) for r in told} == {(name, split) for name in SETS for split in SPLITS}
    (one,) = [r for r in told if (r.dataset_type, r.dataset_config) == ("her2", "no labels") and "3x3" in r.metric_name]
    assert one.metric_value == pytest.approx(means["her2", "no labels", "k-means", "stimg", 1, "ari"], abs=1e-6)
    assert one.dataset_args == {"slides": list(SETS["her2"]), "seen": "same patient"}
    regions = [r for r in card.data.eval_results if r.task_type == "masked-region-reconstruction"]
    assert len(regions) == 2 * 3


def test_the_card_tells_where_features_without_training_win(folder: Path):
    text, records = (folder / "README.md").read_text(), records_of(folder)
    header, *rows = tables(text)["Domain detection"]
    assert header[2:] == ["model", "its row", "without training", "its row"]
    won = 0
    for split, probe, ours, _, simple, _ in rows:
        of_probe = {"k-NN": "knn"}.get(probe, probe)
        best = {True: 0.0, False: 0.0}
        for features in FEATURES:
            for radius in (0, 1):
                place = {"split": split, "probe": of_probe, "features": features, "smoothing": radius}
                mean = mean_of_sets(records, "ari", **place) or 0.0
                mine = features in ("stimg", "stimg" + BY_DEFAULT)
                best[mine] = max(best[mine], mean)
        assert (ours, simple) == (f"{best[True]:.3f}", f"{best[False]:.3f}")
        won += best[False] >= best[True]
    assert won, "the results of this test have to hold such a row"
    assert f"as good or better in {won} of {len(rows)} rows" in text


def test_the_card_tells_what_was_seen_whom_to_cite_and_what_it_cost(folder: Path):
    text = (folder / "README.md").read_text()
    seen = tables(text)["What it saw of the evaluation slides"]
    assert seen[1:] == [
        ["heart", "3", "unseen patient"],
        ["her2", "2", "same patient"],
        ["region reconstruction", "2", "unseen patient"],
    ]
    slides = {row[0]: row for row in tables(text)["Training slides"][1:]}
    assert slides["Zenodo 4751624"][1:5] == ["2", "591", "2", "Andersson et al. 2021"]
    assert slides["10x Genomics"][1:4] == ["1", "4,247", "not told"]
    assert slides["not in the manifest"][4:] == ["not stated", "not stated"]
    cost = section(text, "Environmental cost", "## Making it again")
    assert "30 of 40 training steps took 1,234 s on 2 x cpu" in cost
    assert "= 0.0297 kWh, with 65 W" in cost  # 1234.5 s * 40 / 30 * 65 W / 3.6e6
    assert "![Training loss by step](loss.png)" in text


def test_every_step_to_the_model_has_its_command(folder: Path):
    make_card(folder, {"corpus_command": "python data_processing/build_corpus.py --slides slides --output corpus"})
    steps = section((folder / "README.md").read_text(), "Making it again", "Every number").split("```bash\n")[1]
    scripts = [line.split(".py")[0].split()[-1] for line in steps.splitlines() if ".py" in line]
    assert scripts[:3] == ["data_processing/build_corpus", "train/run_pretrain", "model_cards/gather"]
    assert "train/run_pretrain.py --config config.yaml --corpus corpus " in steps
    assert "--half" not in steps


def test_the_last_command_of_a_card_writes_that_card(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_card(folder, {"corpus_command": "python build_corpus.py --slides '$DATA/slides' --output corpus"})
    card = (folder / "README.md").read_text()
    command = shlex.split(card.split("```bash\n")[-1].split("```")[0].splitlines()[-1])
    assert command[:3] == ["python", "model_cards/card.py", "model_cards/tiny"]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, command[2], ignore=shutil.ignore_patterns("README.md", "card.json", "*results.json"))
    for option, name in (("--results", "results"), ("--regions", "regions"), ("--throughput", "throughput")):
        told = Path(command[command.index(option) + 1])
        told.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / f"{name}.json", told)
        (Path(command[2]) / f"{name}.json").unlink(missing_ok=True)
    main(command[2:])
    assert (Path(command[2]) / "README.md").read_text() == card


def test_an_unknown_cost_is_said_to_be_unknown(folder: Path):
    save_pretraining(folder, SLIDES, ARGUMENTS)
    make_card(folder, {})
    assert "Training time and hardware are unknown" in (folder / "README.md").read_text()
    assert "kWh" not in (folder / "README.md").read_text()


def test_the_corpus_that_was_trained_on_is_named_where_no_other_is(folder: Path):
    save_pretraining(folder, SLIDES, ARGUMENTS, {"corpus": "lab/corpus@0123456789"})
    make_card(folder, {})
    assert ModelCard.load(folder / "README.md").data.datasets == ["org/corpus"]
    make_card(folder, {"datasets": []})
    assert ModelCard.load(folder / "README.md").data.datasets == ["lab/corpus"]


def test_the_config_in_the_card_is_one_that_the_training_script_reads(folder: Path, tmp_path: Path):
    text = (folder / "README.md").read_text()
    written = text.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "config.yaml").write_text(written)
    words = ["--config", str(tmp_path / "config.yaml"), "--corpus", "corpus", "--output_dir", str(tmp_path / "out")]
    corpus, model, _, training = parse_arguments([*words, "--use_cpu", "true"])
    assert (corpus.window_sizes, model.hidden_size, model.embedding_defaults) == ([6, 8], 32, {"stride": 3})
    assert (training.max_steps, training.learning_rate, training.per_device_train_batch_size) == (40, 0.002, 8)
    assert set(yaml.safe_load(written)) == {*ARGUMENTS, "per_device_train_batch_size"} - {
        "num_windows",
        "num_spots_seen",
    }
    assert "python eval/run_domain_detection.py --model runs/mine --sets heart her2\n" in text


def test_the_same_files_give_the_same_card(folder: Path):
    before = (folder / "README.md").read_bytes()
    make_card(folder, {})
    assert (folder / "README.md").read_bytes() == before


def test_slides_of_one_archive_are_one_row_and_others_are_not_made_up():
    groups = by_source([*SLIDES, SlideRecord("her2st_C1", "C", 10), SlideRecord("her2", "", 1)])
    by_name = {source.source: [record.name for record in records] for source, records in groups.items()}
    assert by_name["Zenodo 4751624"] == ["her2st_A2", "her2st_B2", "her2st_C1", "her2"]
    assert by_name["not in the manifest"] == ["mine"]


def other_training(folder: Path, results: Path) -> dict:
    return {"results": write_domains(results, {**ARGUMENTS, "learning_rate": 0.1})}


def no_results(folder: Path, results: Path) -> dict:
    (results / "other.json").write_text('{"slides": []}')
    return {"results": results / "other.json"}


def regions_for_domains(folder: Path, results: Path) -> dict:
    return {"results": write_regions(results)}


def unknown_row(folder: Path, results: Path) -> dict:
    return {"row": "spot"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (other_training, "trained with other arguments"),
        (no_results, "holds no results of eval/run_domain_detection.py"),
        (regions_for_domains, "holds no results of domain detection"),
        (unknown_row, "has no row 'spot' but stimg"),
    ],
)
def test_what_is_not_the_models_is_refused_and_changes_nothing(folder: Path, tmp_path: Path, given, message: str):
    (tmp_path / "given").mkdir()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=message):
        make_card(folder, given(folder, tmp_path / "given"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
