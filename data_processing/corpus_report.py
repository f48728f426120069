"""What a corpus holds and why: `report.json`, the dataset card `README.md`, and the figure `report.png`."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_processing.quality import Decisions, QualityRules
from data_processing.slide_fingerprint import SAME_GENES, SAME_SPOTS
from data_processing.writing import write_whole
from modeling_stimg.plotting import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
# `num_spots`: of the row, one a site, so `spots_kept` = `num_spots` + `spots_sharing_a_place`.
COUNTS = (
    *(field.name for field in fields(Decisions) if field.name != "refused"),
    "spots_sharing_a_place",
    "num_spots",
)
# Why a slide is not in the corpus, in the order in which it counts, and how the card calls it.
REASONS = {
    "excluded": "left out as asked",
    "refused": "refused by quality control",
    "leak": "kept out for evaluation",
    "duplicate": "there already",
}
IN_CORPUS = "in the corpus"
MAX_BARS = 24


@dataclass(frozen=True)
class CorpusReport:
    """A corpus, slide by slide.

    Attributes:
        records: one a slide, in the order of the manifest: `id`; the texts `source`, `organ`, `technology`, `patient`,
            `licence`, `citation`, `role`; the fields of `Decisions`, `spots_sharing_a_place` and `num_spots` (of its
            row); and in `excluded`, `refused`, `leak` and `duplicate` the reason why it is not in the corpus. What is
            missing is "" or 0; more keys are carried to `report.json`.
        rules: the thresholds of quality control.
        extra: for the card: `name`, `description` (Markdown), `licence` (an identifier of the Hub, "other" where it is
            not given), `tags`, `configs` (YAML text that starts with `configs:`), `thresholds` (name -> value, beside
            the rules and the shares from which on two slides are the same). All of it, and more keys, go to
            `report.json`.

    Raises:
        ValueError: a record without id, or two of one id.
    """

    records: Sequence[Record]
    rules: QualityRules
    extra: Mapping[str, Any]

    def __post_init__(self) -> None:
        nameless = [number for number, record in enumerate(self.records) if not record.get("id")]
        if nameless:
            raise ValueError(f"Record {nameless[0]} of the corpus report has no id: every slide needs one.")
        repeated = [name for name, times in Counter(record["id"] for record in self.records).items() if times > 1]
        if repeated:
            raise ValueError(f"Slide {repeated[0]!r} is in the corpus report twice: give every slide its own id.")
        configs = self.extra.get("configs", "")
        if configs and not configs.startswith("configs:"):
            raise ValueError(
                f"extra['configs'] starts with {configs[:20]!r}: expected YAML that starts with 'configs:'."
            )

    @cached_property
    def kept(self) -> list[Record]:
        """The slides of the corpus."""
        return [record for record in self.records if outcome(record) == IN_CORPUS]

    def totals(self) -> dict[str, Any]:
        """Sums: slides, spots and counts of the corpus; slides listed; every decision by what became of the slide."""
        by_outcome = {name: [r for r in self.records if outcome(r) == name] for name in (IN_CORPUS, *REASONS.values())}
        return {
            "slides": len(self.kept),
            "spots": _sum(self.kept, "num_spots"),
            "counts": _sum(self.kept, "counts_kept"),
            "patients": len({(r.get("source", ""), r["patient"]) for r in self.kept if r.get("patient")}),
            "slides_listed": len(self.records),
            "decisions": {
                name: {"slides": len(records)} | {count: _sum(records, count) for count in COUNTS}
                for name, records in by_outcome.items()
            },
        }

    def to_json(self) -> str:
        """The content of `report.json`: totals, rules, extra and every record as it came."""
        content = {
            "totals": self.totals(),
            "rules": asdict(self.rules),
            "extra": dict(self.extra),
            "records": [dict(record) for record in self.records],
        }
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False, default=_plain) + "\n"

    def card(self) -> str:
        """The content of `README.md`."""
        sections = [
            self._header(),
            f"# {self.extra.get('name') or 'Spatial transcriptomics corpus'}\n\n{self._summary()}",
            f"## Organs and technologies\n\nSpots, and in brackets slides.\n\n{self._organ_table()}",
            f"## Sources\n\n{self._source_table()}",
            f"## Decisions\n\n{self._decision_table()}",
            f"## Thresholds\n\n{self._threshold_table()}",
            f"## Slides left out\n\n{self._left_out()}",
            f"## Licences and citations\n\n{self._terms()}",
        ]
        return "\n\n".join(sections) + "\n"

    def figure(self) -> Figure:
        """Spots of the corpus by organ, one bar each, stacked by technology."""
        spots = _grouped(self.kept, "organ", "technology", lambda records: _sum(records, "num_spots"))
        organs = sorted(spots, key=lambda organ: -sum(spots[organ].values()))
        shown = {organ: spots[organ] for organ in organs[:MAX_BARS]}
        if len(organs) > MAX_BARS:
            rest = Counter()
            for organ in organs[MAX_BARS:]:
                rest.update(spots[organ])
            shown[f"{len(organs) - MAX_BARS} other organs"] = rest
        figure = new_figure(8, 1.4 + 0.3 * max(len(shown), 1))
        ax = figure.subplots()
        left = np.zeros(len(shown))
        for technology in sorted({technology for row in shown.values() for technology in row}):
            widths = np.array([row.get(technology, 0) for row in shown.values()], float)
            ax.barh(list(shown), widths, left=left, label=technology)
            left += widths
        ax.invert_yaxis()
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        ax.set(xlabel="spots", title=f"{len(self.kept):,} slides, {int(left.sum()):,} spots")
        ax.spines[["top", "right"]].set_visible(False)
        if shown:
            ax.legend(frameon=False, fontsize=8)
        return figure

    # ---------------------------------------------------------------- parts of the card

    def _header(self) -> str:
        """YAML for the Hub. JSON strings are YAML strings, whatever they hold."""
        lines = [f"license: {json.dumps(self.extra.get('licence') or 'other')}"]
        if self.extra.get("name"):
            lines.append(f"pretty_name: {json.dumps(self.extra['name'], ensure_ascii=False)}")
        tags = self.extra.get("tags") or ("biology", "spatial-transcriptomics")
        lines += ["tags:", *(f"- {json.dumps(tag, ensure_ascii=False)}" for tag in tags)]
        if self.extra.get("configs"):
            lines.append(self.extra["configs"].rstrip("\n"))
        return "\n".join(["---", *lines, "---"])

    def _summary(self) -> str:
        totals = self.totals()
        told = [self.extra["description"].strip()] if self.extra.get("description") else []
        told.append(
            f"{totals['slides']:,} slides of {totals['slides_listed']:,} listed, {totals['spots']:,} spots, "
            f"{totals['counts']:,} counts, {totals['patients']:,} known patients. Raw counts, human."
        )
        roles = _by(self.kept, "role")
        if len(roles) > 1:
            rows = [(role, f"{len(rs):,}", f"{_sum(rs, 'num_spots'):,}") for role, rs in roles.items()]
            told.append(_table(("role", "slides", "spots"), rows))
        told.append("![Spots by organ and technology](report.png)\n\n`report.json` tells all of this slide by slide.")
        return "\n\n".join(told)

    def _organ_table(self) -> str:
        def cell(records: Sequence[Record]) -> str:
            return f"{_sum(records, 'num_spots'):,} ({len(records):,})"

        cells = _grouped(self.kept, "organ", "technology", cell)
        technologies = sorted(_by(self.kept, "technology"))
        rows = [
            [organ, *(cells[organ].get(t, "") for t in technologies), cell(records)]
            for organ, records in sorted(_by(self.kept, "organ").items())
        ]
        rows.append(["all", *(cell(_by(self.kept, "technology")[t]) for t in technologies), cell(self.kept)])
        return _table(["organ", *technologies, "all"], rows)

    def _source_table(self) -> str:
        rows = []
        for source, listed in _by(self.records, "source").items():
            kept = [record for record in listed if outcome(record) == IN_CORPUS]
            patients = len({record["patient"] for record in kept if record.get("patient")})
            rows.append((source, len(listed), len(kept), f"{_sum(kept, 'num_spots'):,}", patients))
        return _table(("source", "slides listed", "slides", "spots", "known patients"), rows)

    def _decision_table(self) -> str:
        decisions = self.totals()["decisions"]
        names = ("slides", *COUNTS)
        rows = [(name.replace("_", " "), *(f"{decisions[o][name]:,}" for o in decisions)) for name in names]
        note = "Sums over slides. A slide refused early has no further decisions than its spots and genes in."
        return f"{note}\n\n{_table(('', *decisions), rows)}"

    def _threshold_table(self) -> str:
        same = {"share of genes of the same slide": SAME_GENES, "share of spots of the same slide": SAME_SPOTS}
        values = asdict(self.rules) | same | dict(self.extra.get("thresholds") or {})
        return _table(("threshold", "value"), [(name.replace("_", " "), value) for name, value in values.items()])

    def _left_out(self) -> str:
        rows = [
            (record["id"], record.get("source", ""), outcome(record), reason_of(record))
            for record in self.records
            if outcome(record) != IN_CORPUS
        ]
        return _table(("slide", "source", "what became of it", "reason"), rows) if rows else "None."

    def _terms(self) -> str:
        groups: dict[tuple[str, str, str], int] = defaultdict(int)
        for record in self.kept:
            groups[tuple(_text(record, key) for key in ("source", "licence", "citation"))] += 1
        note = "The terms are those of the original studies: cite them wherever this corpus went into a model."
        rows = [(*group, number) for group, number in groups.items()]
        return f"{note}\n\n{_table(('source', 'licence', 'citation', 'slides'), rows)}"


def outcome(record: Record) -> str:
    """What became of a slide: `IN_CORPUS`, or one of the values of `REASONS`."""
    return next((name for key, name in REASONS.items() if record.get(key)), IN_CORPUS)


def write_report(
    folder: str | os.PathLike[str], records: Sequence[Record], rules: QualityRules, extra: Mapping[str, Any]
) -> CorpusReport:
    """Write `report.json`, `README.md` and `report.png` into `folder`, made if it is missing.

    Each file appears whole or not at all, and none of them where one cannot be made.

    Raises:
        ValueError: see `CorpusReport`; or a number that is not finite. TypeError: a value that JSON cannot hold.
        ImportError: no Matplotlib.
    """
    report = CorpusReport(records, rules, extra)
    content, card, figure = report.to_json(), report.card(), report.figure()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_figure(figure, folder / "report.png")
    write_whole(folder / "report.json", content.encode())
    write_whole(folder / "README.md", card.encode())
    return report


def reason_of(record: Record) -> str:
    """Why a slide is not in the corpus, "" where it is."""
    return next((str(record[key]) for key in REASONS if record.get(key)), "")


def _sum(records: Iterable[Record], count: str) -> int:
    return sum(int(record.get(count) or 0) for record in records)


def _text(record: Record, key: str) -> str:
    return str(record.get(key) or "not stated")


def _by(records: Iterable[Record], key: str) -> dict[str, list[Record]]:
    """Records by what they say of `key`, in order of appearance."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[_text(record, key)].append(record)
    return groups


def _grouped(
    records: Iterable[Record], outer: str, inner: str, value: Callable[[list[Record]], Any]
) -> dict[str, dict[str, Any]]:
    return {
        name: {second: value(group) for second, group in _by(members, inner).items()}
        for name, members in _by(records, outer).items()
    }


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; whatever a cell holds stays in its cell."""
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: Any) -> str:
    text = " ".join(str(value).split())
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _plain(value: Any) -> Any:
    """NumPy numbers and arrays for JSON."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} {value!r} cannot be written to report.json: pass plain values.")
