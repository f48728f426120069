r"""Ablations: train and embed variants of one model that differ in one thing each, and probe them on labelled slides.

    python eval/run_ablation.py --sets dlpfc her2 heart --output_dir runs/ablation \
        --training '{"corpus": "runs/corpus", "max_spots": 100000}' --dry_run
    python eval/run_ablation.py --sets her2 --only her2st_A1 her2st_B1 her2st_C1 --output_dir runs/recipe \
        --grid eval/configs/recipe.yaml --factors "smoothing" "stride"

What is varied stands in a YAML file (`eval/configs/ablation.yaml`; `eval/ablation.py` tells its form). Rows are scored
on the sets, with the splits and by the code of `eval/run_domain_detection.py`; raw expression after the means over 1, 3
x 3, 5 x 5 and 7 x 7 sites is scored beside them. Every row is written to `results.json`, `table.md` and `table.csv` as
soon as it is there. The same command again goes on where it was stopped, in the middle of a training or of a row's
scores too; rows whose settings or slides have changed are computed anew, and trained variants lie in `models/`, each
under a name that follows from its settings. With `--dry_run` nothing is computed: it lists the rows and what they cost,
in windows. Factors of numbers get a figure each.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from data_processing.sources import EVALUATION_SETS
from data_processing.writing import write_whole
from eval.ablation import (
    BASELINES,
    Reference,
    Row,
    Run,
    evaluate_reference,
    evaluate_run,
    read_grid,
    references,
    runs_of,
    windows_to_read,
    without_paths,
)
from eval.ablation_report import ablation_csv, ablation_table, plot_curves
from eval.baselines.variants import content_sha256, train_variant
from eval.domain_scores import SPLITS, Plan, Protocol, plan_set
from eval.evaluation_sets import UNLABELLED, EvaluationSlide, Places, load_sets, paths_of_sets
from eval.probes import PROBES
from eval.results import markdown_table, run_metadata, write_results
from eval.resumable import ScoreLog

GRID = Path(__file__).parent / "configs" / "ablation.yaml"


@dataclass
class AblationArguments:
    """What to vary, and on which slides to score it."""

    output_dir: str = field(metadata={"help": "Folder for results, tables, figures and trained models."})
    sets: list[str] = field(
        default_factory=list,
        metadata={"help": f"Evaluation sets, from $STIMG_DATA: {', '.join(EVALUATION_SETS)}."},
    )
    slides: list[str] = field(
        default_factory=list,
        metadata={"help": "Labelled slides, one more set: files or globs; $VARIABLES are expanded."},
    )
    only: list[str] = field(
        default_factory=list,
        metadata={"help": "Score on these slides of the sets alone, by file name without suffix; default: on all."},
    )
    grid: str = field(default=str(GRID), metadata={"help": "YAML file with the base and the factors."})
    factors: list[str] = field(default_factory=list, metadata={"help": "Factors to vary; default: all of the grid."})
    training: str = field(
        default="{}", metadata={"help": "Fields of train/run_pretrain.py for the base, JSON; they win over the grid's."}
    )
    baselines: list[str] = field(
        default_factory=lambda: ["raw"],
        metadata={
            "help": f"Rows of features that cost nothing, each after four neighbourhood means: {', '.join(BASELINES)}; "
            "or none."
        },
    )
    label_key: str = field(default="label", metadata={"help": "Column of obs with the domains."})
    unlabelled: list[str] = field(
        default_factory=lambda: list(UNLABELLED),
        metadata={"help": "Labels of --slides that are no class, beside missing ones; named sets know theirs."},
    )
    splits: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"How training and test are told apart: {', '.join(SPLITS)}; default: all of them with --sets, "
            "spots without."
        },
    )
    probes: list[str] = field(
        default_factory=lambda: ["knn", "linear"], metadata={"help": f"Probes to train: {', '.join(PROBES)}."}
    )
    smoothings: list[int] = field(
        default_factory=lambda: [0, 1],
        metadata={"help": "Radii in sites of one more neighbourhood mean of a row's features; a column each."},
    )
    num_splits: int = field(default=Protocol.num_splits, metadata={"help": "Repetitions of every split."})
    train_share: float = field(
        default=Protocol.train_share, metadata={"help": "Share of the spots, or of the tiles, that trains."}
    )
    tile_side: int = field(
        default=Protocol.tile_side, metadata={"help": "Sites along a tile's side, of the split blocks."}
    )
    max_train_spots: int = field(
        default=Protocol.max_train_spots,
        metadata={"help": "Spots of the training slides that train, at most, of the split slides."},
    )
    control: bool = field(
        default=False,
        metadata={
            "help": "Also embed every slide with the counts of its spots shuffled, in columns of their own: what is "
            "read off it is position, not expression. Embedding takes twice as long."
        },
    )
    batch_size: int = field(default=32, metadata={"help": "Windows that are embedded at a time."})
    device: str | None = field(default=None, metadata={"help": "Where to embed, e.g. cuda."})
    cache: str | None = field(
        default=None, metadata={"help": "Folder for embeddings; default: embeddings/ in the output folder."}
    )
    dry_run: bool = field(default=False, metadata={"help": "List what would be run, and its cost in windows."})
    seed: int = field(default=0, metadata={"help": "Seed of splits, probes and gene draws; trainings have their own."})

    def __post_init__(self) -> None:
        self.baselines = [name for name in self.baselines if name != "none"]
        unknown = sorted(set(self.baselines) - set(BASELINES))
        if unknown:
            raise ValueError(f"Unknown baselines {unknown}: expected any of {list(BASELINES)}, or none.")

    def base_training(self) -> dict[str, Any]:
        """The fields of `training`."""
        try:
            fields = json.loads(self.training)
        except ValueError as error:
            raise ValueError(f"--training is no valid JSON ({error}): expected fields and their values.") from error
        if not isinstance(fields, dict):
            raise ValueError(f"--training holds a {type(fields).__name__}: expected fields and their values.")
        return fields

    def protocol(self) -> Protocol:
        """How rows are scored.

        Raises:
            ValueError: as `Protocol`.
        """
        smoothings = tuple(sorted(set(self.smoothings)))
        return Protocol(
            splits=tuple(dict.fromkeys(self.splits)) or (SPLITS if self.sets else ("spots",)),
            probes=tuple(dict.fromkeys(self.probes)),
            clusterings=(),
            num_splits=self.num_splits,
            train_share=self.train_share,
            tile_side=self.tile_side,
            max_train_spots=self.max_train_spots,
            smoothings=smoothings,
            mlp_smoothings=smoothings,
            seed=self.seed,
        )

    def scoring(self, protocol: Protocol, chosen: Mapping[str, Places]) -> dict[str, Any]:
        """Everything that decides a row's numbers beside the row."""
        slides = {
            name: [
                content_sha256([path for path, _ in places.values()]),
                {slide: patient for slide, (_, patient) in places.items()},
            ]
            for name, places in chosen.items()
        }
        labels = {"label_key": self.label_key, "unlabelled": sorted(self.unlabelled)}
        return {"protocol": protocol.told(), "control": self.control, "slides": slides, **labels}


