"""Ablations: a grid of variants of one model, and what becomes of the embedding with each.

A grid is a YAML file. On top stand the fields of the base: `training` (of `train/run_pretrain.py`), `processor`
(options that are changed when a trained model is loaded) and `embedding` (options of `embed_slide`). `factors` names
what is varied; each of its variants overrides some of these fields, and one without overrides is the base:

    training: {corpus: runs/corpus, max_spots: 100_000}
    embedding: {stride: 4}
    factors:
      window size:
        unit: sites
        variants:
          8: {training: {window_size: 8, per_device_train_batch_size: 64}}
          16: {}

Variants that differ in `processor` or `embedding` alone share one training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from data_processing.corpus import load_pretraining, slide_images
from data_processing.splits import encode_labels, slide_labels, spot_splits
from eval.baselines.expression import neighbourhood_mean
from eval.baselines.shuffled import shuffle_spots
from eval.baselines.variants import Variant, make_variant
from eval.probes import PROBES, check_neighbours, score
from eval.provenance import seen
from modeling_stimg import STImageMAEModel, STPatchProcessor
from modeling_stimg.compaction_stimg import compact
from modeling_stimg.embedding_stimg import NUM_CONTEXT_PASSES, embedding_options
from modeling_stimg.sample_units_stimg import covering_samples, sample_side

if TYPE_CHECKING:
    from anndata import AnnData

SECTIONS = ("training", "processor", "embedding")
# What may differ from training when a model is loaded, without its weights meaning something else.
PROCESSOR_OPTIONS = ("window_size", "num_channels", "gene_selection", "compaction")
BASE = "base"
PASSES = {"spot": 1, "context": NUM_CONTEXT_PASSES, "both": 1 + NUM_CONTEXT_PASSES}


@dataclass(frozen=True)
class Evaluation:
    """How embeddings are scored; see the arguments of `run_ablation.py`."""

    label_key: str = "label"
    unlabelled: tuple[str, ...] = ("undetermined", "WH")
    probes: tuple[str, ...] = ("knn", "linear")
    smoothings: tuple[int, ...] = (0, 1)
    num_splits: int = 10
    train_share: float = 0.2
    control: bool = False
    seed: int = 0


@dataclass(frozen=True)
class LabelledSlide:
    """A slide to score on. `labels`: int64 (n_obs,), -1 = unlabelled; `rows`, `cols`: int64 (n_obs,), tight lattice.

    Smoothing works on the tight lattice whatever grid a variant makes of the slide.
    """

    name: str
    adata: AnnData = field(repr=False)
    labels: np.ndarray = field(repr=False)
    rows: np.ndarray = field(repr=False)
    cols: np.ndarray = field(repr=False)

    @classmethod
    def of(cls, name: str, adata: AnnData, evaluation: Evaluation) -> LabelledSlide:
        """Read labels and grid.

        Raises:
            ValueError: no such column, too few classes or spots; names the slide.
        """
        try:
            labels, _ = encode_labels(slide_labels(adata, evaluation.label_key, evaluation.unlabelled))
            splits = spot_splits(labels, evaluation.num_splits, evaluation.train_share, evaluation.seed)
            check_neighbours(len(splits[0][0]), evaluation.probes)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        rows, cols = compact(adata.obs["array_row"].to_numpy(), adata.obs["array_col"].to_numpy(), "lattice")
        return cls(name, adata, labels, rows, cols)


@dataclass(frozen=True)
class Run:
    """One row: a variant of one factor.

    Attributes:
        trained: the training that it reads. key: fingerprint of everything that decides its numbers.
    """

    factor: str
    variant: str
    unit: str
    trained: Variant
    processor: Mapping[str, Any]
    embedding: Mapping[str, Any]
    key: str

    @property
    def window_size(self) -> int:
        """Side of the windows that cover a slide."""
        return self.processor.get("window_size", self.trained.window_size)

    def options(self) -> dict[str, Any]:
        """What embedding will do, before there is a model.

        Raises:
            ValueError: options that do not exist, are out of range, or that the variant cannot give.
        """
        config = SimpleNamespace(embedding_defaults=self.trained.embedding_defaults, mask_unit=self.trained.mask_unit)
        told = {name: getattr(self.trained, name) for name in ("gene_selection", "num_channels")}
        told |= {name: self.processor[name] for name in told if name in self.processor}
        processor = SimpleNamespace(window_size=self.window_size, **told)
        return embedding_options(SimpleNamespace(config=config), processor, **self.embedding)


# ---------------------------------------------------------------------------- the grid


def read_grid(
    path: Path, training: Mapping[str, Any], models: Path, evaluation: Evaluation, slides_sha256: str
) -> tuple[list[Run], str]:
    """The runs of a grid, in its order, and the key of its base.

    Args:
        training: fields that take the place of the grid's own base. models: folder for trained variants.
        slides_sha256: fingerprint of the labelled slides.

    Raises:
        ValueError: a grid of another form, or fields that do not exist; names the variant. OSError: a missing file.
    """
    grid = _checked_grid(path)
    base = {name: dict(grid.get(name) or {}) for name in SECTIONS}
    base["training"] |= training
    settings = {"evaluation": asdict(evaluation), "slides": slides_sha256}
    runs = []
    for factor, told in {BASE: {"variants": {BASE: {}}}, **grid["factors"]}.items():
        for variant, overrides in told["variants"].items():
            fields = {name: {**base[name], **((overrides or {}).get(name) or {})} for name in SECTIONS}
            try:
                runs.append(_make_run(factor, str(variant), str(told.get("unit", "")), fields, models, settings))
            except (ValueError, OSError) as error:
                raise ValueError(f"{path.name}, {factor}: {variant}: {error}") from error
    return runs[1:], runs[0].key


def runs_of(runs: Sequence[Run], factors: Sequence[str]) -> list[Run]:
    """The runs of some factors; all where none is named.

    Raises:
        ValueError: no such factor.
    """
    known = list(dict.fromkeys(run.factor for run in runs))
    unknown = sorted(set(factors) - set(known))
    if unknown:
        raise ValueError(f"Unknown factors {unknown}: the grid has {known}.")
    return [run for run in runs if not factors or run.factor in factors]


def _checked_grid(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: expected a grid such as eval/configs/ablation.yaml.")
    try:
        grid = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is no valid YAML ({' '.join(str(error).split())}).") from error
    expected = f"expected the entries {', '.join(SECTIONS)} and factors"
    if not isinstance(grid, dict) or not isinstance(grid.get("factors"), dict) or not grid["factors"]:
        raise ValueError(f"{path.name} names no factors: {expected}.")
    unknown = sorted(set(grid) - {*SECTIONS, "factors"})
    if unknown:
        raise ValueError(f"{path.name} has the entries {unknown}: {expected}.")
    for factor, told in grid["factors"].items():
        if not isinstance(told, dict) or not isinstance(told.get("variants"), dict) or set(told) - {"unit", "variants"}:
            raise ValueError(f"{path.name}, {factor}: expected variants, by name, and perhaps their unit.")
        for variant, overrides in told["variants"].items():
            wrong = sorted(set(overrides or {}) - set(SECTIONS))
            if wrong:
                raise ValueError(f"{path.name}, {factor}: {variant} overrides {wrong}: expected any of {SECTIONS}.")
    return grid


def _make_run(
    factor: str, variant: str, unit: str, fields: Mapping[str, dict], models: Path, settings: Mapping[str, Any]
) -> Run:
    unknown = sorted(set(fields["processor"]) - set(PROCESSOR_OPTIONS))
    if unknown:
        raise ValueError(f"Processor options {unknown} cannot be varied: expected any of {PROCESSOR_OPTIONS}.")
    trained = make_variant(fields["training"], models)
    run = Run(factor, variant, unit, trained, fields["processor"], fields["embedding"], key="")
    told = [trained.folder.name, fields["processor"], run.options(), settings]
    return replace(run, key=hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest())


# ---------------------------------------------------------------------------- a row


def score_embedding(features: np.ndarray, labels: np.ndarray, evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """What the probes read off one embedding of one slide: a mapping for every probe.

    Args:
        features: float (n_obs, width). labels: int64 (n_obs,), -1 = unlabelled.
    """
    splits = spot_splits(labels, evaluation.num_splits, evaluation.train_share, evaluation.seed)
    for name in evaluation.probes:
        found = score(labels, PROBES[name](features, labels, splits, evaluation.seed), splits)
        of_metrics = {metric: mean for metric, (mean, _) in found.items()}
        yield {"probe": name, **of_metrics, **{f"{metric}_sd": sd for metric, (_, sd) in found.items()}}


def evaluate_run(
    run: Run, slides: Sequence[LabelledSlide], evaluation: Evaluation, batch_size: int = 32, device: str | None = None
) -> dict[str, Any]:
    """The scores of a run whose variant is trained.

    Returns:
        `trained` (steps, windows and spots seen), `too_small` (slides into which its windows do not fit) and `scores`:
        one mapping for every slide, its counts as they are or shuffled over its spots, smoothing (radius in sites) and
        probe.
    """
    processor = STPatchProcessor.from_pretrained(run.trained.folder, **run.processor)
    model = STImageMAEModel.from_pretrained(run.trained.folder).eval()
    saw, told = load_pretraining(run.trained.folder)
    scores, too_small = [], []
    for slide in slides:
        saw_of_slide = seen(slide.name, slide.adata, saw)
        for shuffled in (False, True) if evaluation.control else (False,):
            adata = shuffle_spots(slide.adata, evaluation.seed) if shuffled else slide.adata
            (image,) = slide_images({slide.name: adata}, processor)
            options = {**run.embedding, "batch_size": batch_size, "device": device, "seed": evaluation.seed}
            embedding = model.embed(image, processor, **options)[image.spot_of_obs]
            for radius in evaluation.smoothings:
                features = embedding if radius == 0 else neighbourhood_mean(embedding, slide.rows, slide.cols, radius)
                place = {"slide": slide.name, "seen": saw_of_slide, "shuffled": shuffled, "smoothing": radius}
                scores += [{**place, **found} for found in score_embedding(features, slide.labels, evaluation)]
        if processor.sample_unit == "patch" and run.window_size > min(image.height, image.width):
            too_small.append(slide.name)
    budget = {name: told[name] for name in ("max_steps", "num_windows", "num_spots_seen")}
    return {"trained": budget, "too_small": too_small, "scores": scores}


def windows_to_read(run: Run, slides: Sequence[LabelledSlide]) -> int:
    """How many windows the encoder gets to embed the slides; a hidden quarter of a window is one more."""
    options = run.options()
    total = 0
    for slide in slides:
        site = (slide.adata.obs[name].to_numpy() for name in ("array_row", "array_col"))
        grid = np.stack(compact(*site, run.processor.get("compaction", run.trained.compaction)), axis=1)
        rows, cols = np.unique(grid, axis=0).T
        height, width = grid.max(0) + 1
        spot_grid = np.full((height, width), -1)
        spot_grid[rows, cols] = np.arange(len(rows))
        # As much of a SlideImage as tells where its windows lie.
        image = SimpleNamespace(
            height=height, width=width, rows=rows, cols=cols, num_spots=len(rows), spot_grid=spot_grid
        )
        side = sample_side(image, run.trained.sample_unit, run.window_size)
        total += len(covering_samples(image, run.trained.sample_unit, side, options["stride"]))
    return total * options["num_gene_draws"] * PASSES[options["readout"]]
