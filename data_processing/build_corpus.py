r"""Slides -> a corpus: fetched, checked, guarded against leaks, written as rows, and made ready for training.

    python data_processing/build_corpus.py --slides 'my_slides' --gene_table genes.tsv --output corpus
    python data_processing/build_corpus.py --manifest data_processing/sources.tsv --gene_table genes.tsv \
        --evaluation evaluation.npz --output corpus --num_proc 8

The same command goes on where a killed one stopped. `--shard 0/4` builds a quarter of the sources on one of four
machines; copy the folders of all shards into one (`data/` and `.build/`), and the command without `--shard` finishes
it. Writes `data/*.parquet` (to publish), `arrow/` (memory-mapped, for training), `genes.json`,
`gene_vectors.safetensors`, `report.json`, `README.md` (a dataset card) and `report.png`. Exit status 1 if a source
could not be fetched or read.
"""

import csv
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import HfArgumentParser

from data_processing.assembling import assemble, content_hash
from data_processing.corpus import find_slides, read_slides, slide_name, vocabulary_of
from data_processing.corpus_report import IN_CORPUS, outcome, reason_of, write_report
from data_processing.fetching import Fetched, fetch_sources
from data_processing.fingerprints import find_duplicates, load_fingerprints, save_fingerprints
from data_processing.quality import QualityRules
from data_processing.slide_fingerprint import Fingerprint, fingerprint
from data_processing.sources import Source, read_manifest
from data_processing.staging import (
    BUILD_FOLDER,
    UNAVAILABLE,
    StagePlan,
    row_file,
    stage_source,
    staged,
    staged_fingerprints,
    unavailable_record,
)
from modeling_stimg import GeneVocabulary, read_slide

SLIDE_TABLE = "slides.tsv"
CORPUS_ROLES, EVALUATION_ROLES = ("", "corpus", "unlabelled"), ("evaluation", "labelled")
CONFIGS = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*.parquet\n"


