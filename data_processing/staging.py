"""One source at a time: read, quality control, leak guard, a row on disk. What is done is not done again.

A finished source has a file in `.build/`, written last: its slides' records, and beside it their fingerprints. It is
taken for finished only while everything that it depends on is the same, wherever that lies: builds of several machines
can be put together.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData

from data_processing.corpus import slide_patient
from data_processing.corpus_report import IN_CORPUS, outcome
from data_processing.fingerprints import LeakGuard, load_fingerprints, save_fingerprints
from data_processing.layouts import ReadSlide, open_source
from data_processing.quality import LIBRARY, QualityRules, apply_quality
from data_processing.slide_fingerprint import Fingerprint, fingerprint
from data_processing.sources import Source
from data_processing.st_corpus import TEXT_COLUMNS, slide_row, write_row
from data_processing.writing import write_whole
from modeling_stimg import GeneVocabulary

BUILD_FOLDER = ".build"
DUPLICATES_FOLDER = "duplicates"
STAGE_FORMAT = 2
MAX_FILE_NAME = 150
# How the reason begins where a source is to blame, not its content.
UNAVAILABLE = "could not be"
# What of a source changes nothing in what is built of it: where it lies, and what is told to people.
NO_CONTENT = ("url", "checksum", "evaluation_set", "labels", "verified", "notes")


@dataclass(frozen=True)
class StagePlan:
    """What every source is built by; plain values, so that another process can have them.

    Attributes:
        output: folder of the corpus. vocabulary: its genes. rules: of quality control.
        evaluation: fingerprints of slides that must not enter. evaluation_ids: names of such slides.
        exclude_patients: whose slides are left out. exclude: names of slides that are.
    """

    output: Path
    vocabulary: GeneVocabulary
    rules: QualityRules
    evaluation: tuple[Fingerprint, ...] = ()
    evaluation_ids: tuple[str, ...] = ()
    exclude_patients: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @cached_property
    def _basis(self) -> dict[str, Any]:
        """What every source depends on."""
        return {
            "format": STAGE_FORMAT,
            "genes": self.vocabulary.sha256,
            "rules": asdict(self.rules),
            "evaluation": sorted(fingerprint_digest(known) for known in self.evaluation),
            "evaluation_ids": sorted(self.evaluation_ids),
            "exclude_patients": sorted(self.exclude_patients),
            "exclude": sorted(self.exclude),
        }

    def key(self, source: Source, path: Path | None) -> str:
        """Changes whenever a source would be built into something else; `path`: a local source's file or folder."""
        return _digest({**self._basis, **source_content(source, path)})


def source_content(source: Source, path: Path | None) -> dict[str, Any]:
    """What tells a source's content from another's: a local one's bytes, a public one's addresses and checksums."""
    told = {name: value for name, value in asdict(source).items() if name not in NO_CONTENT}
    if source.is_local:
        return {**told, "member": source.member, "bytes": None if path is None else files_digest(path)}
    return {**told, "url": source.url, "checksum": source.checksum}


def files_digest(path: Path) -> str:
    """sha256 of a file, or of all files of a folder and their names."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            inside = hashlib.file_digest(opened, "sha256").hexdigest()
        digest.update(f"{file.relative_to(path).as_posix()}\n{inside}\n".encode())
    return digest.hexdigest()


def fingerprint_digest(known: Fingerprint) -> str:
    """sha256 of a fingerprint, its name and patient included."""
    digest = hashlib.sha256(json.dumps([known.name, known.patient, known.num_spots]).encode("utf-8"))
    for array in (known.genes, known.informative, known.multisets, known.spot_genes, known.spot_counts):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


# ---------------------------------------------------------------- files of a build


def row_file(output: Path, slide: str) -> Path:
    """Where the row of a slide lies. Ids of collections have folders and odd characters in them: all are escaped."""
    name = re.sub(r"[^A-Za-z0-9._-]", lambda match: f"@{ord(match[0]):06X}", slide)
    if len(name) > MAX_FILE_NAME:
        name = f"{name[:MAX_FILE_NAME]}@{hashlib.sha256(slide.encode('utf-8')).hexdigest()[:16]}"
    return output / "data" / f"{name}.parquet"


def duplicate_file(output: Path, slide: str) -> Path:
    """Where a row waits that is there already under another name: it counts again once that one is left out."""
    return output / BUILD_FOLDER / DUPLICATES_FOLDER / row_file(output, slide).name


def place_rows(output: Path, kept: list[str], duplicates: list[str]) -> list[Path]:
    """Let `data/` hold the rows of the slides `kept`, in their order, and nothing else."""
    (output / BUILD_FOLDER / DUPLICATES_FOLDER).mkdir(exist_ok=True)
    for name in kept:
        if not row_file(output, name).exists():
            duplicate_file(output, name).replace(row_file(output, name))
    for name in duplicates:
        if row_file(output, name).exists():
            row_file(output, name).replace(duplicate_file(output, name))
    files = [row_file(output, name) for name in kept]
    waiting = {duplicate_file(output, name) for name in duplicates}
    for folder, wanted in (("data", set(files)), (f"{BUILD_FOLDER}/{DUPLICATES_FOLDER}", waiting)):
        for stray in set((output / folder).iterdir()) - wanted:
            stray.unlink()  # a row that is not asked for any more, what a killed build left
    return files


def staged(plan: StagePlan, source: Source, path: Path | None) -> list[dict[str, Any]] | None:
    """The records of a source that is finished already, else None."""
    done = plan.output / BUILD_FOLDER / f"{source.id}.json"
    if not done.exists():
        return None
    content = json.loads(done.read_text(encoding="utf-8"))
    names = [record["id"] for record in content["records"] if outcome(record) == IN_CORPUS]
    # Rows that a later run did not ask for were removed.
    there = all(row_file(plan.output, name).exists() or duplicate_file(plan.output, name).exists() for name in names)
    return content["records"] if there and content["key"] == plan.key(source, path) else None


def staged_fingerprints(output: Path, source_id: str) -> list[Fingerprint]:
    """Fingerprints of a staged source's slides."""
    path = output / BUILD_FOLDER / f"{source_id}.npz"
    return load_fingerprints(path) if path.exists() else []