def known_records(output: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows that an earlier call left, by factor and variant.

    Raises:
        ValueError: results of another script, which would be overwritten.
    """
    path = output / "results.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "grid" not in content["metadata"]:
            raise KeyError("grid")
        return {(record["factor"], record["variant"]): record for record in content["records"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of an ablation: give another --output_dir.") from error


def dry_run_table(
    rows: Sequence[Row],
    slides: Sequence[EvaluationSlide],
    known: Mapping[tuple[str, str], dict[str, Any]],
    readings: int = 1,
) -> str:
    """Markdown: every row, whether it is there, and its cost. What rows share is counted once.

    Args:
        known: rows that are there, by factor and variant. readings: how often each slide is embedded.
    """
    lines, met, trained, read = [], {record["key"] for record in known.values()}, 0, 0
    for row in rows:
        status = "there" if (row.factor, row.variant) in known else "to do"
        if isinstance(row, Reference):
            lines.append([row.factor, row.variant, status, "no model", "0", "0"])
            continue
        windows, reading = row.trained.least_windows, readings * windows_to_read(row, slides)
        again = row.trained.folder in met
        cost = "told by the slides" if windows is None else f"{windows:,}"
        training = "trained for a row above" if again else row.trained.status
        lines.append([row.factor, row.variant, status, training, cost, f"{reading:,}"])
        trained += 0 if again or row.trained.finished or windows is None else windows
        read += 0 if met & {row.key, row.encoding()} else reading
        met |= {row.trained.folder, row.key, row.encoding()}
    header = ["factor", "variant", "row", "training", "windows to train, at least", "windows to embed"]
    total = f"To do: at least {trained:,} windows of training, {read:,} windows of embedding."
    return "\n".join([*markdown_table(header, lines), "", total])


def compute(
    rows: Sequence[Row],
    known: dict[tuple[str, str], dict[str, Any]],
    plans: Sequence[Plan],
    arguments: AblationArguments,
    save: Callable[[], None],
) -> None:
    """Complete `known` with `rows`, one after the other; `save` is called after each."""
    output, protocol = Path(arguments.output_dir), arguments.protocol()
    log = ScoreLog(output / "scores.jsonl")
    cache = output / "embeddings" if arguments.cache is None else Path(arguments.cache)
    by_key = {record["key"]: record for record in known.values()}
    for row in tqdm([row for row in rows if (row.factor, row.variant) not in known], desc="rows"):
        if row.key not in by_key:
            if isinstance(row, Run):
                train_variant(row.trained)
                options = (arguments.control, arguments.batch_size, arguments.device)
                found = evaluate_run(row, plans, protocol, log, cache, *options)
            else:
                found = evaluate_reference(row, plans, protocol, log, arguments.control)
            by_key[row.key] = {**found, "commit": run_metadata(arguments.seed)["commit"]}
        place = {"factor": row.factor, "variant": row.variant, "unit": row.unit, "key": row.key}
        known[row.factor, row.variant] = {**by_key[row.key], **place, **row.told()}
        save()


def main(argv: list[str] | None = None) -> None:
    (arguments,) = HfArgumentParser(AblationArguments).parse_args_into_dataclasses(argv)
    output, protocol, training = Path(arguments.output_dir), arguments.protocol(), arguments.base_training()
    chosen = paths_of_sets(arguments.sets, arguments.slides, only=arguments.only)
    known = known_records(output)
    scoring = arguments.scoring(protocol, chosen)
    grid, base_key = read_grid(Path(arguments.grid), training, output / "models", scoring)
    reference = references(arguments.baselines, scoring, arguments.seed)
    rows: list[Row] = [*reference, *runs_of(grid, arguments.factors)]
    # Rows that this call does not ask for stay, as long as their settings are those of the grid.
    possible: list[Row] = [*references(list(BASELINES), scoring, arguments.seed), *grid]
    keys = {(row.factor, row.variant): row.key for row in possible}
    known = {row: record for row, record in known.items() if keys.get(row) == record["key"]}
    plans = [plan_set(one, protocol) for one in load_sets(chosen, arguments.label_key, arguments.unlabelled)]
    for note in (note for plan in plans for note in plan.notes):
        print(note, file=sys.stderr)
    if arguments.dry_run:
        slides = [slide for plan in plans for slide in plan.slides.values()]
        print(dry_run_table(rows, slides, known, 2 if arguments.control else 1))
        return
    metadata = run_metadata(
        arguments.seed,
        grid=Path(arguments.grid).name,
        base_training=without_paths(training),
        base_key=base_key,
        protocol=protocol.told(),
        control=arguments.control,
        sets={plan.name: plan.told() for plan in plans},
    )
    wanted = {(row.factor, row.variant) for row in rows}

    def save() -> None:
        records = [known[row] for row in keys if row in known]
        planned = [row for row in keys if row in known or row in wanted]
        write_results(output, records, metadata, ablation_table(records, planned, base_key))
        write_whole(output / "table.csv", ablation_csv(records, base_key).encode())

    compute(rows, known, plans, arguments, save)
    save()
    plot_curves([known[row] for row in keys if row in known], output)
    print((output / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        # A config's own check is the cause of the error that names the config's class.
        cause = error.__cause__ if isinstance(error, StrictDataclassError) else error
        print(f"error: {cause or error}", file=sys.stderr)
        sys.exit(2)
