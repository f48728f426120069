r"""Domain detection: do frozen embeddings tell tissue domains apart, and how far ahead of simple features are they?

    python eval/run_domain_detection.py --model runs/her2 --output_dir runs/her2/domains \
        --slides '$STIMG_DATA/slides/her2st_B1.h5ad' '$STIMG_DATA/slides/her2st_E1.h5ad'

Probes (k-NN, linear, MLP) are trained on 20 % of a slide's labelled spots and tested on the others, over several random
splits. Beside the model stand the features that cost nothing: raw expression, its neighbourhood mean, PCA, the bare
coordinates, and the model before training. Writes `results.json`, `table.md` and two figures into the output folder.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from anndata import AnnData
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm
from transformers import HfArgumentParser, set_seed

from data_processing.corpus import find_slides, load_pretraining, read_slides, slide_images
from data_processing.splits import encode_labels, slide_labels, spot_splits
from eval.baselines.expression import baseline_features
from eval.probes import PROBES, score
from eval.provenance import seen
from eval.report import plot_ari, write_report
from eval.results import run_metadata
from modeling_stimg import SlideImage, STImageMAEModel, STPatchProcessor
from modeling_stimg.plotting import plot_maps

TRAINED = "stimg"
RANDOM_START, SINGULAR_START = "untrained, random start", "untrained, singular start"


@dataclass
class DomainDetectionArguments:
    """What to evaluate, and how."""

    model: str = field(metadata={"help": "Model folder, as train/run_pretrain.py writes it, or Hub id."})
    slides: list[str] = field(metadata={"help": "Labelled slides: files or globs; $VARIABLES are expanded."})
    output_dir: str = field(metadata={"help": "Folder for results.json, table.md and figures; made if missing."})
    label_key: str = field(default="label", metadata={"help": "Column of obs with the domains."})
    unlabelled: list[str] = field(
        default_factory=lambda: ["undetermined", "WH"],
        metadata={"help": "Labels that are no class, beside missing ones."},
    )
    probes: list[str] = field(
        default_factory=lambda: list(PROBES), metadata={"help": f"Which probes to train: {', '.join(PROBES)}."}
    )
    num_splits: int = field(default=10, metadata={"help": "Random splits of the labelled spots."})
    train_share: float = field(default=0.2, metadata={"help": "Share of the labelled spots that trains a probe."})
    mlp_epochs: int = field(default=800, metadata={"help": "Epochs of the MLP probe."})
    smoothings: list[int] = field(
        default_factory=lambda: [0, 1],
        metadata={"help": "Radii in sites of a final neighbourhood mean of the embeddings; a row each."},
    )
    readout: str | None = field(default=None, metadata={"help": "spot, context or both; default: the model's."})
    device: str | None = field(default=None, metadata={"help": "Where to run the encoder, e.g. cuda."})
    seed: int = field(default=0, metadata={"help": "Seed of splits, probes, gene draws and the random start."})


def load_encoders(arguments: DomainDetectionArguments) -> dict[str, STImageMAEModel]:
    """The encoders to compare, by row: at a random start, at the singular start if it had one, and trained."""
    trained = STImageMAEModel.from_pretrained(arguments.model)
    set_seed(arguments.seed)
    encoders = {RANDOM_START: STImageMAEModel(trained.config)}
    start = Path(arguments.model) / "untrained"
    told = load_pretraining(start)
    if told is not None and told[1]["singular_start"]:
        encoders[SINGULAR_START] = STImageMAEModel.from_pretrained(start)
    return {**encoders, TRAINED: trained}


def all_features(
    adata: AnnData,
    image: SlideImage,
    encoders: dict[str, STImageMAEModel],
    processor: STPatchProcessor,
    arguments: DomainDetectionArguments,
) -> dict[str, np.ndarray]:
    """Every row of the table: float32 (n_obs, width) by name."""
    spots = image.spot_of_obs
    features = baseline_features(adata.X, image.rows[spots], image.cols[spots], arguments.seed)
    for name, encoder in encoders.items():
        for radius in arguments.smoothings:
            row = name if radius == 0 else f"{name}, {2 * radius + 1}x{2 * radius + 1} mean"
            embedding = encoder.embed(
                image,
                processor,
                readout=arguments.readout,
                smoothing=radius,
                device=arguments.device,
                seed=arguments.seed,
            )
            features[row] = embedding[spots]
    return features


def probe_features(features: dict[str, np.ndarray], labels: np.ndarray, arguments: DomainDetectionArguments) -> list:
    """A record for every row and probe on one slide; `labels` int64 (n_obs,), -1 = unlabelled."""
    splits = spot_splits(labels, arguments.num_splits, arguments.train_share, arguments.seed)
    records = []
    pairs = [(name, probe) for name in features for probe in arguments.probes]
    for name, probe_name in tqdm(pairs, desc="probes", leave=False):
        probe = PROBES[probe_name]
        if probe_name == "mlp":
            probe = partial(probe, epochs=arguments.mlp_epochs)
        scores = score(labels, probe(features[name], labels, splits, arguments.seed), splits)
        record = {"features": name, "probe": probe_name}
        for metric, (mean, deviation) in scores.items():
            record |= {metric: mean, f"{metric}_sd": deviation}
        records.append(record)
    return records


def k_means(features: np.ndarray, labels: np.ndarray, classes: list[str], seed: int) -> np.ndarray:
    """As many clusters of standardised features as there are classes, each named after the class it meets most.

    Names are given one to one (Hungarian matching over labelled spots), so that maps share their colours.

    Args:
        features: float (n, width). labels: int64 (n,), -1 = unlabelled. classes: name of every label.

    Returns:
        object (n,), names.
    """
    clusters = KMeans(len(classes), n_init=10, random_state=seed).fit_predict(StandardScaler().fit_transform(features))
    labelled = labels >= 0
    shared = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(shared, (clusters[labelled], labels[labelled]), 1)
    _, name_of_cluster = linear_sum_assignment(-shared)
    return np.array(classes, dtype=object)[name_of_cluster[clusters]]


def main(argv: list[str] | None = None) -> None:
    (arguments,) = HfArgumentParser(DomainDetectionArguments).parse_args_into_dataclasses(argv)
    unknown = set(arguments.probes) - set(PROBES)
    if unknown:
        raise ValueError(f"Unknown probes {sorted(unknown)}: expected any of {list(PROBES)}.")
    slides = read_slides(find_slides(arguments.slides))
    processor = STPatchProcessor.from_pretrained(arguments.model)
    encoders = load_encoders(arguments)
    output = Path(arguments.output_dir)
    told = load_pretraining(Path(arguments.model))
    corpus = None if told is None else told[0]
    all_labels = {n: slide_labels(a, arguments.label_key, tuple(arguments.unlabelled)) for n, a in slides.items()}
    records = []
    for name, adata in tqdm(slides.items(), desc="slides"):
        (image,) = slide_images({name: adata}, processor, tell=True)
        features = all_features(adata, image, encoders, processor, arguments)
        names = all_labels[name]
        labels, classes = encode_labels(names)
        saw = seen(name, adata, corpus)
        of_models = tuple(k for k in features if k.startswith((TRAINED, SINGULAR_START)))
        for record in probe_features(features, labels, arguments):
            records.append({"slide": name, **record, **({"seen": saw} if record["features"] in of_models else {})})
        if name == next(iter(slides)):
            output.mkdir(parents=True, exist_ok=True)
            maps = {f"{name}: labels": names}
            for row in ("raw", TRAINED):
                maps[f"{row}: k-means"] = k_means(features[row], labels, classes, arguments.seed)
            plot_maps(adata, maps, output / "maps.png")
    metadata = run_metadata(
        arguments.seed,
        slides=list(slides),
        corpus=None if corpus is None else [record.name for record in corpus],
        pretraining=None if told is None else told[1],
        num_splits=arguments.num_splits,
        train_share=arguments.train_share,
        mlp_epochs=arguments.mlp_epochs,
        embedding_defaults=encoders[TRAINED].config.embedding_defaults,
        readout=arguments.readout,
    )
    print(write_report(records, metadata, output))
    plot_ari(records, output / "ari.png")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
