r"""Tables and figures from several `results.json`: domain detection, hidden regions, an ablation, in one report.

    python eval/report.py runs/domains/results.json runs/regions/results.json --output_dir runs/report

Writes `report.md`, tables and figures. Domain detection: means over sets, the paper's layout with a column a set, then
set by set; `slides.md` slide by slide, `report.csv`, bars, curves over smoothing, maps of domains. Hidden regions: the
paper's grid of sizes, `regions.csv`, curves over window size, maps of genes (truth, prediction, error). An ablation: a
table and `ablation.csv`; a curve for every factor of numbers, such as the window size.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_processing.writing import write_whole
from eval import aggregate, region_report
from eval.ablation_report import ablation_csv, ablation_table, plot_curves
from eval.domain_figures import MAPS_FILE, load_maps, plot_bars, plot_maps_of_slide, plot_smoothing
from eval.domain_report import csv_table, results_table, slides_table
from eval.region_report import GENE_MAPS_FILE, plot_gene_maps, plot_regions, region_csv, region_table

Record = Mapping[str, Any]


@dataclass
class Results:
    """The results of one kind, of all files together.

    Attributes:
        records: each cell once. metadata: of every file. folders: that they came from.
    """

    records: list[Record] = field(default_factory=list)
    metadata: list[Mapping[str, Any]] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)

    def check_settings(self, settings: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        """Raise ValueError where two files were made in different ways; what one of them does not tell is passed over.

        Args:
            settings: what decides the numbers, by name, from a file's metadata.
        """
        known: dict[str, tuple[Any, Path]] = {}
        for folder, metadata in zip(self.folders, self.metadata, strict=True):
            for name, value in settings(metadata).items():
                first, there = known.setdefault(name, (value, folder))
                if first != value:
                    raise ValueError(
                        f"The results of {folder} were made with another {name} than those of {there}: a mean of both "
                        "would be of neither, so make a report of each."
                    )

    def of_all(self, key: str) -> Any:
        """What all files tell under a key.

        Raises:
            ValueError: one tells another.
        """
        values = [metadata[key] for metadata in self.metadata]
        if any(value != values[0] for value in values):
            folders = ", ".join(map(str, self.folders))
            raise ValueError(f"The results of {folders} differ in {key} ({values}): give one of them.")
        return values[0]


@dataclass(frozen=True)
class Kind:
    """What one script of this folder leaves in its `results.json`.

    Attributes:
        script: that wrote it. place: keys that every record has, and that tell one cell from another. told: keys of the
            metadata that the report needs. alike: those of them that have to be the same in all files. settings: what
            else has to be, see `Results.check_settings`. write: makes its part of `report.md`, and files beside it.
    """

    script: str
    place: tuple[str, ...]
    told: tuple[str, ...]
    alike: tuple[str, ...]
    settings: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[Results, Path], str]


def write_report(paths: Sequence[Path], output: Path) -> str:
    """Tables and figures of several `results.json` together.

    Returns:
        The text of `report.md`.

    Raises:
        ValueError: a file that holds no results of a known kind, or two with different numbers for one cell, or made
            in different ways.
    """
    found = merged(paths)
    for name, results in found.items():
        for key in KINDS[name].alike:
            results.of_all(key)
        results.check_settings(KINDS[name].settings)
    output.mkdir(parents=True, exist_ok=True)
    text = "\n".join(KINDS[name].write(results, output) for name, results in found.items())
    write_whole(output / "report.md", text.encode())
    return text


def merged(paths: Sequence[Path]) -> dict[str, Results]:
    """The results of all files by kind, in the order of `KINDS`, each cell once."""
    found: dict[str, Results] = {}
    cells: dict[tuple, Record] = {}
    for path in paths:
        name, records, metadata = _read(path)
        results = found.setdefault(name, Results())
        for record in records:
            place = (name, *(record[key] for key in KINDS[name].place))
            if place not in cells:
                cells[place] = record
                results.records.append(record)
            elif cells[place] != record:
                raise ValueError(
                    f"{path} has other numbers than the files before it for {place[1:]}: give one of them."
                )
        results.metadata.append(metadata)
        results.folders.append(path.parent)
    if not found:
        raise ValueError("There are no results: give one results.json or several.")
    return {name: found[name] for name in KINDS if name in found}


def _read(path: Path) -> tuple[str, list[Record], Mapping[str, Any]]:
    """Kind, records and metadata of a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        records, metadata = content["records"], content["metadata"]
        for name, kind in KINDS.items():
            if records and all(key in record for record in records for key in kind.place):
                missing = [key for key in kind.told if key not in metadata]
                if missing:
                    raise KeyError(f"its metadata lack {', '.join(missing)}")
                if name == DOMAINS:
                    aggregate.check_records(records)
                return name, records, metadata
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold results of {_scripts()} ({error}).") from error
    raise ValueError(f"{path} does not hold results of {_scripts()}: its records have other keys, or there are none.")