@dataclass
class BuildArguments:
    """Which slides, what they need, and where the corpus goes."""

    output: str = field(metadata={"help": "Folder of the corpus; made if missing."})
    manifest: str | None = field(default=None, metadata={"help": "Table of sources, as data_processing/sources.tsv."})
    slides: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Local slides: folders of slides, files or globs. A slides.tsv in such a folder or beside it "
            "(name, role, and what else a manifest tells) keeps slides of role evaluation or labelled out."
        },
    )
    exclude: list[str] = field(default_factory=list, metadata={"help": "Names of slides or sources to leave out."})
    exclude_patients: list[str] = field(default_factory=list, metadata={"help": "Donors whose slides are left out."})
    evaluation: list[str] = field(
        default_factory=list,
        metadata={"help": "Slides that must not enter, or .npz files of their fingerprints, as a corpus holds one."},
    )
    gene_table: str | None = field(
        default=None,
        metadata={"help": "TSV with gene_id and gene_name: the genes of the corpus; else all genes of local slides."},
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads go; default: .downloads in output."})
    num_proc: int = field(default=1, metadata={"help": "Processes that read slides."})
    shard: str | None = field(default=None, metadata={"help": "i/n: build the i-th of n parts of the sources, from 0."})
    min_counts: int = field(default=QualityRules.min_counts, metadata={"help": "Counts that a spot needs."})
    min_spots: int = field(default=QualityRules.min_spots, metadata={"help": "Spots that a slide needs."})
    min_genes: int = field(default=QualityRules.min_genes, metadata={"help": "Known genes that a slide needs."})
    target_sum: float = field(default=1e4, metadata={"help": "Counts per spot for means, deviations and vectors."})
    rank: int = field(default=256, metadata={"help": "Leading gene vectors to compute; 0 = none."})
    seed: int = field(default=0, metadata={"help": "Seed of the gene vectors."})
    name: str = field(default="Spatial transcriptomics corpus", metadata={"help": "Title of the card."})


def local_sources(patterns: Sequence[str]) -> tuple[list[Source], list[str]]:
    """Slides in folders, files or globs as sources; what a `slides.tsv` tells of them goes with them.

    Returns:
        The sources, and the names of all evaluation slides that such tables list, also of those that are not here.

    Raises:
        FileNotFoundError: a pattern that matches nothing. ValueError: a `slides.tsv` with an unknown role.
    """
    sources: list[Source] = []
    evaluation: dict[str, None] = {}
    for pattern in patterns:
        for path in find_slides([pattern]):
            inside = sorted(p for p in path.glob("*.h5ad")) if path.is_dir() else []
            inside += sorted(p for p in path.iterdir() if (p / "spatial").is_dir()) if path.is_dir() else []
            known = _slide_table(path if inside else path.parent)
            for slide in inside or [path]:
                told = known.get(slide_name(slide), {})
                sources.append(Source(id=slide_name(slide), url=str(slide.resolve()), **told))
            evaluation |= {name: None for name, told in known.items() if told["role"] == "evaluation"}
    return sources, list(evaluation)


def _slide_table(folder: Path) -> dict[str, dict[str, str]]:
    """What `slides.tsv` in a folder or beside it tells, by name; empty where there is none."""
    table = next((p for p in (folder / SLIDE_TABLE, folder.parent / SLIDE_TABLE) if p.is_file()), None)
    if table is None:
        return {}
    columns = {f.name for f in fields(Source)} - {"id", "url", "layout", "checksum", "labels", "contents", "verified"}
    told = {}
    with table.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            role = (row.get("role") or "").strip().casefold()
            if not row.get("name") or role not in (*CORPUS_ROLES, *EVALUATION_ROLES):
                raise ValueError(
                    f"{table} has a row of name {row.get('name')!r} and role {row.get('role')!r}: expected a name, and "
                    f"one of the roles {', '.join((*CORPUS_ROLES[1:], *EVALUATION_ROLES))}, or none."
                )
            row.setdefault("technology", row.get("platform", ""))
            row.setdefault("source", row.get("source_repository", ""))
            texts = {k: v or "" for k, v in row.items() if k in columns}
            texts["role"] = "evaluation" if role in EVALUATION_ROLES else "corpus"
            told[row["name"].strip()] = texts
    return told


def evaluation_fingerprints(
    arguments: BuildArguments, sources: Sequence[Source], vocabulary: GeneVocabulary
) -> list[Fingerprint]:
    """Of every slide that must not enter: those given, and the local ones whose role is evaluation."""
    found: list[Fingerprint] = []
    paths = [Path(s.url) for s in sources if s.role == "evaluation" and s.is_local]
    for given in arguments.evaluation:
        if given.endswith(".npz"):
            found += load_fingerprints(given)
        else:
            paths += find_slides([given])
    for path in tqdm(paths, desc="fingerprint evaluation slides", disable=not paths):
        # Without the donor: to leave out the donors of evaluation slides, too, is asked for by --exclude_patients.
        found.append(fingerprint(read_slide(path), vocabulary, slide_name(path)))
    return found


def stage_all(plan: StagePlan, fetched: Sequence[Fetched], num_proc: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Records of all slides in the order of the sources, and a sentence for every source that failed."""
    records = {f.source.id: [unavailable_record(f.source, "fetched", f.error)] for f in fetched if f.error}
    todo = []
    for item in (f for f in fetched if f.path is not None):
        done = staged(plan, item.source, item.path)
        if done is None:
            todo.append(item)
        else:
            records[item.source.id] = done
    with tqdm(total=len(fetched), initial=len(records), desc="slides") as bar:
        if num_proc > 1 and len(todo) > 1:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(min(num_proc, len(todo)), mp_context=context) as pool:
                futures = {item.source.id: pool.submit(stage_source, plan, item.source, item.path) for item in todo}
                for item in todo:
                    try:
                        records[item.source.id] = futures[item.source.id].result()
                    except BrokenProcessPool:
                        message = "the process that read it died, perhaps for memory: try fewer with --num_proc"
                        records[item.source.id] = [unavailable_record(item.source, "built", message)]
                    bar.update()
        else:
            for item in todo:
                records[item.source.id] = stage_source(plan, item.source, item.path)
                bar.update()
    ordered = [record for item in fetched for record in records[item.source.id]]
    return ordered, [f"{r['id']}: {r['refused']}" for r in ordered if r.get("refused", "").startswith(UNAVAILABLE)]


def mark_duplicates(output: Path, records: list[dict[str, Any]], source_ids: Sequence[str]) -> None:
    """Of slides with the same content the first stays; the others are told and their rows removed."""
    kept = {record["id"] for record in records if outcome(record) == IN_CORPUS}
    prints = [f for name in source_ids for f in staged_fingerprints(output, name) if f.name in kept]
    by_name = {record["id"]: record for record in records}
    for first, second, found in find_duplicates(prints):
        if not by_name[first].get("duplicate"):
            by_name[second]["duplicate"] = f"{second} has the content of {first}: {found}."


def in_shard(sources: Sequence[Source], shard: str | None) -> list[Source]:
    """The sources of a part `i/n`.

    Raises:
        ValueError: anything but two whole numbers with 0 <= i < n.
    """
    if shard is None:
        return list(sources)
    part, _, parts = shard.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise ValueError(f"shard is {shard!r}: expected i/n with 0 <= i < n, such as 0/4.")
    return list(sources)[int(part) :: int(parts)]


def corpus_vocabulary(arguments: BuildArguments, sources: Sequence[Source]) -> GeneVocabulary:
    """The gene table's genes, or those of all local slides.

    Raises:
        ValueError: no table, where sources have to be fetched first or other machines number genes too.
    """
    if arguments.gene_table is not None:
        return GeneVocabulary.from_table(os.path.expanduser(os.path.expandvars(arguments.gene_table)))
    if arguments.shard is not None or not all(source.is_local for source in sources):
        raise ValueError("A gene table is needed to build in shards or from a manifest: give --gene_table.")
    return vocabulary_of(read_slides([Path(source.url) for source in sources]), None)


def main(argv: list[str] | None = None) -> int:
    (arguments,) = HfArgumentParser(BuildArguments).parse_args_into_dataclasses(argv)
    output = Path(arguments.output)
    sources, evaluation_ids = local_sources(arguments.slides)
    sources += [] if arguments.manifest is None else read_manifest(arguments.manifest)
    if not sources:
        raise ValueError("No slides were given: name them with --slides or --manifest.")
    repeated = sorted({s.id for s in sources if [t.id for t in sources].count(s.id) > 1})
    if repeated:
        raise ValueError(f"Two sources are called {repeated[0]!r}: every slide needs its own name.")
    unknown = [n for n in arguments.exclude if n.partition("/")[0] not in {s.id for s in sources}]
    if unknown:
        raise ValueError(f"There is no slide or source {unknown[0]!r} to exclude: check the name.")
    chosen = [s for s in sources if s.role == "corpus" and s.id not in arguments.exclude]
    chosen = in_shard(chosen, arguments.shard)
    vocabulary = corpus_vocabulary(arguments, [s for s in sources if s.role == "corpus"])
    (output / "data").mkdir(parents=True, exist_ok=True)
    (output / BUILD_FOLDER).mkdir(exist_ok=True)
    guarded = evaluation_fingerprints(arguments, sources, vocabulary)
    if guarded:
        save_fingerprints(guarded, output / "evaluation.npz")
    plan = StagePlan(
        output=output,
        vocabulary=vocabulary,
        rules=QualityRules(arguments.min_counts, arguments.min_spots, arguments.min_genes),
        evaluation=tuple(guarded),
        evaluation_ids=tuple(dict.fromkeys([*evaluation_ids, *(s.id for s in sources if s.role == "evaluation")])),
        exclude_patients=tuple(arguments.exclude_patients),
        exclude=tuple(name for name in arguments.exclude if "/" in name),
    )
    warn_of_ids_alone(plan)
    cache = Path(arguments.cache_dir) if arguments.cache_dir else output / ".downloads"
    records, failures = stage_all(plan, fetch_sources(chosen, cache), arguments.num_proc)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    if arguments.shard is None:
        finish(plan, arguments, records, [s.id for s in chosen])
    return 1 if failures else 0


def warn_of_ids_alone(plan: StagePlan) -> None:
    """Tell which evaluation slides cannot be recognised by content."""
    by_content = {known.name for known in plan.evaluation}
    by_id_alone = [name for name in plan.evaluation_ids if name not in by_content]
    if by_id_alone:
        print(
            f"warning: {len(by_id_alone)} evaluation slides, e.g. {by_id_alone[0]}, are known by id alone: under "
            "another name they would not be recognised; give the slides, or their fingerprints, to --evaluation.",
            file=sys.stderr,
        )


def finish(
    plan: StagePlan, arguments: BuildArguments, records: list[dict[str, Any]], source_ids: Sequence[str]
) -> None:
    """Duplicates, the form for training, statistics and the report."""
    output = plan.output
    mark_duplicates(output, records, source_ids)
    kept = [record["id"] for record in records if outcome(record) == IN_CORPUS]
    files = [row_file(output, name) for name in kept]
    for stray in set((output / "data").iterdir()) - set(files):
        stray.unlink()  # a duplicate, a row that is not asked for any more, what a killed build left
    if not files:
        reasons = "; ".join(f"{r['id']}: {reason_of(r)}" for r in records[:3])
        raise ValueError(f"None of {len(records)} slides may enter the corpus ({reasons}).")
    assemble(output, files, plan.vocabulary, arguments.target_sum, arguments.rank, arguments.num_proc, arguments.seed)
    extra = {
        "name": arguments.name,
        "configs": CONFIGS,
        "content_sha256": content_hash(files),
        "target_sum": arguments.target_sum,
        "evaluation_slides": [f.name for f in plan.evaluation],
        "evaluation_ids": list(plan.evaluation_ids),
    }
    report = write_report(output, records, plan.rules, extra)
    print(report.card().split("---", 2)[-1].strip())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
