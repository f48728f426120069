import json

import numpy as np
import pytest
import yaml

from data_processing import corpus_report, writing
from data_processing.corpus_report import CorpusReport, outcome, write_report
from data_processing.quality import Decisions, QualityRules
from data_processing.slide_fingerprint import SAME_SPOTS

CONFIGS = "configs:\n- config_name: spots\n  data_files: data/*.parquet\n"
EXTRA = {
    "name": 'Corpus: "all" of it',
    "description": "Slides of *many* sources.",
    "licence": "cc-by-4.0",
    "tags": ["biology", "a: b"],
    "configs": CONFIGS,
    "thresholds": {"least_overlap": 0.25},
}


def record(name, spots=100, **told):
    decisions = Decisions(
        spots_in=spots + 9, spots_low_counts=7, spots_kept=spots + 2, genes_in=9, counts_kept=10 * spots
    )
    base = {
        "id": name,
        "source": "GEO",
        "organ": "brain",
        "technology": "Visium",
        "patient": "P1",
        "licence": "CC0",
        "citation": "Ann 2021",
        "role": "train",
    }
    of_row = {"spots_sharing_a_place": 2, "num_spots": spots}
    return base | decisions.to_dict() | of_row | {"leak": "", "duplicate": ""} | told


@pytest.fixture
def records():
    return [
        record("a", 1000),
        record("b", 200, organ="heart", patient="P2", source="10x", licence="CC BY 4.0"),
        record("c", 30, technology="Legacy ST", patient=""),
        record("d", 5, refused="Too few | spots\nleft <here>."),
        record("e", 400, leak="e is evaluation slide x by its id."),
        record("f", 800, duplicate="f is a: 99% of 800 spots are the same.", leak=""),
        record("g", 60, leak="g leaks.", duplicate="g is b."),
        {"id": "h", "source": "GEO", "excluded": "by its name."},
    ]


def section(card, title):
    return card.split(f"## {title}\n")[1].split("\n## ")[0].strip()


