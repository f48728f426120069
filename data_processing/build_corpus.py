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

import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anndata import AnnData
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from data_processing.assembling import assemble, content_hash
from data_processing.corpus_report import IN_CORPUS, outcome, reason_of, write_report
from data_processing.fetching import fetch_sources
from data_processing.fingerprints import find_duplicates, save_fingerprints
from data_processing.guarding import evaluation_fingerprints, told_by_content
from data_processing.layouts import open_source
from data_processing.local_slides import local_sources
from data_processing.quality import QualityRules
from data_processing.sources import Source, read_manifest
from data_processing.staging import (
    BUILD_FOLDER,
    UNAVAILABLE,
    StagePlan,
    place_rows,
    sentence,
    source_record,
    stage_source,
    staged,
    staged_fingerprints,
    unavailable_record,
)
from modeling_stimg import GeneVocabulary

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
    evaluation_by_id: bool = field(
        default=False,
        metadata={"help": "Go on although evaluation slides cannot be fetched or read: their names guard alone."},
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
    vector_smoothing: int = field(
        default=0,
        metadata={"help": "Radius in sites of the means that gene vectors are computed of; 0 = of single spots."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the gene vectors."})
    name: str = field(default="Spatial transcriptomics corpus", metadata={"help": "Title of the card."})


def chosen_sources(arguments: BuildArguments) -> tuple[list[Source], list[Source], list[Source]]:
    """The sources to build, those left out by their name, and the evaluation slides, also without an address.

    Raises:
        ValueError: nothing given, two sources of one name, or an excluded name that there is not.
        FileNotFoundError: slides or a manifest that are not there.
    """
    local, listed = local_sources(arguments.slides)
    sources = local + ([] if arguments.manifest is None else read_manifest(arguments.manifest))
    if not sources:
        raise ValueError("No slides were given: name them with --slides or --manifest.")
    by_id: dict[str, Source] = {}
    for source in sources:
        other = by_id.setdefault(source.id.casefold(), source)
        if other is not source:
            places = " and ".join(each.url for each in (other, source) if each.is_local)
            where = f" ({places})" if places else ""
            raise ValueError(f"Two sources are called {source.id!r}{where}: every slide needs its own name.")
    unknown = [n for n in arguments.exclude if n.partition("/")[0] not in {s.id for s in sources}]
    if unknown:
        raise ValueError(f"There is no slide or source {unknown[0]!r} to exclude: check the name.")
    evaluation = [s for s in sources if s.role == "evaluation"] + [s for s in listed if s.id.casefold() not in by_id]
    chosen = [s for s in sources if s.role == "corpus" and s.id not in arguments.exclude]
    return chosen, [s for s in sources if s.role == "corpus" and s.id in arguments.exclude], evaluation


def stage_all(
    plan: StagePlan, sources: Sequence[Source], cache_dir: Path, num_proc: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Records of all slides in the order of the sources, and a sentence for every source or slide that failed.

    What is finished already is neither fetched nor read.
    """
    records: dict[str, list[dict[str, Any]]] = {}
    local = {f.source.id: f.path for f in fetch_sources([s for s in sources if s.is_local], cache_dir, progress=False)}
    for source in tqdm(sources, desc="look for what is done", disable=not (plan.output / BUILD_FOLDER).exists()):
        if not source.is_local or local[source.id] is not None:
            done = staged(plan, source, local.get(source.id))
            records |= {} if done is None else {source.id: done}
    todo = []
    for item in fetch_sources([source for source in sources if source.id not in records], cache_dir):
        if item.path is None:
            reason = item.error.removeprefix(f"{item.source.id}: ")
            records[item.source.id] = [unavailable_record(item.source, "fetched", reason)]
        else:
            todo.append(item)
    with tqdm(total=len(sources), initial=len(records), desc="slides") as bar:
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
    ordered = [record for source in sources for record in records[source.id]]
    return ordered, [f"{r['id']}: {r['refused']}" for r in ordered if r.get("refused", "").startswith(UNAVAILABLE)]


def mark_duplicates(output: Path, records: list[dict[str, Any]], source_ids: Sequence[str]) -> None:
    """Of slides with the same content the first stays; the others are told."""
    kept = {record["id"] for record in records if outcome(record) == IN_CORPUS}
    prints = [f for name in source_ids for f in staged_fingerprints(output, name) if f.name in kept]
    by_name = {record["id"]: record for record in records}
    for first, second, found in find_duplicates(prints):
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


def corpus_vocabulary(arguments: BuildArguments, sources: Sequence[Source], work_dir: Path) -> GeneVocabulary:
    """The gene table's genes, or those of all local slides that can be read.

    Raises:
        ValueError: no table, where sources have to be fetched first or other machines number genes too.
    """
    if arguments.gene_table is not None:
        return GeneVocabulary.from_table(os.path.expanduser(os.path.expandvars(arguments.gene_table)))
    if arguments.shard is not None or not all(source.is_local for source in sources):
        raise ValueError("A gene table is needed to build in shards or from a manifest: give --gene_table.")
    return GeneVocabulary.from_slides(_readable_slides(sources, work_dir))


def _readable_slides(sources: Sequence[Source], work_dir: Path) -> Iterator[AnnData]:
    """The slides of local sources, one at a time. What cannot be read is told when it is to be built."""
    for fetched in tqdm(fetch_sources(sources, work_dir, progress=False), desc="collect genes"):
        try:
            if fetched.path is None:
                raise ValueError(fetched.error)
            for read in open_source(fetched.path, fetched.source, work_dir).values():
                yield read()
        except (ValueError, OSError, ImportError) as error:
            tqdm.write(f"its genes do not count: {sentence(error)}", file=sys.stderr)
        finally:
            shutil.rmtree(work_dir, ignore_errors=True)


@contextmanager
def sole_build(output: Path, shard: str | None) -> Iterator[None]:
    """Let no second build work in the folder; shards are different builds.

    Raises:
        ValueError: there is one.
    """
    (output / "data").mkdir(parents=True, exist_ok=True)
    (output / BUILD_FOLDER).mkdir(exist_ok=True)
    name = "build" if shard is None else f"shard-{shard.replace('/', '-of-')}"
    try:
        with FileLock(output / BUILD_FOLDER / f"{name}.lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(f"Another build works in {output}: wait for it, or give another --output.") from error


def main(argv: list[str] | None = None) -> int:
    (arguments,) = HfArgumentParser(BuildArguments).parse_args_into_dataclasses(argv)
    chosen, excluded, evaluation = chosen_sources(arguments)
    part = in_shard(chosen, arguments.shard)
    rules = QualityRules(arguments.min_counts, arguments.min_spots, arguments.min_genes)
    with sole_build(Path(arguments.output), arguments.shard):
        return build(arguments, rules, chosen, part, excluded, evaluation)


def build(
    arguments: BuildArguments,
    rules: QualityRules,
    chosen: Sequence[Source],
    part: Sequence[Source],
    excluded: Sequence[Source],
    evaluation: Sequence[Source],
) -> int:
    """Everything after the arguments were understood; the exit status. `part`: of `chosen`, what this build reads."""
    output = Path(arguments.output)
    cache = Path(arguments.cache_dir) if arguments.cache_dir else output / ".downloads"
    if arguments.shard is None:
        shutil.rmtree(output / BUILD_FOLDER / "work", ignore_errors=True)  # of a build that was killed
    vocabulary = corpus_vocabulary(arguments, chosen, output / BUILD_FOLDER / "work")
    guarded = evaluation_fingerprints(
        arguments.evaluation, evaluation, vocabulary, output, cache, arguments.evaluation_by_id
    )
    if guarded:
        save_fingerprints(guarded, output / "evaluation.npz")
    plan = StagePlan(
        output=output,
        vocabulary=vocabulary,
        rules=rules,
        evaluation=tuple(guarded),
        evaluation_ids=tuple(dict.fromkeys(name for source in evaluation for name in source.names)),
        exclude_patients=tuple(arguments.exclude_patients),
        exclude=tuple(name for name in arguments.exclude if "/" in name),
    )
    by_id_alone = [source.id for source in evaluation if not told_by_content(source, guarded)]
    if by_id_alone:
        print(
            f"warning: {len(by_id_alone)} evaluation slides, e.g. {by_id_alone[0]}, are known by id alone: under "
            "another name they would not be recognised; give the slides, or their fingerprints, to --evaluation.",
            file=sys.stderr,
        )
    records, failures = stage_all(plan, part, cache, arguments.num_proc)
    if arguments.shard is None:
        left_out = [source_record(source, excluded="by its name.") for source in excluded]
        left_out += [source_record(source, leak="an evaluation slide by its role.") for source in evaluation]
        finish(plan, arguments, records, left_out, [s.id for s in part], by_id_alone)
    if failures:
        print(f"{len(failures)} of {len(records)} slides or sources failed:", file=sys.stderr)
        for failure in failures:
            print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def finish(
    plan: StagePlan,
    arguments: BuildArguments,
    records: list[dict[str, Any]],
    left_out: list[dict[str, Any]],
    source_ids: Sequence[str],
    by_id_alone: Sequence[str],
) -> None:
    """Duplicates, the form for training, statistics and the report; `left_out`: records of what was not looked at."""
    output = plan.output
    mark_duplicates(output, records, source_ids)
    kept = [record["id"] for record in records if outcome(record) == IN_CORPUS]
    files = place_rows(output, kept, [record["id"] for record in records if record.get("duplicate")])
    if not files:
        reasons = "; ".join(f"{r['id']}: {reason_of(r)}" for r in records[:3])
        raise ValueError(f"None of {len(records)} slides may enter the corpus ({reasons}).")
    assemble(
        output,
        files,
        plan.vocabulary,
        arguments.target_sum,
        arguments.rank,
        arguments.num_proc,
        arguments.seed,
        vector_smoothing=arguments.vector_smoothing,
    )
    extra = {
        "name": arguments.name,
        "configs": CONFIGS,
        "content_sha256": content_hash(files),
        "target_sum": arguments.target_sum,
        "evaluation_slides": sorted({f.name for f in plan.evaluation}),
        "evaluation_ids": list(plan.evaluation_ids),
        "evaluation_by_id_alone": list(by_id_alone),
    }
    report = write_report(output, [*records, *left_out], plan.rules, extra)
    print(report.card().split("---", 2)[-1].strip())


def command_line(argv: list[str] | None = None) -> int:
    """`main`, with one sentence in place of a traceback."""
    try:
        return main(argv)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(command_line())