def _scripts() -> str:
    return ", ".join(kind.script for kind in KINDS.values())


# ---------------------------------------------------------------- kinds


def _write_domains(results: Results, output: Path) -> str:
    metadata: dict[str, Any] = {"sets": {}, "smaller_than_a_window": {}}
    for told in results.metadata:
        for key in metadata:
            metadata[key] |= told.get(key, {})
    metadata["protocol"] = {}  # the same in all files that hold splits of theirs
    for told in results.metadata:
        metadata["protocol"] |= _domain_settings(told)
    write_whole(output / "slides.md", slides_table(results.records).encode())
    write_whole(output / "report.csv", csv_table(results.records).encode())
    plot_bars(results.records, output / "ari.png")
    plot_smoothing(results.records, output / "smoothing.png")
    for folder in results.folders:
        for name, maps in load_maps(folder / MAPS_FILE).items():
            plot_maps_of_slide(maps, output / f"maps_{name}.png")
    return results_table(results.records, metadata)


def _write_regions(results: Results, output: Path) -> str:
    units = results.of_all("units")
    skipped = list(dict.fromkeys(sentence for told in results.metadata for sentence in told["skipped"]))
    write_whole(output / "regions.csv", region_csv(results.records).encode())
    plot_regions(results.records, units, output / "regions.png")
    for number, folder in enumerate(results.folders):
        if (folder / GENE_MAPS_FILE).exists():
            maps = json.loads((folder / GENE_MAPS_FILE).read_text(encoding="utf-8"))
            plot_gene_maps(maps, output / f"genes_{number}.png")
    return "# Hidden regions\n\n" + region_table(results.records, units, skipped)


def _write_ablation(results: Results, output: Path) -> str:
    base_key = results.of_all("base_key")
    planned = [(record["factor"], record["variant"]) for record in results.records]
    write_whole(output / "ablation.csv", ablation_csv(results.records, base_key).encode())
    plot_curves(results.records, output)
    return "# Ablation\n\n" + ablation_table(results.records, planned, base_key)


def _domain_settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the splits and probes that a file holds, and which model stands behind a row's name."""
    protocol = metadata.get("protocol", {})
    needed = {
        "num_splits": ("spots", "blocks", "slides"),
        "train_share": ("spots", "blocks"),
        "tile_side": ("blocks",),
        "max_train_spots": ("slides",),
        "mlp_epochs": ("mlp",),
    }
    held = {*protocol.get("splits", ()), *protocol.get("probes", ())}
    settings = {name: protocol[name] for name, of in needed.items() if name in protocol and held & {*of}}
    return settings | {f"model called {name!r}": told for name, told in metadata.get("models", {}).items()}


def _region_settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked for and how it is read, and which model stands behind a row's name."""
    settings = metadata.get("settings", {})
    named = {f"model called {name!r}": weights for name, weights in settings.get("weights", {}).items()}
    names = ("repetitions", "num_genes", "model_window", "reading", "processor")
    return {name: settings[name] for name in names if name in settings} | named


DOMAINS = "domains"
KINDS = {
    DOMAINS: Kind("eval/run_domain_detection.py", aggregate.PLACE, (), (), _domain_settings, _write_domains),
    "regions": Kind(
        "eval/run_region_reconstruction.py",
        region_report.PLACE,
        ("units", "skipped"),
        ("units",),
        _region_settings,
        _write_regions,
    ),
    "ablation": Kind(
        "eval/run_ablation.py",
        ("factor", "variant"),
        ("base_key",),
        ("base_key",),
        lambda metadata: {},
        _write_ablation,
    ),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="results.json of the scripts of this folder.")
    parser.add_argument("--output_dir", required=True, type=Path, help="Folder for the report; made if missing.")
    arguments = parser.parse_args(argv)
    print(write_report(arguments.results, arguments.output_dir))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
