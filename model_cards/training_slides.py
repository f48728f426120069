"""The slides that a model was trained on, with whom to cite, as far as the manifest of public slides knows them."""

from collections import defaultdict
from collections.abc import Sequence

from data_processing.corpus import SlideRecord
from data_processing.sources import Source, read_manifest
from eval.evaluation_sets import COLLECTION_NAMES
from eval.results import markdown_table
from model_cards.card_facts import ModelFolder
from train.model_card import listed

UNKNOWN = Source("unknown", source="not in the manifest", licence="not stated", citation="not stated")


def describe_training_slides(folder: ModelFolder) -> str:
    """A table by source, the names, and what the model inherits from one that it went on from."""
    rows = []
    for source, records in by_source(folder.slides).items():
        patients = {record.patient for record in records if record.patient}
        rows.append(
            [
                source.source or source.id,
                str(len(records)),
                f"{sum(record.num_spots for record in records):,}",
                str(len(patients)) if patients else "not told",
                source.citation or "not stated",
                source.licence or "not stated",
            ]
        )
    lines = [
        "## Training slides",
        "",
        f"{listed(folder.slides)}.",
        "",
        *markdown_table(["source", "slides", "spots", "known patients", "citation", "licence"], rows),
        "",
        "The terms are those of the original studies: cite them where you use this model.",
    ]
    held_out = [SlideRecord(**record) for record in folder.pretraining.get("validation_slides", ())]
    if held_out:
        lines += ["", f"Held out while it was trained, for the loss alone: {listed(held_out)}."]
    parent = folder.pretraining.get("parent")
    if parent:
        seen = "which does not say what it saw" if parent["slides"] is None else "whose slides are counted above"
        lines += ["", f"Training went on from `{parent['name']}`, {seen}."]
    return "\n".join(lines) + "\n"


def by_source(records: Sequence[SlideRecord]) -> dict[Source, list[SlideRecord]]:
    """Slides by the row of the manifest that they are of, those of one archive and citation together."""
    manifest = read_manifest()
    groups: dict[tuple[str, str, str], list[SlideRecord]] = defaultdict(list)
    first: dict[tuple[str, str, str], Source] = {}
    for record in records:
        source = next((source for source in manifest if _is_of(record.name, source)), UNKNOWN)
        key = source.source, source.citation, source.licence
        groups[key].append(record)
        first.setdefault(key, source)
    return {first[key]: group for key, group in groups.items()}


def _is_of(slide: str, source: Source) -> bool:
    """Whether a slide is a row's, by its ids, also with a suffix like `_g5000`, or of the collection that it is."""
    if source.contents == "collection":
        prefix = COLLECTION_NAMES.get(source.evaluation_set)
        if prefix and slide.startswith(prefix):
            return True
    return any(slide == name or slide.startswith((f"{name}_", f"{name}-", f"{name}/")) for name in source.names)
