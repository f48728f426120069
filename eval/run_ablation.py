r"""Ablations: train and embed variants of one model that differ in one thing each, and probe them on labelled slides.

    python eval/run_ablation.py --slides '$STIMG_DATA/slides/her2st_B1.h5ad' --output_dir runs/ablation \
        --training '{"corpus": "runs/corpus", "max_spots": 100000}' --dry_run

What is varied stands in a YAML file (`eval/configs/ablation.yaml`; `eval/ablation.py` tells its form). Every row is
written to `results.json`, `table.md` and `table.csv` as soon as it is there. The same command again goes on where it
was stopped, in the middle of a training too; rows whose settings or slides have changed are computed anew, and trained
variants lie in `models/`, each under a name that follows from its settings. With `--dry_run` nothing is computed: it
lists the rows and what they cost, in windows. Factors of numbers get a figure each.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from data_processing.corpus import find_slides, read_slides
from data_processing.writing import write_whole
from eval.ablation import Evaluation, LabelledSlide, Run, evaluate_run, read_grid, runs_of, windows_to_read
from eval.ablation_report import ablation_csv, ablation_table, plot_curves
from eval.baselines.variants import content_sha256, train_variant
from eval.probes import PROBES
from eval.results import markdown_table, run_metadata, write_results

GRID = Path(__file__).parent / "configs" / "ablation.yaml"


@dataclass
class AblationArguments:
    """What to vary, and on which slides to score it."""

    slides: list[str] = field(metadata={"help": "Labelled slides: files or globs; $VARIABLES are expanded."})
    output_dir: str = field(metadata={"help": "Folder for results, tables, figures and trained models."})
    grid: str = field(default=str(GRID), metadata={"help": "YAML file with the base and the factors."})
    factors: list[str] = field(default_factory=list, metadata={"help": "Factors to vary; default: all of the grid."})
    training: str = field(
        default="{}", metadata={"help": "Fields of train/run_pretrain.py for the base, JSON; they win over the grid's."}
    )
    label_key: str = field(default="label", metadata={"help": "Column of obs with the domains."})
    unlabelled: list[str] = field(
        default_factory=lambda: ["undetermined", "WH"],
        metadata={"help": "Labels that are no class, beside missing ones."},
    )
    probes: list[str] = field(
        default_factory=lambda: ["knn", "linear"], metadata={"help": f"Probes to train: {', '.join(PROBES)}."}
    )
    smoothings: list[int] = field(
        default_factory=lambda: [0, 1],
        metadata={"help": "Radii in sites of a final neighbourhood mean of the embeddings; a column each."},
    )
    num_splits: int = field(default=10, metadata={"help": "Random splits of the labelled spots."})
    train_share: float = field(default=0.2, metadata={"help": "Share of the labelled spots that trains a probe."})
    control: bool = field(
        default=False,
        metadata={
            "help": "Also embed every slide with the counts of its spots shuffled, in columns of their own: what is "
            "read off it is position, not expression. Embedding takes twice as long."
        },
    )
    batch_size: int = field(default=32, metadata={"help": "Windows that are embedded at a time."})
    device: str | None = field(default=None, metadata={"help": "Where to embed, e.g. cuda."})
    dry_run: bool = field(default=False, metadata={"help": "List what would be run, and its cost in windows."})
    seed: int = field(default=0, metadata={"help": "Seed of splits, probes and gene draws; trainings have their own."})

    def __post_init__(self) -> None:
        unknown = set(self.probes) - set(PROBES)
        if unknown or not self.probes:
            raise ValueError(f"probes are {self.probes}: expected any of {list(PROBES)}.")
        if not self.smoothings or min(self.smoothings) < 0:
            raise ValueError(f"smoothings are {self.smoothings}: expected radii in sites, from 0.")

    def base_training(self) -> dict[str, Any]:
        """The fields of `training`."""
        try:
            fields = json.loads(self.training)
        except ValueError as error:
            raise ValueError(f"--training is no valid JSON ({error}): expected fields and their values.") from error
        if not isinstance(fields, dict):
            raise ValueError(f"--training holds a {type(fields).__name__}: expected fields and their values.")
        return fields

    def evaluation(self) -> Evaluation:
        """How rows are scored."""
        return Evaluation(
            label_key=self.label_key,
            unlabelled=tuple(sorted(self.unlabelled)),
            probes=tuple(self.probes),
            smoothings=tuple(sorted(set(self.smoothings))),
            num_splits=self.num_splits,
            train_share=self.train_share,
            control=self.control,
            seed=self.seed,
        )


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


def without_paths(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Training fields for publication: this machine's folders mean nothing elsewhere."""
    return {name: value for name, value in fields.items() if name not in ("slides", "corpus", "gene_table")}


