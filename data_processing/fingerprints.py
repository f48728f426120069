"""Fingerprints of many slides: duplicates in a corpus, evaluation slides that must not be in it, and files of them.

What a fingerprint is and when two slides are the same is told in `slide_fingerprint`, whose names are here too.
"""

from __future__ import annotations

import io
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from data_processing.slide_fingerprint import Fingerprint, Similarity, fingerprint, place_type, similarity
from data_processing.writing import write_whole

FORMAT = 1
# Accessions of samples, which no two samples share.
_ACCESSION = re.compile(r"(?<![a-z])(gsm\d{4,}|sam(?:n|d|ea)\d{5,}|[sed]r[rxs]\d{5,})")
UNKNOWN_PATIENTS = {"  ", " unknown ", " na ", " n a ", " nan ", " none ", " pooled "}


def find_duplicates(fingerprints: Sequence[Fingerprint], progress: bool = False) -> list[tuple[str, str, Similarity]]:
    """Slides that are there already: (name of the one that stays, name of the one to drop, how similar they are).

    The first of the same slides stays; a later one is compared with those that stay. Pairs that cannot be compared are
    no duplicates: a slide twice in a corpus costs little, unlike an evaluation slide in it.

    Raises:
        ValueError: two fingerprints of one name.
    """
    names = [slide.name for slide in fingerprints]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"Several fingerprints are called {repeated[0]!r}: every slide needs its own name.")
    stay: list[Fingerprint] = []
    duplicates = []
    for slide in tqdm(fingerprints, desc="find duplicates", disable=not progress):
        found = next(((kept, s) for kept in stay if (s := similarity(kept, slide)).same), None)
        if found is None:
            stay.append(slide)
        else:
            duplicates.append((found[0].name, slide.name, found[1]))
    return duplicates


class LeakGuard:
    """Keeps evaluation slides out of a corpus.

    A slide is turned away, in this order,

    - by id, whatever its case and punctuation: the same id; a shared accession of a sample (GSM, SAMN, SRR, ...); or
      one id within the other, piece by piece, where it is telling enough: a number of five digits (`151673` in
      `spatialLIBD_151673`), a name such as `her2st_A1`, or sixteen letters and digits. `A1` or `section_1` count only
      as the whole id. List every id under which an evaluation slide is known;
    - by patient: neighbouring sections of an evaluation slide are no strangers to it. The patients of
      `evaluation_fingerprints` and `exclude_patients`, compared as a whole, so they have to be unique over studies:
      `her2st A`, not `A`, which would turn away every donor A. A patient that is not known is nobody's;
    - by content: the slide is `same` as an evaluation slide;
    - because it cannot be compared with one of them: what is not known to be another slide stays out.

    Args:
        evaluation_fingerprints: of the evaluation slides; their names count as ids.
        evaluation_ids: further ids of evaluation slides. exclude_patients: further donors.

    Raises:
        ValueError: nothing to guard.
    """

    def __init__(
        self,
        evaluation_fingerprints: Sequence[Fingerprint],
        evaluation_ids: Iterable[str],
        exclude_patients: Iterable[str] = (),
    ):
        self.fingerprints = list(evaluation_fingerprints)
        self.ids = list(dict.fromkeys([*(slide.name for slide in self.fingerprints), *evaluation_ids]))
        patients = {_pieces(p) for p in (*(slide.patient for slide in self.fingerprints), *exclude_patients)}
        self.patients = patients - UNKNOWN_PATIENTS
        if not self.ids and not self.patients:
            raise ValueError("A leak guard without fingerprints, ids and patients guards nothing: give one of them.")

    def check(self, fingerprint: Fingerprint) -> str:
        """Why a slide must not be in the corpus, in one sentence; "" where nothing speaks against it."""
        name, patient = fingerprint.name, fingerprint.patient
        for evaluation in self.ids:
            evidence = _shared_id(name, evaluation)
            if evidence:
                return f"{name} is evaluation slide {evaluation} by its id ({evidence})."
        if _pieces(patient) in self.patients:
            return f"{name} is of patient {patient}, whose slides are left out."
        similarities = [(slide.name, similarity(fingerprint, slide)) for slide in self.fingerprints]
        for evaluation, found in similarities:
            if found.same:
                return f"{name} has the content of evaluation slide {evaluation}: {found}."
        for evaluation, found in similarities:
            if not found.comparable:
                return f"{name} could not be compared with evaluation slide {evaluation}: {found}."
        return ""


def known_patient(patient: str | None) -> str:
    """A donor's name, "" where it says that nobody knows: `?`, `NA`, `unknown`."""
    return "" if patient is None or _pieces(patient) in UNKNOWN_PATIENTS else patient


def _pieces(name: str) -> str:
    """Letters and digits of a name, apart where anything else stands between them: `HER2ST-A1` -> ` her2st a1 `."""
    return " " + " ".join(re.findall(r"[^\W_]+", name.casefold())) + " "


def _shared_id(name: str, evaluation: str) -> str:
    """What two ids have in common that makes them ids of one slide; "" where they are not."""
    first, second = _pieces(name), _pieces(evaluation)
    if first == second:
        return "the same id" if first.strip() else ""
    accessions = set(_ACCESSION.findall(first)) & set(_ACCESSION.findall(second))
    if accessions:
        return f"both are {min(accessions).upper()}"
    shorter, longer = sorted((first, second), key=len)
    return f"both hold {shorter.strip()!r}" if shorter in longer and _is_telling(shorter) else ""