# ---------------------------------------------------------------- one source


def stage_source(plan: StagePlan, source: Source, path: Path) -> list[dict[str, Any]]:
    """Read a source's slides, one at a time, and write the rows of those that may enter; returns a record of each.

    What cannot be read or written makes a record with the reason, no error: other slides and sources go on. Such a
    source does not count as finished, because the reason may be gone tomorrow.
    """
    build = plan.output / BUILD_FOLDER
    done, prints_file, work_dir = build / f"{source.id}.json", build / f"{source.id}.npz", build / "work" / source.id
    for stale in (done, prints_file):
        stale.unlink(missing_ok=True)
    shutil.rmtree(work_dir, ignore_errors=True)
    guarded = plan.evaluation or plan.evaluation_ids or plan.exclude_patients
    guard = LeakGuard(plan.evaluation, plan.evaluation_ids, plan.exclude_patients) if guarded else None
    records, prints = [], []
    try:
        for name, read in open_source(path, source, work_dir).items():
            record, found = _stage_slide(plan, source, name, read, guard)
            records.append(record)
            prints += [] if found is None else [found]
        if prints:
            save_fingerprints(prints, prints_file)
        if not any(record.get("refused", "").startswith(UNAVAILABLE) for record in records):
            content = {"key": plan.key(source, path), "records": records}
            write_whole(done, (json.dumps(content, indent=1) + "\n").encode("utf-8"))
    except (ValueError, OSError, ImportError) as error:
        records = [record for record in records if record["id"] != source.id]
        records.append(unavailable_record(source, "read", sentence(error)))
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)
    return records


def source_record(source: Source, **reason: str) -> dict[str, Any]:
    """What is told of a source none of whose slides was built."""
    return {**_texts(source), "id": source.id, **reason}


def unavailable_record(source: Source, what: str, reason: str) -> dict[str, Any]:
    """What is told of a source that could not be fetched, read or built."""
    return source_record(source, refused=f"{UNAVAILABLE} {what}: {reason}")


def _stage_slide(
    plan: StagePlan, source: Source, name: str, read: ReadSlide, guard: LeakGuard | None
) -> tuple[dict[str, Any], Fingerprint | None]:
    """Decide on one slide, and write its row if it may enter."""
    record = {**_texts(source), "id": name}
    if name in plan.exclude:
        return {**record, "excluded": "by its name."}, None
    doing = "read"
    try:
        adata = read()
        doing = "built"
        texts = _texts(source, adata)
        kept, decisions = apply_quality(adata, plan.vocabulary, plan.rules, source.organism)
        record |= {**texts, **decisions.to_dict()}
        if kept is None:
            return record, None
        # The guard sees the slide before spots and genes were dropped: more of it to recognise.
        found = fingerprint(adata, plan.vocabulary, name, texts["patient"])
        record["leak"] = "" if guard is None else guard.check(found)
        if not record["leak"]:
            known = {k: v for k, v in texts.items() if k in TEXT_COLUMNS}
            row = slide_row(kept, plan.vocabulary, name, kept.obs[LIBRARY].to_numpy(), adata.n_vars, **known)
            record["spots_sharing_a_place"] = kept.n_obs - row["num_spots"]
            record["num_spots"], record["num_non_zeros"] = row["num_spots"], row["num_non_zeros"]
            write_row(row, row_file(plan.output, name))
    except (ValueError, OSError, ImportError) as error:
        return {**record, "refused": f"{UNAVAILABLE} {doing}: {sentence(error)}"}, None
    return record, found


def _texts(source: Source, adata: AnnData | None = None) -> dict[str, str]:
    """What is known of a slide; the manifest wins over what the slide says of itself."""
    own: Mapping[str, Any] = adata.uns.get("meta", {}) if adata is not None else {}
    own = own if isinstance(own, Mapping) else {}
    texts = {name: str(getattr(source, name)) for name in TEXT_COLUMNS}
    texts["role"] = source.role
    for name, other in (("organ", "organ"), ("technology", "platform"), ("source", "repo")):
        texts[name] = texts[name] or str(own.get(other, ""))
    texts["patient"] = texts["patient"] or (slide_patient(adata) if adata is not None else "")
    return texts


def sentence(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__