def dry_run_table(
    runs: Sequence[Run], slides: Sequence[LabelledSlide], known: dict[tuple[str, str], Any], readings: int = 1
) -> str:
    """Markdown: every row, whether it is there, and its cost. What rows share is counted once.

    Args:
        known: rows that are there, by factor and variant. readings: how often each slide is embedded.
    """
    rows, met, trained, read = [], {record["key"] for record in known.values()}, 0, 0
    for run in runs:
        done = (run.factor, run.variant) in known
        windows, reading = run.trained.least_windows, readings * windows_to_read(run, slides)
        again = run.trained.folder in met
        cost = "told by the slides" if windows is None else f"{windows:,}"
        status = "trained for a row above" if again else run.trained.status
        rows.append([run.factor, run.variant, "there" if done else "to do", status, cost, f"{reading:,}"])
        trained += 0 if again or run.trained.finished or windows is None else windows
        read += 0 if run.key in met else reading
        met |= {run.trained.folder, run.key}
    header = ["factor", "variant", "row", "training", "windows to train, at least", "windows to embed"]
    total = f"To do: at least {trained:,} windows of training, {read:,} windows of embedding."
    return "\n".join([*markdown_table(header, rows), "", total])


def compute(
    runs: Sequence[Run],
    known: dict[tuple[str, str], dict[str, Any]],
    slides: Sequence[LabelledSlide],
    arguments: AblationArguments,
    save: Callable[[], None],
) -> None:
    """Complete `known` with the rows of `runs`, one after the other; `save` is called after each."""
    to_do = [run for run in runs if (run.factor, run.variant) not in known]
    by_key = {record["key"]: record for record in known.values()}
    for run in tqdm(to_do, desc="rows"):
        if run.key not in by_key:
            train_variant(run.trained)
            found = evaluate_run(run, slides, arguments.evaluation(), arguments.batch_size, arguments.device)
            by_key[run.key] = {**found, "commit": run_metadata(arguments.seed)["commit"]}
        told = {"factor": run.factor, "variant": run.variant, "unit": run.unit, "key": run.key}
        known[run.factor, run.variant] = {
            **by_key[run.key],
            **told,
            "model": f"models/{run.trained.folder.name}",
            "training": without_paths(run.trained.fields),
            "processor": dict(run.processor),
            "embedding": run.options(),
        }
        save()


def main(argv: list[str] | None = None) -> None:
    (arguments,) = HfArgumentParser(AblationArguments).parse_args_into_dataclasses(argv)
    output, evaluation, training = Path(arguments.output_dir), arguments.evaluation(), arguments.base_training()
    paths = find_slides(arguments.slides)
    known = known_records(output)
    every, base_key = read_grid(Path(arguments.grid), training, output / "models", evaluation, content_sha256(paths))
    runs = runs_of(every, arguments.factors)
    # Rows of other factors stay, as long as their settings are those of the grid.
    keys = {(run.factor, run.variant): run.key for run in every}
    known = {row: record for row, record in known.items() if keys.get(row) == record["key"]}
    slides = [LabelledSlide.of(name, adata, evaluation) for name, adata in read_slides(paths).items()]
    if arguments.dry_run:
        print(dry_run_table(runs, slides, known, 2 if arguments.control else 1))
        return
    metadata = run_metadata(
        arguments.seed,
        grid=Path(arguments.grid).name,
        slides=[slide.name for slide in slides],
        base_training=without_paths(training),
        base_key=base_key,
        evaluation=asdict(evaluation),
    )

    def save() -> None:
        records = [known[row] for row in keys if row in known]
        wanted = {(run.factor, run.variant) for run in runs}
        planned = [row for row in keys if row in known or row in wanted]
        write_results(output, records, metadata, ablation_table(records, planned, base_key))
        write_whole(output / "table.csv", ablation_csv(records, base_key).encode())

    compute(runs, known, slides, arguments, save)
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
