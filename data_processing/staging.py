"""One source at a time: read, quality control, leak guard, a row on disk. What is done is not done again.

A finished source has a file in `.build/`, written last: its slides' records, and beside it their fingerprints. It is
taken for finished only while everything that it depends on is the same.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anndata import AnnData

from data_processing.corpus import slide_patient
from data_processing.corpus_report import IN_CORPUS, outcome
from data_processing.fingerprints import LeakGuard, load_fingerprints, save_fingerprints
from data_processing.layouts import read_source
from data_processing.quality import LIBRARY, QualityRules, apply_quality
from data_processing.slide_fingerprint import Fingerprint, fingerprint
from data_processing.sources import Source
from data_processing.st_corpus import TEXT_COLUMNS, slide_row, write_row
from data_processing.writing import write_whole
from modeling_stimg import GeneVocabulary, read_slide

BUILD_FOLDER = ".build"
STAGE_FORMAT = 1
MAX_FILE_NAME = 150
# How the reason begins where a source is to blame, not its content.
UNAVAILABLE = "could not be"


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

    def key(self, source: Source, path: Path | None) -> str:
        """Changes whenever a source would be built into something else; `path`: the file that it is read from."""
        parts = {
            "format": STAGE_FORMAT,
            "genes": self.vocabulary.ids_sha256,
            "rules": asdict(self.rules),
            "evaluation": [(f.name, hashlib.sha256(f.multisets.tobytes()).hexdigest()) for f in self.evaluation],
            "evaluation_ids": self.evaluation_ids,
            "exclude_patients": self.exclude_patients,
            "exclude": self.exclude,
            "source": asdict(source),
            "file": None if path is None or not path.is_file() else [path.stat().st_size, path.stat().st_mtime_ns],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()


def row_file(output: Path, slide: str) -> Path:
    """Where the row of a slide lies. Ids of collections have folders and odd characters in them: all are escaped."""
    name = re.sub(r"[^A-Za-z0-9._-]", lambda match: f"@{ord(match[0]):06X}", slide)
    if len(name) > MAX_FILE_NAME:
        name = f"{name[:MAX_FILE_NAME]}@{hashlib.sha256(slide.encode('utf-8')).hexdigest()[:16]}"
    return output / "data" / f"{name}.parquet"


def staged(plan: StagePlan, source: Source, path: Path | None) -> list[dict[str, Any]] | None:
    """The records of a source that is finished already, else None."""
    done = plan.output / BUILD_FOLDER / f"{source.id}.json"
    if not done.exists():
        return None
    content = json.loads(done.read_text(encoding="utf-8"))
    rows = [row_file(plan.output, r["id"]) for r in content["records"] if outcome(r) == IN_CORPUS]
    # Rows that a later run did not ask for, and duplicates, were removed.
    whole = content["key"] == plan.key(source, path) and all(row.exists() for row in rows)
    return content["records"] if whole else None


def staged_fingerprints(output: Path, source_id: str) -> list[Fingerprint]:
    """Fingerprints of a finished source's slides."""
    path = output / BUILD_FOLDER / f"{source_id}.npz"
    return load_fingerprints(path) if path.exists() else []


def stage_source(plan: StagePlan, source: Source, path: Path) -> list[dict[str, Any]]:
    """Read a source's slides and write the rows of those that may enter; returns a record of each.

    What cannot be read or written makes a record with the reason, no error: other sources go on. Such a source does not
    count as finished, because the reason may be gone tomorrow.
    """
    build = plan.output / BUILD_FOLDER
    done, prints_file, work_dir = build / f"{source.id}.json", build / f"{source.id}.npz", build / "work" / source.id
    for stale in (done, prints_file):
        stale.unlink(missing_ok=True)
    guarded = plan.evaluation or plan.evaluation_ids or plan.exclude_patients
    guard = LeakGuard(plan.evaluation, plan.evaluation_ids, plan.exclude_patients) if guarded else None
    records, prints = [], []
    try:
        slides = {source.id: read_slide(path)} if source.is_local else read_source(path, source, work_dir)
        for name, adata in slides.items():
            record, found = _stage_slide(plan, source, name, adata, guard)
            records.append(record)
            prints += [] if found is None else [found]
    except (ValueError, OSError, ImportError) as error:
        records.append(unavailable_record(source, "read", _sentence(error)))
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)
    if any(record.get("refused", "").startswith(UNAVAILABLE) for record in records):
        return records
    if prints:
        save_fingerprints(prints, prints_file)
    content = {"key": plan.key(source, path), "records": records}
    write_whole(done, (json.dumps(content, indent=1) + "\n").encode("utf-8"))
    return records


def unavailable_record(source: Source, what: str, reason: str) -> dict[str, Any]:
    """What is told of a source that could not be fetched, read or built."""
    return {**_texts(source), "id": source.id, "refused": f"{UNAVAILABLE} {what}: {reason}"}


def _stage_slide(
    plan: StagePlan, source: Source, name: str, adata: AnnData, guard: LeakGuard | None
) -> tuple[dict[str, Any], Fingerprint | None]:
    """Decide on one slide, and write its row if it may enter."""
    texts = _texts(source, adata)
    record = {**texts, "id": name}
    if name in plan.exclude:
        return {**record, "refused": "left out by its name, as was asked for."}, None
    try:
        kept, decisions = apply_quality(adata, plan.vocabulary, plan.rules, source.organism)
        record |= decisions.to_dict()
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
    except (ValueError, OSError) as error:
        return {**record, "refused": f"{UNAVAILABLE} built: {_sentence(error)}"}, None
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


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
