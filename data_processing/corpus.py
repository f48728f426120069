"""A collection of slides, read and matched once: what pretraining starts from."""

import glob
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anndata import AnnData
from tqdm.auto import tqdm

from modeling_stimg import GeneVocabulary, SlideImage, STPatchProcessor, read_slide

_SUFFIXES = re.compile(r"(?:\.(?:h5ad|h5|zarr|tsv|csv|txt|counts|gz))+$", re.IGNORECASE)
PRETRAINING_FILE = "pretraining.json"


@dataclass(frozen=True)
class SlideRecord:
    """What is told about a slide that a model saw. `patient` is empty where the slide does not say."""

    name: str
    patient: str
    num_spots: int


def find_slides(patterns: Sequence[str], exclude: Sequence[str] = ()) -> list[Path]:
    """Paths of slides, sorted by name.

    Args:
        patterns: files, folders that `read_slide` knows, or globs; `$VARIABLES` and `~` are expanded.
        exclude: slide names (file names without suffix) to leave out.

    Raises:
        FileNotFoundError: a pattern that matches nothing.
        ValueError: an excluded slide that is not there, or two slides of one name.
    """
    paths: set[Path] = set()
    for pattern in patterns:
        expanded = os.path.expanduser(os.path.expandvars(pattern))
        found = glob.glob(expanded)
        if not found:
            hint = " (is the variable set?)" if "$" in expanded else ""
            raise FileNotFoundError(f"No slide matches {pattern!r}{hint}: give files, folders or globs of slides.")
        paths.update(map(Path, found))
    names = [slide_name(p) for p in paths]
    missing = sorted(set(exclude) - set(names))
    if missing:
        raise ValueError(f"Excluded slides {missing} are not among the {len(names)} slides found: check the names.")
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise ValueError(f"Several slides are called {repeated[0]!r}: every slide needs its own file name.")
    return sorted((p for p in paths if slide_name(p) not in set(exclude)), key=slide_name)


def slide_name(path: Path) -> str:
    """The file name without the suffixes that tell its kind; of a folder called outs, the folder's it lies in."""
    name = path.parent.name if path.name == "outs" else path.name
    return _SUFFIXES.sub("", name) or name


def slide_patient(adata: AnnData) -> str:
    """The donor that the slide names in `uns["meta"]["patient"]` or in a one-valued `obs["donor_id"]`, else empty."""
    meta = adata.uns.get("meta")
    if isinstance(meta, dict) and "patient" in meta:
        patient = meta["patient"]
        return "" if patient is None or patient != patient else str(patient)  # NaN is the name of nobody
    if "donor_id" in adata.obs and adata.obs["donor_id"].nunique() == 1:
        return str(adata.obs["donor_id"].dropna().iloc[0])
    return ""


def read_slides(paths: Sequence[Path], progress: bool = True) -> dict[str, AnnData]:
    """Slides by name, in the order of `paths`."""
    return {slide_name(p): read_slide(p) for p in tqdm(paths, desc="read slides", disable=not progress)}


def slide_images(slides: dict[str, AnnData], processor: STPatchProcessor, tell: bool = False) -> list[SlideImage]:
    """Every slide on its grid; spots that share an array position share a site. `tell`: and how many genes matched."""
    images = [processor.slide_to_image(adata, on_duplicate="first", name=name) for name, adata in slides.items()]
    if tell:
        for image in images:
            tqdm.write(f"{image.name}: {image.gene_match}", file=sys.stderr)
    return images


def vocabulary_of(slides: dict[str, AnnData], table: str | None) -> GeneVocabulary:
    """The union of the slides' genes; `table` is a gene table (`$VARIABLES` are expanded)."""
    path = None if table is None else os.path.expanduser(os.path.expandvars(table))
    return GeneVocabulary.from_slides(slides.values(), table=path)


def slide_records(slides: dict[str, AnnData]) -> list[SlideRecord]:
    """What to tell of slides in memory."""
    return [SlideRecord(name, slide_patient(adata), adata.n_obs) for name, adata in slides.items()]


def save_pretraining(
    folder: Path, records: Sequence[SlideRecord], arguments: dict[str, Any], further: dict[str, Any] | None = None
) -> None:
    """Write which slides a model saw, and how it was trained, to `pretraining.json` beside its weights.

    Args:
        records: every slide that it saw. further: entries to tell beside `slides` and `arguments`.
    """
    temporary = folder / f"{PRETRAINING_FILE}.tmp"
    content = {"slides": [asdict(record) for record in records], **(further or {}), "arguments": arguments}
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / PRETRAINING_FILE)


def load_pretraining(folder: Path) -> tuple[list[SlideRecord], dict[str, Any]] | None:
    """The slides that the model in `folder` saw, and the arguments of its training; None where it does not say."""
    path = folder / PRETRAINING_FILE
    if not path.exists():
        return None
    return read_pretraining(path)


def read_pretraining(path: Path) -> tuple[list[SlideRecord], dict[str, Any]]:
    """The same of the file itself."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return [SlideRecord(**record) for record in content["slides"]], content["arguments"]
