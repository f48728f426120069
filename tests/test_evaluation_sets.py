"""Named sets are found in STIMG_DATA, and what cannot be used is said in one sentence."""

from pathlib import Path

import numpy as np
import pytest

from data_processing.corpus import SlideRecord, slide_patient
from data_processing.phantom import PhantomTissue
from eval.embedders import EncoderEmbedder
from eval.evaluation_sets import (
    load_given_set,
    load_named_set,
    load_sets,
    load_slide,
    named_paths,
    paths_of_sets,
)
from eval.provenance import seen

SLIDES = {  # name: (role, patient)
    "dlpfc_151673_g80": ("labelled", "Br8100"),
    "dlpfc_151507": ("unlabelled", "Br5292"),
    "her2st_A1": ("labelled", "A"),
    "her2st_B1": ("labelled", "B"),
    "her2st_A2": ("unlabelled", "A"),
    "gone_from_the_folder": ("labelled", "A"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tissue: PhantomTissue) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "slides").mkdir()
    rows = [f"{name}\t{role}\t{patient}" for name, (role, patient) in SLIDES.items()]
    (folder / "slides.tsv").write_text("\n".join(["name\trole\tpatient", *rows]) + "\n")
    for seed, name in enumerate(list(SLIDES)[:-1]):
        slide = tissue.slide(seed, height=8, width=8)
        del slide.uns["meta"]
        slide.obs["label"] = slide.obs["label"].astype(str).replace({"layer 4": "undetermined"})
        slide.write_h5ad(folder / "slides" / f"{name}.h5ad")
    return folder


