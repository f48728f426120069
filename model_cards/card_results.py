"""What a model card tells of measurements beyond the tables of domain detection."""

from collections.abc import Sequence

from eval.aggregate import Record, distinct, matching, set_mean, smoothing_name
from eval.domain_report import PROBE_TITLES
from eval.region_report import region_summary
from eval.results import markdown_table
from model_cards.card_facts import ModelFolder

MISSING = "–"  # noqa: RUF001 - a dash for "no such measurement"


def where_simple_wins(folder: ModelFolder) -> list[str]:
    """The model's best row beside the best without training, by split and probe: ARI, mean over sets."""
    rows, won = [], 0
    for split, probe in dict.fromkeys((r["split"], r["probe"]) for r in folder.of_model):
        ours, name = _best(matching(folder.of_model, split=split, probe=probe))
        simple, simple_name = _best(matching(folder.simple, split=split, probe=probe))
        if simple is not None and simple >= ours:
            won += 1
        cells = [f"{ours:.3f}", name, MISSING if simple is None else f"{simple:.3f}", simple_name]
        rows.append([split, PROBE_TITLES.get(probe, probe), *cells])
    counted = f"A feature without training is as good or better in {won} of {len(rows)} rows." if won else ""
    header = ["split", "probe", "model", "its row", "without training", "its row"]
    return [
        "Adjusted Rand index, mean over sets: the model's best row beside the best of features without training, "
        f"each with the neighbourhood mean that suits it best. {counted}".rstrip(),
        "",
        *markdown_table(header, rows),
    ]


def _best(records: Sequence[Record]) -> tuple[float | None, str]:
    """Best mean index of any row and neighbourhood mean among the records, and which."""
    best, name = None, MISSING
    for features, radius in dict.fromkeys((r["features"], r["smoothing"]) for r in records):
        mean = set_mean(matching(records, features=features, smoothing=radius), "ari")
        if mean is not None and (best is None or mean.value > best):
            best = mean.value
            name = features if radius == 0 else f"{features}, {smoothing_name(radius)} mean"
    return best, name


def region_lines(folder: ModelFolder) -> list[str]:
    """Reconstruction of hidden regions, by predictor."""
    records, metadata = folder.regions
    slides = ", ".join(distinct(records, "slide"))
    return [
        "## Reconstruction of hidden regions",
        "",
        f"{metadata.get('units', 'log1p values')}; lower MSE and MAE and higher Pearson are better. Means over sizes "
        f"of the region first, then over slides: {slides}.",
        "",
        *region_summary(records),
    ]


def throughput_lines(folder: ModelFolder) -> list[str]:
    """Speed or memory, as it was measured: a column a number."""
    records, _ = folder.throughput
    keys = [key for key in dict.fromkeys(key for record in records for key in record) if _shown(records, key)]
    rows = [[_cell(record.get(key)) for key in keys] for record in records]
    return ["## Speed and memory", "", *markdown_table([key.replace("_", " ") for key in keys], rows)]


def _shown(records: Sequence[Record], key: str) -> bool:
    return all(isinstance(record.get(key), str | int | float | type(None)) for record in records)


def _cell(value: object) -> str:
    if value is None:
        return MISSING
    return f"{value:.4g}" if isinstance(value, float) else str(value)
