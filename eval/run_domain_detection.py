r"""Domain detection: do frozen embeddings tell tissue domains apart, and how far ahead of simple features are they?

    python eval/run_domain_detection.py --models patch=runs/patch spot=runs/spot --output_dir runs/domains \
        --sets dlpfc her2 heart
    python eval/run_domain_detection.py --model runs/her2 --output_dir runs/her2/domains --slides 'my_slides/*.h5ad'

Probes (k-NN, linear, MLP) are trained on a part of the labelled spots and tested on others, split in three ways:
`spots` (20 % of one slide's spots, drawn at random, as in the paper), `blocks` (20 % of its tiles of 6 x 6 sites) and
`slides` (trained on the slides of other patients, or where there are none on other sections). Beside the models stand
the features that cost nothing: raw expression, PCA, bare coordinates, the first model before training; and all of them
again after the same mean over 3 x 3, 5 x 5 and 7 x 7 sites. k-means and Leiden show what is found without labels.

Writes `results.json`, `table.md` and figures into the output folder (`eval/report.py` puts several together).
Embeddings and scores are kept there, too: the same command goes on where it was interrupted.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from data_processing.corpus import load_pretraining
from data_processing.sources import EVALUATION_SETS
from eval.clustering import CLUSTERINGS
from eval.domain_figures import write_figures
from eval.domain_report import results_table
from eval.domain_scores import SPLITS, Plan, Protocol, plan_set, score_all
from eval.embedders import GENE_TOKENS, Embedder, EncoderEmbedder, load_embedders, load_gene_token_embedders
from eval.evaluation_sets import UNLABELLED, EvaluationSet, load_sets, paths_of_sets
from eval.features import Method, baseline_methods, embedder_methods
from eval.probes import PROBES
from eval.results import run_metadata, write_results
from eval.resumable import ScoreLog
from modeling_stimg.hub import Found, find_model

TRAINED = "stimg"


@dataclass
class DomainDetectionArguments:
    """What to evaluate, and how."""

    output_dir: str = field(metadata={"help": "Folder for results.json, table.md and figures; made if missing."})
    model: str | None = field(
        default=None,
        metadata={
            "help": "Model folder, as train/run_pretrain.py writes it, or Hub id (ORG/NAME, ORG/NAME@REVISION); "
            f"its row is called {TRAINED}."
        },
    )
    models: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Several models, as name=folder or name=ORG/NAME@REVISION each; the untrained rows are those of "
            "the first."
        },
    )
    gene_tokens: str | None = field(
        default=None,
        metadata={"help": "Folder of the gene-token baseline, from eval/baselines/train_gene_token.py; two rows."},
    )
    sets: list[str] = field(
        default_factory=list,
        metadata={"help": f"Evaluation sets, from $STIMG_DATA: {', '.join(EVALUATION_SETS)}."},
    )
    slides: list[str] = field(
        default_factory=list,
        metadata={"help": "Labelled slides, one more set: files or globs; $VARIABLES are expanded."},
    )
    exclude: list[str] = field(
        default_factory=list, metadata={"help": "Slides to leave out of all sets, by file name without suffix."}
    )
    test_slides: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Score on these slides alone; the others of their sets only train, of the split slides. "
            "Default: all."
        },
    )
    label_key: str = field(default="label", metadata={"help": "Column of obs with the domains."})
    unlabelled: list[str] = field(
        default_factory=lambda: list(UNLABELLED),
        metadata={"help": "Labels of --slides that are no class, beside missing ones; named sets know theirs."},
    )
    splits: list[str] = field(
        default_factory=lambda: list(SPLITS),
        metadata={"help": f"How training and test are told apart: {', '.join(SPLITS)}."},
    )
    probes: list[str] = field(
        default_factory=lambda: list(PROBES), metadata={"help": f"Which probes to train: {', '.join(PROBES)}."}
    )
    clusterings: list[str] = field(
        default_factory=lambda: list(CLUSTERINGS),
        metadata={"help": f"What to find domains with that knows no labels: {', '.join(CLUSTERINGS)}; or none."},
    )
    num_splits: int = field(default=10, metadata={"help": "Repetitions of every split."})
    train_share: float = field(default=0.2, metadata={"help": "Share of the spots, or of the tiles, that trains."})
    tile_side: int = field(default=6, metadata={"help": "Sites along a tile's side, of the split blocks."})
    max_train_spots: int = field(
        default=1000, metadata={"help": "Spots of the training slides that train, at most, of the split slides."}
    )
    mlp_epochs: int = field(default=800, metadata={"help": "Epochs of the MLP probe."})
    smoothings: list[int] = field(
        default_factory=lambda: [0, 1, 2, 3],
        metadata={"help": "Radii in sites of a mean over every method's features: a column each; 1 is 3 x 3."},
    )
    mlp_smoothings: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Those of the radii for which the MLP probe is trained, too."}
    )
    rows: list[str] = field(
        default_factory=list, metadata={"help": "Only these rows of the table, by name; default: all that there are."}
    )
    readout: str | None = field(default=None, metadata={"help": "spot, context or both; default: the model's."})
    figures: bool = field(default=True, metadata={"help": "Whether to draw figures beside the tables."})
    device: str | None = field(default=None, metadata={"help": "Where to run the encoders, e.g. cuda."})
    cache: str | None = field(
        default=None, metadata={"help": "Folder for embeddings; default: embeddings/ in the output folder."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of splits, probes, clusters, gene draws and starts."})


def named_models(arguments: DomainDetectionArguments) -> list[tuple[str, str]]:
    """Name of every model asked for, and where it is: a folder or a Hub id.

    Raises:
        ValueError: one without a name.
    """
    models = [] if arguments.model is None else [(TRAINED, arguments.model)]
    for text in arguments.models:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise ValueError(
                f"--models has {text!r}: write name=folder, such as patch=runs/patch, or name=ORG/NAME@REVISION."
            )
        models.append((name, folder))
    return models


def protocol_of(arguments: DomainDetectionArguments) -> Protocol:
    """How to score, from the arguments.

    Raises:
        ValueError: as `Protocol`.
    """
    return Protocol(
        splits=tuple(dict.fromkeys(arguments.splits)),
        probes=tuple(dict.fromkeys(arguments.probes)),
        clusterings=tuple(dict.fromkeys(name for name in arguments.clusterings if name != "none")),
        num_splits=arguments.num_splits,
        train_share=arguments.train_share,
        tile_side=arguments.tile_side,
        max_train_spots=arguments.max_train_spots,
        mlp_epochs=arguments.mlp_epochs,
        smoothings=tuple(dict.fromkeys(arguments.smoothings)),
        mlp_smoothings=tuple(dict.fromkeys(arguments.mlp_smoothings)),
        seed=arguments.seed,
    )


def wanted_rows(methods: list[Method], names: list[str]) -> list[Method]:
    """The rows of these names, in the table's order; all of them where there are no names.

    Raises:
        ValueError: two rows of one name, or a name that no row has.
    """
    there = [method.name for method in methods]
    repeated = sorted({name for name in there if there.count(name) > 1})
    if repeated:
        raise ValueError(
            f"Two rows would be called {repeated[0]!r}: give the model another name, --models name=folder."
        )
    unknown = sorted(set(names) - set(there))
    if unknown:
        raise ValueError(f"There are no rows {unknown}: expected any of {there}.")
    return [method for method in methods if not names or method.name in names]


def check_tested(sets: Sequence[EvaluationSet], tested: Sequence[str]) -> None:
    """ValueError for slides to test on that are not there, and for sets without any."""
    there = [name for one in sets for name in one.slides]
    unknown = sorted(set(tested) - set(there))
    if unknown:
        raise ValueError(f"There are no slides {unknown} to test on: expected any of {there}.")
    left = [one.name for one in sets if tested and not set(tested) & set(one.slides)]
    if left:
        raise ValueError(f"No slide to test on is of the set {left[0]}: leave it out, or name one of its slides.")


def metadata_of(
    arguments: DomainDetectionArguments,
    found: Mapping[str, Found],
    protocol: Protocol,
    plans: list[Plan],
    embedders: list[EncoderEmbedder],
) -> dict[str, Any]:
    """What tells where the numbers came from."""
    folders = {name: model.folder for name, model in found.items()}
    if arguments.gene_tokens is not None:
        folders[GENE_TOKENS] = Path(arguments.gene_tokens)
    models = {}
    for name, folder in folders.items():
        told = load_pretraining(folder)
        (embedder,) = (e for e in embedders if e.name == name)
        models[name] = {
            "hub": found[name].hub if name in found else None,
            "embedding": embedder.options,
            "sample_unit": embedder.processor.sample_unit,
            "slides": None if told is None else [record.name for record in told[0]],
            "pretraining": None if told is None else told[1],
        }
    small = {
        embedder.name: names
        for embedder in embedders
        if (names := [s.name for plan in plans for s in plan.slides.values() if embedder.is_smaller_than_window(s)])
    }
    return run_metadata(
        arguments.seed,
        protocol=protocol.told(),
        sets={plan.name: plan.told() for plan in plans},
        models=models,
        smaller_than_a_window=small,
    )


def main(argv: list[str] | None = None) -> None:
    (arguments,) = HfArgumentParser(DomainDetectionArguments).parse_args_into_dataclasses(argv)
    protocol = protocol_of(arguments)
    given = named_models(arguments)
    chosen = paths_of_sets(arguments.sets, arguments.slides, arguments.exclude)
    sets = load_sets(chosen, arguments.label_key, arguments.unlabelled)
    check_tested(sets, arguments.test_slides)
    plans = [plan_set(evaluation_set, protocol, arguments.test_slides) for evaluation_set in sets]
    models = [(name, find_model(where)) for name, where in given]
    folders = [(name, model.folder) for name, model in models]
    embedders: list[Embedder] = list(load_embedders(folders, arguments.readout, arguments.device, arguments.seed))
    output = Path(arguments.output_dir)
    cache = output / "embeddings" if arguments.cache is None else Path(arguments.cache)
    if arguments.gene_tokens is not None:
        tokens = load_gene_token_embedders(arguments.gene_tokens, cache, arguments.device, arguments.seed)
        embedders = [*tokens, *embedders]
    methods: list[Method] = [*baseline_methods(arguments.seed), *embedder_methods(embedders, cache)]
    methods = wanted_rows(methods, arguments.rows)
    encoders = [e for e in embedders if isinstance(e, EncoderEmbedder)]
    metadata = metadata_of(arguments, dict(models), protocol, plans, encoders)
    for line in [line for plan in plans for line in plan.notes] + [
        f"{name}: no window fits into {', '.join(slides)}" for name, slides in metadata["smaller_than_a_window"].items()
    ]:
        print(line, file=sys.stderr)
    records = score_all(plans, methods, protocol, ScoreLog(output / "scores.jsonl"))
    table = results_table(records, metadata)
    write_results(output, records, metadata, table)
    if arguments.figures:
        write_figures(plans, methods, records, output, arguments.seed)
    print(table)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
