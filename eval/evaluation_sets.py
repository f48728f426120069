"""Evaluation sets by name: which slides they hold, what their labels are, and which of them are on this machine.

The names are those of the manifest, `data_processing/sources.tsv`. Nothing is downloaded: slides are looked for in the
folder that `$STIMG_DATA` names, as `slides/NAME.h5ad` and in its list `slides.tsv` (columns name, role and patient), of
which only the rows with the role "labelled" (or "evaluation") are taken.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from anndata import AnnData

from data_processing.corpus import find_slides, slide_name, slide_patient
from data_processing.fingerprints import known_patient
from data_processing.sources import EVALUATION_SETS, Source, read_manifest
from data_processing.splits import encode_labels, slide_labels
from modeling_stimg import read_slide
from modeling_stimg.compaction_stimg import compact

DATA_VARIABLE = "STIMG_DATA"
ROLES = ("labelled", "evaluation")  # as data_processing/local_slides.py reads the same table
# Collections of the manifest do not list their slides; these are how ours are called.
COLLECTION_NAMES = {"her2": "her2st_", "heart": "aspheart_"}
NO_CLASS = {"her2": ("undetermined",), "heart": ("WH",)}
UNLABELLED = ("undetermined", "WH")  # of slides in no named set
GIVEN = "slides"  # the set of slides in no named set
Places = dict[str, tuple[Path, str]]


@dataclass(frozen=True)
class EvaluationSlide:
    """A labelled slide on its compact grid.

    Attributes:
        name: of the file. adata: from `read_slide`. patient: "" where not known.
        labels: object (n_obs,), class names, None where unlabelled. codes: int64 (n_obs,), -1 where unlabelled.
        classes: names of the codes. rows, cols: int64 (n_obs,), sites.
    """

    name: str
    adata: AnnData = field(repr=False)
    patient: str
    labels: np.ndarray = field(repr=False)
    codes: np.ndarray = field(repr=False)
    classes: tuple[str, ...]
    rows: np.ndarray = field(repr=False)
    cols: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class EvaluationSet:
    """Slides that are averaged before sets are.

    Attributes:
        name: of the set. slides: by name, in their order.
    """

    name: str
    slides: dict[str, EvaluationSlide]


def named_paths(name: str) -> Places:
    """Path and patient of every slide of a set that is on this machine, by slide.

    Raises:
        ValueError: an unknown set, `$STIMG_DATA` not set, or none of the set's slides there; the sentence says what is
            missing and where it can be had.
    """
    if name not in EVALUATION_SETS:
        raise ValueError(f"There is no evaluation set {name!r}: expected one of {', '.join(EVALUATION_SETS)}.")
    sources = [source for source in read_manifest() if source.evaluation_set == name]
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        raise ValueError(f"The set {name!r} is looked for in ${DATA_VARIABLE}, which is not set: {_wanted(sources)}.")
    found = {
        row["name"]: (Path(folder) / "slides" / f"{row['name']}.h5ad", row.get("patient") or "")
        for row in _listed(Path(folder) / "slides.tsv")
        if row["role"].casefold() in ROLES and _belongs(row["name"], name, sources)
    }
    found = {slide: place for slide, place in found.items() if place[0].exists()}
    if not found:
        raise ValueError(f"${DATA_VARIABLE} has no labelled slide of the set {name!r}: {_wanted(sources)}.")
    return found


def paths_of_sets(
    names: Sequence[str], patterns: Sequence[str] = (), exclude: Sequence[str] = (), only: Sequence[str] = ()
) -> dict[str, Places]:
    """Path and patient ("" where not told) of every slide, by slide, by set: the named sets, then that of given slides.

    Args:
        names: of sets. patterns: of given slides, files or globs. exclude: slides to leave out. only: slides to keep;
            all where none is named.

    Raises:
        ValueError: nothing is asked for, a slide to exclude or to keep is nowhere, or a set is left without any; and as
            `named_paths`. FileNotFoundError: a pattern that matches nothing.
    """
    if not names and not patterns:
        raise ValueError("There is nothing to evaluate on: give --sets or --slides.")
    places = {name: named_paths(name) for name in dict.fromkeys(names)}
    if patterns:
        places[GIVEN] = {slide_name(path): (path, "") for path in find_slides(patterns)}
    there = {slide for of_set in places.values() for slide in of_set}
    for told, asked in (("Excluded slides", exclude), ("Slides to keep", only)):
        missing = sorted(set(asked) - there)
        if missing:
            raise ValueError(f"{told} {missing} are not among the {len(there)} slides found: check the names.")
    left = there.intersection(only or there) - set(exclude)
    chosen = {name: {s: place for s, place in of_set.items() if s in left} for name, of_set in places.items()}
    for name in (name for name, of_set in chosen.items() if not of_set):
        raise ValueError(_none_left(name))
    return chosen


def load_sets(
    chosen: Mapping[str, Places], label_key: str = "label", unlabelled: Sequence[str] = UNLABELLED
) -> list[EvaluationSet]:
    """The sets that `paths_of_sets` tells of.

    Args:
        unlabelled: labels of given slides that are no class; named sets know theirs.

    Raises:
        ValueError: a slide that cannot be used; the sentence names it.
    """
    return [
        _load_set(name, places, label_key, unlabelled if name == GIVEN else NO_CLASS.get(name, ()))
        for name, places in chosen.items()
    ]


def load_named_set(name: str, exclude: Sequence[str] = (), label_key: str | None = None) -> EvaluationSet:
    """A set of the manifest from `$STIMG_DATA`, without the slides to exclude.

    Raises:
        ValueError: as `named_paths`, or a slide that cannot be used.
    """
    places = {slide: place for slide, place in named_paths(name).items() if slide not in exclude}
    if not places:
        raise ValueError(_none_left(name))
    return _load_set(name, places, label_key or "label", NO_CLASS.get(name, ()))


def load_given_set(
    paths: Sequence[Path], label_key: str = "label", unlabelled: Sequence[str] = UNLABELLED, name: str = GIVEN
) -> EvaluationSet:
    """A set of files that `read_slide` reads."""
    if not paths:
        raise ValueError(_none_left(name))
    return _load_set(name, {slide_name(path): (path, "") for path in paths}, label_key, unlabelled)


def load_slide(path: Path, label_key: str, unlabelled: Sequence[str], patient: str = "") -> EvaluationSlide:
    """Read one slide.

    Args:
        path: anything that `read_slide` reads. label_key: column of obs. unlabelled: labels that are no class.
        patient: where the slide itself does not say.

    Raises:
        ValueError: no such column, or fewer than two classes; the sentence names the slide.
    """
    adata, name = read_slide(path), slide_name(path)
    try:
        labels = slide_labels(adata, label_key, tuple(unlabelled))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    codes, classes = encode_labels(labels)
    if len(classes) < 2:
        found = f"the class {classes[0]!r} alone" if classes else "no labelled spot"
        raise ValueError(f"{name}: obs[{label_key!r}] has {found} on {adata.n_obs} spots: a probe needs two classes.")
    rows, cols = compact(adata.obs["array_row"].to_numpy(), adata.obs["array_col"].to_numpy(), "lattice")
    patient = known_patient(slide_patient(adata)) or known_patient(patient)
    return EvaluationSlide(name, adata, patient, labels, codes, tuple(classes), rows, cols)


def _load_set(name: str, places: Places, label_key: str, unlabelled: Sequence[str]) -> EvaluationSet:
    slides = {slide: load_slide(path, label_key, unlabelled, patient) for slide, (path, patient) in places.items()}
    return EvaluationSet(name, slides)


def _none_left(name: str) -> str:
    if name == GIVEN:
        return "All slides are excluded: exclude fewer."
    return f"All slides of the set {name!r} are excluded: leave the set out, or exclude fewer."


def _belongs(slide: str, set_name: str, sources: Sequence[Source]) -> bool:
    """Whether a slide is one of the set's: by the id or an alias of a source, also with a suffix like `_g5000`."""
    prefix = COLLECTION_NAMES.get(set_name)
    if prefix and slide.startswith(prefix):
        return True
    names = [name for source in sources for name in source.names]
    return any(slide == name or re.fullmatch(re.escape(name) + r"[_-].+", slide) for name in names)


def _listed(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"${DATA_VARIABLE} holds no {path.name}: it tells which slides are labelled.")
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if rows and not {"name", "role"} <= set(rows[0]):
        raise ValueError(f"{path.name} has the columns {list(rows[0])}: expected name and role, tab-separated.")
    # A row that is cut short has None for the rest, and more than the columns under None.
    return [{key: (value or "").strip() for key, value in row.items() if key is not None} for row in rows]


def _wanted(sources: Sequence[Source]) -> str:
    slides = ", ".join(source.id for source in sources[:4]) + (" and others" if len(sources) > 4 else "")
    places = ", ".join(dict.fromkeys(source.source for source in sources if source.source))
    return f"it needs {slides} (from {places}) as slides/NAME.h5ad, listed in slides.tsv with the role labelled"
