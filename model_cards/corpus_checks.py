"""What must hold of a corpus folder before it is published as a dataset."""

import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from anndata import AnnData
from pyarrow import ArrowInvalid
from scipy.sparse import csr_matrix

from data_processing.assembling import content_hash
from data_processing.corpus_report import IN_CORPUS, outcome
from data_processing.fingerprints import LeakGuard, load_fingerprints
from data_processing.open_corpus import CORPUS_FILE
from data_processing.slide_fingerprint import fingerprint
from data_processing.sources import read_manifest
from data_processing.st_corpus import FEATURES, numpy_row
from modeling_stimg import GeneVocabulary
from modeling_stimg.model_files import PICKLES, check_weights

NEEDED = ("README.md", "report.json", "genes.json", CORPUS_FILE)
# `arrow/` is made of the same rows, and not published; `.build/` is of the building.
OPTIONAL = ("report.png", "evaluation.npz", "gene_vectors.safetensors", "LICENSE", ".gitattributes", "data/*.parquet")
NOT_TRAINED_ON = ("labelled", "evaluation")


def check_corpus_folder(folder: Path) -> Iterator[str]:
    """Check everything of a corpus but its card's metadata, telling what holds, one sentence at a time.

    Raises:
        ValueError, OSError: what does not hold, in one sentence.
    """
    _check_files(folder)
    report = _json(folder / "report.json")
    shards = sorted((folder / "data").glob("*.parquet"))
    rows = _check_shards(folder, shards, report)
    yield f"{len(shards)} shards hold the rows that {CORPUS_FILE} and report.json tell of, to the bit"
    yield _check_guard(folder, shards, rows, report)


def published_files(folder: Path) -> list[Path]:
    """The files of a folder that a Hub repository of a corpus may hold."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {path: path.relative_to(folder).as_posix() for path in found}
    return [path for path in found if any(fnmatch(names[path], pattern) for pattern in (*NEEDED, *OPTIONAL))]


def _check_files(folder: Path) -> None:
    if not (folder / CORPUS_FILE).exists():
        raise FileNotFoundError(
            f"{folder} holds no {CORPUS_FILE}: expected a corpus that data_processing/build_corpus.py has built to its "
            "end."
        )
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing or not list((folder / "data").glob("*.parquet")):
        lacking = ", ".join([*missing, *([] if missing else ["data/*.parquet"])])
        raise FileNotFoundError(f"{folder} lacks {lacking}: build the corpus again, data_processing/build_corpus.py.")
    pickles = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix in PICKLES and ".build" not in p.parts]
    if pickles:
        raise ValueError(f"{folder} holds {', '.join(sorted(pickles)[:3])}: pickles are not published; take them away.")
    if (folder / "gene_vectors.safetensors").exists():
        check_weights(folder / "gene_vectors.safetensors", str(folder))


def _check_shards(folder: Path, shards: list[Path], report: dict[str, Any]) -> set[str]:
    """The rows' ids; ValueError unless they are those that the corpus tells of, to the bit."""
    told = _json(folder / CORPUS_FILE)
    genes = GeneVocabulary.load(folder / "genes.json").ids_sha256
    if genes != told.get("vocabulary"):
        raise ValueError(f"genes.json of {folder} holds other genes than {CORPUS_FILE} tells of: build it again.")
    schema, shard_of = FEATURES.arrow_schema, {}
    for shard in shards:
        try:
            found = pq.read_schema(shard)
            if not found.remove_metadata().equals(schema.remove_metadata()):
                raise ValueError("its columns are not those of a corpus")
            table = pq.read_table(shard, columns=["id", "vocabulary"]).to_pylist()
        except (ArrowInvalid, OSError, ValueError) as error:
            raise ValueError(f"{shard.name} of {folder} is no shard of a corpus ({error}): build it again.") from error
        if any(row["vocabulary"] != genes for row in table):
            raise ValueError(f"{shard.name} numbers its genes otherwise than genes.json of {folder}: build it again.")
        shard_of |= {row["id"]: shard for row in table}
    listed = {record["id"] for record in report["records"] if outcome(record) == IN_CORPUS}
    if set(shard_of) != listed or not len(shards) == len(shard_of) == told.get("slides"):
        differing = ", ".join(sorted(set(shard_of) ^ listed)[:3]) or "one of them twice"
        raise ValueError(
            f"{folder} holds {len(shards)} shards, its report tells of {len(listed)} slides and {CORPUS_FILE} of "
            f"{told.get('slides')} ({differing}): build it again."
        )
    # In the order of the report, in which they were hashed.
    in_order = [shard_of[record["id"]] for record in report["records"] if record["id"] in shard_of]
    if told.get("shards") != [shard.relative_to(folder).as_posix() for shard in in_order]:
        raise ValueError(f"{CORPUS_FILE} of {folder} names other shards, or in another order: build it again.")
    if content_hash(in_order) != report["extra"].get("content_sha256"):
        raise ValueError(f"The rows of {folder} are not those that report.json was written of: build it again.")
    return set(shard_of)


def _check_guard(folder: Path, shards: list[Path], rows: set[str], report: dict[str, Any]) -> str:
    """No slide of a role that is kept out, none that is called or made like an evaluation slide."""
    for record in report["records"]:
        if record["id"] in rows and record.get("role") in NOT_TRAINED_ON:
            raise ValueError(f"{record['id']} of {folder} has the role {record['role']}: it must not be in a corpus.")
    prints = load_fingerprints(folder / "evaluation.npz") if (folder / "evaluation.npz").exists() else []
    evaluation = {name for source in read_manifest() if source.role == "evaluation" for name in source.names}
    evaluation |= set(report["extra"].get("evaluation_ids", ()))
    guard = LeakGuard(prints, sorted(evaluation))
    vocabulary = GeneVocabulary.load(folder / "genes.json")
    for shard in shards:
        row = numpy_row(pq.read_table(shard))
        reason = guard.check(fingerprint(_slide(row, vocabulary), vocabulary, row["id"]))
        if reason:
            raise ValueError(f"{folder} must not be published: {reason}")
    return f"no evaluation slide by {len(guard.ids)} ids, nor by the content of {len(prints)} of them"


def _slide(row: dict[str, Any], vocabulary: GeneVocabulary) -> AnnData:
    shape = len(row["indptr"]) - 1, len(vocabulary)
    slide = AnnData(csr_matrix((row["counts"].astype("float32"), row["indices"], row["indptr"]), shape=shape))
    slide.var_names = vocabulary.gene_ids
    return slide


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): build the corpus again.") from error
