"""Slides on this machine as sources: what a folder holds, and what its `slides.tsv` tells of them."""

import csv
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from data_processing.corpus import find_slides, slide_name
from data_processing.sources import ROLES, Source

SLIDE_TABLE = "slides.tsv"
# What a table of slides may call the roles of a manifest.
_ROLES = {"": "corpus", "unlabelled": "corpus", "labelled": "evaluation"} | {role: role for role in ROLES}
_LAID_OUT = {"id", "url", "layout", "checksum", "labels", "evaluation_set", "contents", "verified"}


def local_sources(patterns: Sequence[str]) -> tuple[list[Source], list[Source]]:
    """Slides in folders, files or globs as sources; what a `slides.tsv` tells of them goes with them.

    Returns:
        The sources in their order, each once; and, without an address, the evaluation slides that such tables list but
        that are not here.

    Raises:
        FileNotFoundError: a pattern that matches nothing. ValueError: a `slides.tsv` with an unknown role.
    """
    found: dict[Path, Source] = {}
    listed: dict[str, Source] = {}
    for pattern in patterns:
        for path in find_slides([pattern]):
            inside = _slides_in(path) if path.is_dir() else []
            known = _slide_table(path if inside else path.parent)
            for slide in inside or [path]:
                name = slide_name(slide)
                identity = source_id(name)
                told = known.get(name) or known.get(identity) or Source(identity)
                found[slide.resolve()] = replace(told, id=identity, url=str(slide.resolve()))
            listed |= {source.id: source for source in known.values() if source.role == "evaluation"}
    sources = list(found.values())
    here = {source.id for source in sources}
    return sources, [source for name, source in listed.items() if name not in here]


def source_id(name: str) -> str:
    """A slide's name as an id: a safe file name, in which anything else is an underscore."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip("._-")[:100] or "slide"


def _slides_in(folder: Path) -> list[Path]:
    """The slides of a folder: .h5ad files and Space Ranger folders. Hidden ones, which macOS leaves, are none."""
    inside = [p for p in folder.iterdir() if not p.name.startswith(".")]
    files = sorted(p for p in inside if p.suffix.lower() == ".h5ad")
    return files + sorted(p for p in inside if (p / "spatial").is_dir() or (p / "outs" / "spatial").is_dir())


def _slide_table(folder: Path) -> dict[str, Source]:
    """What `slides.tsv` in a folder or beside it tells, by name; empty where there is none."""
    table = next((p for p in (folder / SLIDE_TABLE, folder.parent / SLIDE_TABLE) if p.is_file()), None)
    if table is None:
        return {}
    columns = {f.name for f in fields(Source)} - _LAID_OUT
    told = {}
    with table.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            role = _ROLES.get((row.get("role") or "").strip().casefold())
            name = (row.get("name") or "").strip()
            if not name or role is None:
                raise ValueError(
                    f"{table} has a row of name {row.get('name')!r} and role {row.get('role')!r}: expected a name, and "
                    f"one of the roles {', '.join(filter(None, _ROLES))}, or none."
                )
            row.setdefault("technology", row.get("platform", ""))
            row.setdefault("source", row.get("source_repository", ""))
            texts = {k: (v or "").strip() for k, v in row.items() if k in columns}
            told[name] = Source(**{**texts, "id": source_id(name), "role": role})
    return told