def rows(text):
    return [
        [cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_slides_left_out_do_not_count_as_corpus(records):
    totals = CorpusReport(records, QualityRules(), {}).totals()
    assert (totals["slides"], totals["spots"], totals["counts"], totals["slides_listed"]) == (3, 1230, 12300, 8)
    assert totals["patients"] == 2
    decisions = totals["decisions"]
    assert {name: values["slides"] for name, values in decisions.items()} == {
        "in the corpus": 3,
        "left out as asked": 1,
        "refused by quality control": 1,
        "kept out for evaluation": 2,
        "there already": 1,
    }
    assert sum(values["spots_in"] for values in decisions.values()) == sum(r.get("spots_in", 0) for r in records)
    assert decisions["there already"]["spots_kept"] == 802
    assert [outcome(r) for r in records[4:7]] == ["kept out for evaluation", "there already", "kept out for evaluation"]


def test_the_card_has_a_header_that_the_hub_reads(records):
    card = CorpusReport(records, QualityRules(), EXTRA).card()
    assert card.startswith("---\n")
    header = yaml.safe_load(card.split("---\n")[1])
    assert header == {
        "license": "cc-by-4.0",
        "pretty_name": 'Corpus: "all" of it',
        "tags": ["biology", "a: b"],
        "configs": [{"config_name": "spots", "data_files": "data/*.parquet"}],
    }
    plain = yaml.safe_load(CorpusReport(records, QualityRules(), {}).card().split("---\n")[1])
    assert plain["license"] == "other"
    assert "configs" not in plain


def test_the_card_tells_slides_by_organ_technology_and_source(records):
    card = CorpusReport(records, QualityRules(), EXTRA).card()
    assert "3 slides of 8 listed, 1,230 spots, 12,300 counts, 2 known patients" in card
    assert rows(section(card, "Organs and technologies")) == [
        ["organ", "Legacy ST", "Visium", "all"],
        ["---"] * 4,
        ["brain", "30 (1)", "1,000 (1)", "1,030 (2)"],
        ["heart", "", "200 (1)", "200 (1)"],
        ["all", "30 (1)", "1,200 (2)", "1,230 (3)"],
    ]
    assert rows(section(card, "Sources"))[2:] == [["GEO", "7", "2", "1,030", "1"], ["10x", "1", "1", "200", "1"]]


def test_the_card_tells_every_slide_left_out_with_its_reason(records):
    left_out = rows(section(CorpusReport(records, QualityRules(), EXTRA).card(), "Slides left out"))
    assert left_out[2:] == [
        ["d", "GEO", "refused by quality control", "Too few ¦ spots left &lt;here>."],
        ["e", "GEO", "kept out for evaluation", "e is evaluation slide x by its id."],
        ["f", "GEO", "there already", "f is a: 99% of 800 spots are the same."],
        ["g", "GEO", "kept out for evaluation", "g leaks."],
        ["h", "GEO", "left out as asked", "by its name."],
    ]
    assert section(CorpusReport(records[:3], QualityRules(), EXTRA).card(), "Slides left out") == "None."


def test_the_card_tells_decisions_thresholds_and_terms(records):
    card = CorpusReport(records, QualityRules(min_counts=123), EXTRA).card()
    decisions = {row[0]: row[1:] for row in rows(section(card, "Decisions"))}
    assert decisions["slides"] == ["3", "1", "1", "2", "1"]
    assert decisions["spots in"] == ["1,257", "0", "14", "478", "809"]
    assert decisions["spots low counts"] == ["21", "0", "7", "14", "7"]
    assert set(decisions) >= {name.replace("_", " ") for name in corpus_report.COUNTS}
    thresholds = dict(row for row in rows(section(card, "Thresholds")))
    assert thresholds["min counts"] == "123"
    assert thresholds["least overlap"] == "0.25"
    assert thresholds["share of spots of the same slide"] == str(SAME_SPOTS)
    assert rows(section(card, "Licences and citations"))[2:] == [
        ["GEO", "CC0", "Ann 2021", "2"],
        ["10x", "CC BY 4.0", "Ann 2021", "1"],
    ]


def test_what_is_not_known_is_said_so():
    card = CorpusReport([{"id": "a", "num_spots": 3}], QualityRules(), {}).card()
    assert "| not stated | 3 (1) | 3 (1) |" in card
    assert "0 known patients" in card


def test_roles_are_told_where_there_are_several(records):
    records[0]["role"] = "validation"
    card = CorpusReport(records, QualityRules(), {}).card()
    assert ["validation", "1", "1,000"] in rows(card)
    assert ["train", "2", "230"] in rows(card)


def test_an_empty_corpus_reports_itself(tmp_path, records):
    report = write_report(tmp_path, records[3:], QualityRules(), {})
    assert report.totals()["slides"] == 0
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert write_report(tmp_path, [], QualityRules(), {}).totals()["slides_listed"] == 0


def test_files_hold_the_report(records, tmp_path):
    records[0]["num_spots"] = np.int64(1000)
    records[0]["sha256"] = "abc"
    report = write_report(tmp_path / "new" / "folder", records, QualityRules(), EXTRA | {"commit": "123"})
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "report.json", "report.png"]
    content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert content["records"] == records
    assert content["totals"] == report.totals()
    assert content["rules"]["organism"] == "human"
    assert content["extra"]["commit"] == "123"
    assert (folder / "README.md").read_text(encoding="utf-8") == report.card()
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_stacks_technologies_by_organ_largest_first(records):
    (axes,) = CorpusReport(records, QualityRules(), {}).figure().axes
    bars = {bars.get_label(): [(bar.get_x(), bar.get_width()) for bar in bars] for bars in axes.containers}
    assert bars == {"Legacy ST": [(0, 30), (0, 0)], "Visium": [(30, 1000), (0, 200)]}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["brain", "heart"]
    assert axes.yaxis_inverted()


def test_rare_organs_share_a_bar(monkeypatch, records):
    monkeypatch.setattr(corpus_report, "MAX_BARS", 1)
    records.append(record("i", 50, organ="liver", technology="Legacy ST"))
    (axes,) = CorpusReport(records, QualityRules(), {}).figure().axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["brain", "2 other organs"]
    assert [bar.get_width() for bars in axes.containers for bar in bars] == [30, 50, 1000, 200]


@pytest.mark.parametrize(("wrong", "error"), [(float("nan"), ValueError), (object(), TypeError)])
def test_what_json_cannot_hold_leaves_the_old_files(records, tmp_path, wrong, error):
    write_report(tmp_path, records, QualityRules(), {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(error):
        write_report(tmp_path, records[:1], QualityRules(), {"wrong": wrong})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_interrupted_write_leaves_the_old_file_and_no_rest(records, tmp_path, monkeypatch):
    write_report(tmp_path, records, QualityRules(), {})
    before = (tmp_path / "report.json").read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path, records[:1], QualityRules(), {})
    assert (tmp_path / "report.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "report.json", "report.png"]


def test_records_without_or_with_repeated_ids_are_refused(records):
    with pytest.raises(ValueError, match="Record 1 "):
        CorpusReport([records[0], {"source": "x"}], QualityRules(), {})
    with pytest.raises(ValueError, match="'a' is in the corpus report twice"):
        CorpusReport([records[0], records[0]], QualityRules(), {})
    with pytest.raises(ValueError, match="configs:"):
        CorpusReport(records, QualityRules(), {"configs": "- config_name: x"})