def _is_telling(pieces: str) -> bool:
    """Whether an id stands for one slide wherever it occurs: `151673`, `her2st a1`; not `a1`, `section 1`, `rep1 b`."""
    several = " " in pieces.strip()
    return (
        re.search(r"\d{5}", pieces) is not None
        or (several and re.search(r"[a-z]\d+[a-z]", pieces) is not None)
        or len(pieces.replace(" ", "")) >= 16
    )


# ---------------------------------------------------------------- files


def save_fingerprints(fingerprints: Sequence[Fingerprint], path: str | os.PathLike[str]) -> None:
    """Write fingerprints to one compressed `.npz` of plain arrays, whole or not at all; the same bytes for the same.

    About 0.3 MB for a Visium slide of 3,400 spots and the whole transcriptome.
    """
    genes = np.unique(np.concatenate([slide.genes for slide in fingerprints] or [np.zeros(0, np.uint64)]))
    lists = [_differences(slide) for slide in fingerprints]
    content = {
        "format": np.int64(FORMAT),
        "names": np.array([slide.name for slide in fingerprints], dtype=str),
        "patients": np.array([slide.patient for slide in fingerprints], dtype=str),
        "num_spots": np.array([slide.num_spots for slide in fingerprints], np.int64),
        "list_shapes": np.array([slide.spot_genes.shape for slide in fingerprints], np.int64).reshape(-1, 2),
        "genes": genes,
        "counted": np.array([np.packbits(np.isin(genes, slide.genes)) for slide in fingerprints], np.uint8),
        "informative": np.packbits(_joined([slide.informative for slide in fingerprints], bool)),
        "multisets": _joined([slide.multisets for slide in fingerprints], np.uint32),
        "spot_genes": _joined(lists, np.uint32),
        "spot_counts": _joined([slide.spot_counts for slide in fingerprints], np.uint16),
    }
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **content)
    write_whole(Path(path), file.getvalue())


def _joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(array.reshape(-1) for array in arrays)]).astype(dtype)


def _differences(slide: Fingerprint) -> np.ndarray:
    """`spot_genes` as steps from one gene to the next, 0 after the last: small numbers compress well."""
    steps = np.diff(slide.spot_genes.astype(np.int64), axis=1, prepend=0)
    return np.where(slide.spot_counts > 0, steps, 0)


def load_fingerprints(path: str | os.PathLike[str]) -> list[Fingerprint]:
    """Fingerprints from `save_fingerprints`, in their order.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it holds no fingerprints of a known format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected fingerprints (.npz) from save_fingerprints.")
    try:
        with np.load(path, allow_pickle=False) as file:
            if int(file["format"]) != FORMAT:
                raise ValueError(f"format {file['format']}, expected {FORMAT}")
            return _unpacked({key: file[key] for key in file.files})
    except (ValueError, TypeError, KeyError, IndexError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} holds no fingerprints ({error}): write it with save_fingerprints.") from error


def _unpacked(content: dict[str, np.ndarray]) -> list[Fingerprint]:
    """The fingerprints of a file's arrays. ValueError where their lengths disagree."""
    genes, shapes = content["genes"], content["list_shapes"]
    counted = np.unpackbits(content["counted"], axis=1, count=len(genes)).astype(bool) if len(shapes) else []
    gene_ends = np.cumsum([mask.sum() for mask in counted], dtype=np.int64)
    entry_ends = np.cumsum(shapes.prod(axis=1), dtype=np.int64)
    num_genes, num_entries = (int(ends[-1]) if len(ends) else 0 for ends in (gene_ends, entry_ends))
    informative = np.unpackbits(content["informative"], count=num_genes).astype(bool)
    lengths = [len(content[key]) for key in ("names", "patients", "num_spots", "counted")]
    ends = [len(content[key]) for key in ("multisets", "spot_genes", "spot_counts")]
    if lengths != [len(shapes)] * 4 or ends != [num_genes, num_entries, num_entries]:
        raise ValueError("its arrays disagree in length")
    slides = []
    for number, shape in enumerate(shapes):
        own = slice(gene_ends[number - 1] if number else 0, gene_ends[number])
        entries = slice(entry_ends[number - 1] if number else 0, entry_ends[number])
        spot_counts = content["spot_counts"][entries].reshape(shape)
        spot_genes = np.where(spot_counts > 0, np.cumsum(content["spot_genes"][entries].reshape(shape), axis=1), 0)
        if spot_genes.size and spot_genes.max() >= own.stop - own.start:
            raise ValueError("a spot has a gene that its slide has not")
        slides.append(
            Fingerprint(
                name=str(content["names"][number]),
                patient=str(content["patients"][number]),
                num_spots=int(content["num_spots"][number]),
                genes=genes[counted[number]],
                informative=informative[own],
                multisets=content["multisets"][own],
                spot_genes=spot_genes.astype(place_type(own.stop - own.start)),
                spot_counts=spot_counts,
            )
        )
    return slides


__all__ = [
    "Fingerprint",
    "LeakGuard",
    "Similarity",
    "find_duplicates",
    "fingerprint",
    "load_fingerprints",
    "save_fingerprints",
    "similarity",
]
