"""What must not enter a corpus: fingerprints of the evaluation slides, made once, and their names."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from data_processing.corpus import find_slides, slide_name
from data_processing.fetching import fetch_sources
from data_processing.fingerprints import load_fingerprints, save_fingerprints
from data_processing.layouts import open_source
from data_processing.local_slides import source_id
from data_processing.slide_fingerprint import Fingerprint, fingerprint
from data_processing.sources import Source
from data_processing.staging import BUILD_FOLDER, fingerprint_digest, sentence, source_content
from data_processing.writing import write_whole
from modeling_stimg import GeneVocabulary

EVALUATION_FOLDER = "evaluation"


def evaluation_fingerprints(
    given: Sequence[str],
    sources: Sequence[Source],
    vocabulary: GeneVocabulary,
    output: Path,
    cache_dir: Path,
    by_id: bool = False,
) -> list[Fingerprint]:
    """Of every slide that must not enter, as far as its content is to be had.

    Args:
        given: slides (files, folders, globs), or `.npz` files of fingerprints. A source whose fingerprint is among the
            latter is not fetched.
        sources: the evaluation slides; those without an address are left to their names.
        output: folder of the corpus, where what was made is kept for the next run. cache_dir: where downloads go.
        by_id: go on although a source cannot be fetched or read.

    Raises:
        ValueError: a source with an address that cannot be fetched or read: copies of it would go unrecognised.
    """
    known: dict[str, Fingerprint] = {}
    local = []
    for pattern in given:
        if pattern.endswith(".npz"):
            known |= {fingerprint_digest(each): each for each in load_fingerprints(pattern)}
        else:
            local += [Source(source_id(slide_name(p)), url=str(p.resolve())) for p in find_slides([pattern])]
    told = list(known.values())
    wanted = [*local, *(s for s in sources if s.addresses and not told_by_content(s, told))]
    failures = []
    for fetched in fetch_sources(wanted, cache_dir):
        try:
            if fetched.path is None:
                raise ValueError(fetched.error)
            found = _fingerprints_of(fetched.source, fetched.path, vocabulary, output)
            known |= {fingerprint_digest(each): each for each in found}
        except (ValueError, OSError, ImportError) as error:
            failures.append(f"{fetched.source.id}: {sentence(error).removeprefix(f'{fetched.source.id}: ')}")
    if failures and not by_id:
        raise ValueError(
            f"{len(failures)} evaluation slides could not be fetched or read ({'; '.join(failures[:3])}): without "
            "their content, copies of them would enter the corpus under another name. Try again, give the slides or "
            "their fingerprints to --evaluation, or go on with their names alone by --evaluation_by_id true."
        )
    for failure in failures:
        print(f"warning: evaluation slide {failure}", file=sys.stderr)
    return list(known.values())


def told_by_content(source: Source, known: Sequence[Fingerprint]) -> bool:
    """Whether there is a fingerprint of a source, or of a slide of its collection."""
    return any(each.name == source.id or each.name.startswith(f"{source.id}/") for each in known)


def _fingerprints_of(source: Source, path: Path, vocabulary: GeneVocabulary, output: Path) -> list[Fingerprint]:
    """Of the slides of one source; read only if that was not done before."""
    folder = output / BUILD_FOLDER / EVALUATION_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    done, prints_file, work_dir = (folder / f"{source.id}{end}" for end in (".json", ".npz", ".work"))
    key = {"genes": vocabulary.sha256, **source_content(source, path)}
    if done.exists() and json.loads(done.read_text(encoding="utf-8")) == key:
        return load_fingerprints(prints_file)
    done.unlink(missing_ok=True)
    try:
        slides = open_source(path, source, work_dir)
        # Without the donor: to leave out the donors of evaluation slides, too, is asked for by --exclude_patients.
        found = [
            fingerprint(read(), vocabulary, name)
            for name, read in tqdm(slides.items(), desc=f"fingerprint {source.id}", disable=len(slides) < 3)
        ]
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)
    save_fingerprints(found, prints_file)
    write_whole(done, (json.dumps(key, indent=1) + "\n").encode("utf-8"))
    return found