def test_named_sets_hold_their_labelled_slides(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STIMG_DATA", str(folder))
    assert list(named_paths("her2")) == ["her2st_A1", "her2st_B1"]
    assert list(named_paths("dlpfc")) == ["dlpfc_151673_g80"]  # an id of the manifest, with a suffix
    her2 = load_named_set("her2")
    assert [slide.patient for slide in her2.slides.values()] == ["A", "B"]
    slide = her2.slides["her2st_A1"]
    assert "undetermined" not in slide.classes
    assert {None, "layer 1"} <= set(slide.labels)
    assert (slide.codes >= 0).sum() == (slide.labels != None).sum()  # noqa: E711 - entry by entry
    assert list(load_named_set("her2", exclude=["her2st_A1"]).slides) == ["her2st_B1"]
    assert "undetermined" in load_named_set("dlpfc").slides["dlpfc_151673_g80"].classes  # a class as any other there


def test_slides_to_keep_are_those_of_the_sets_that_have_them(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STIMG_DATA", str(folder))
    given = str(folder / "slides" / "*A2.h5ad")
    chosen = paths_of_sets(["her2", "dlpfc"], [given], only=["her2st_B1", "dlpfc_151673_g80", "her2st_A2"])
    assert {name: list(places) for name, places in chosen.items()} == {
        "her2": ["her2st_B1"],
        "dlpfc": ["dlpfc_151673_g80"],
        "slides": ["her2st_A2"],
    }
    found = load_sets(chosen, unlabelled=["layer 1"])
    assert [list(one.slides) for one in found] == [["her2st_B1"], ["dlpfc_151673_g80"], ["her2st_A2"]]
    classes = [next(iter(one.slides.values())).classes for one in found]
    assert ["layer 1" in names for names in classes] == [True, True, False], "named sets know what is no class"
    with pytest.raises(ValueError, match=r"Slides to keep \['her2st_C1'\] are not among the 3 slides found"):
        paths_of_sets(["her2", "dlpfc"], only=["her2st_C1"])
    with pytest.raises(ValueError, match="All slides of the set 'dlpfc' are excluded"):
        paths_of_sets(["her2", "dlpfc"], only=["her2st_A1"])


def test_what_is_missing_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("STIMG_DATA", str(folder))
    with pytest.raises(
        ValueError, match=r"no labelled slide of the set 'tonsil': it needs tonsil \(from Zenodo 17093158\)"
    ):
        named_paths("tonsil")
    with pytest.raises(ValueError, match="no evaluation set 'liver': expected one of dlpfc"):
        named_paths("liver")
    with pytest.raises(ValueError, match="All slides of the set 'dlpfc' are excluded"):
        load_named_set("dlpfc", exclude=["dlpfc_151673_g80"])
    monkeypatch.setenv("STIMG_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"holds no slides\.tsv"):
        named_paths("heart")
    monkeypatch.delenv("STIMG_DATA")
    with pytest.raises(ValueError, match=r"\$STIMG_DATA, which is not set: it needs dlpfc_151507, .* and others"):
        named_paths("dlpfc")


def test_slides_that_cannot_be_scored_are_named(folder: Path):
    path = folder / "slides" / "her2st_A1.h5ad"
    with pytest.raises(ValueError, match="her2st_A1: obs has no column 'layer'"):
        load_slide(path, "layer", ())
    domains = ["layer 1", "layer 2", "layer 3", "undetermined", "nodule", "core"]
    with pytest.raises(ValueError, match=r"her2st_A1: obs\['label'\] has no labelled spot"):
        load_slide(path, "label", domains)
    with pytest.raises(ValueError, match=r"her2st_A1: obs\['label'\] has the class 'layer 1' alone"):
        load_slide(path, "label", domains[1:])


def test_given_slides_are_a_set(folder: Path):
    given = load_given_set([folder / "slides" / f"her2st_{name}.h5ad" for name in ("A1", "B1")])
    assert list(given.slides) == ["her2st_A1", "her2st_B1"]
    slide = given.slides["her2st_B1"]
    np.testing.assert_array_equal(slide.rows, np.unique(slide.adata.obs["array_row"], return_inverse=True)[1])


def test_a_table_by_other_hands_is_read_too(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A byte order mark, blanks, roles as build_corpus.py knows them, a row cut short, and donors nobody knows."""
    (tmp_path / "slides").symlink_to(folder / "slides")
    rows = [
        "her2st_A1\t Evaluation\t?",
        "her2st_B1\tlabelled",
        "her2st_A2\tunlabelled\tA",
        "dlpfc_151507\tLabelled\tNA\tx",
    ]
    (tmp_path / "slides.tsv").write_text("\ufeff" + "\n".join(["name\trole\tpatient", *rows]) + "\n", encoding="utf-8")
    monkeypatch.setenv("STIMG_DATA", str(tmp_path))
    slides = {**load_named_set("her2").slides, **load_named_set("dlpfc").slides}
    assert {name: slide.patient for name, slide in slides.items()} == dict.fromkeys(
        ["her2st_A1", "her2st_B1", "dlpfc_151507"], ""
    )


def test_what_a_model_saw_goes_by_the_patient_that_the_table_tells(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STIMG_DATA", str(folder))
    slide = load_named_set("her2").slides["her2st_A1"]
    corpus = [SlideRecord("her2st_A2", "A", 50)]
    assert EncoderEmbedder("stimg", None, None, corpus).seen(slide) == "same patient"
    corpus = [SlideRecord("her2st_B2", "B", 50)]
    assert EncoderEmbedder("stimg", None, None, corpus).seen(slide) == "unseen patient"
    assert seen("x", slide.adata, corpus) == "patient not told"
    assert seen("x", slide.adata, corpus, "?") == "patient not told"


def test_a_missing_patient_is_nobody(tissue: PhantomTissue):
    slide = tissue.slide(0, height=6, width=6)
    for patient in (float("nan"), None):
        slide.uns["meta"] = {"patient": patient}
        assert slide_patient(slide) == ""
    del slide.uns["meta"]
    slide.obs["donor_id"] = ["D1", *[np.nan] * (slide.n_obs - 1)]
    slide.obs["donor_id"] = slide.obs["donor_id"].iloc[::-1].to_numpy()
    assert slide_patient(slide) == "D1"


@pytest.mark.real_data
def test_the_sets_of_this_project_are_there(real_data: Path):
    patients = {name: {p for _, p in named_paths(name).values()} for name in ("dlpfc", "her2", "heart")}
    assert patients == {"dlpfc": {"Br8100", "Br5292"}, "her2": set("ABCDEFG"), "heart": {"CN73", "CN74"}}
