"""Ablations: a grid of variants of one model, and what becomes of the embedding with each.

A grid is a YAML file. On top stand the fields of the base: `training` (of `train/run_pretrain.py`), `processor`
(options that are changed when a trained model is loaded) and `embedding` (options of `embed_slide`). `factors` names
what is varied; each of its variants overrides some of these fields, and one without overrides is the base. One with
`untrained: true` is the same model at step 0:

    training: {corpus: runs/corpus, max_spots: 100_000}
    embedding: {stride: 4}
    factors:
      window size:
        unit: sites
        variants:
          8: {training: {window_size: 8, per_device_train_batch_size: 64}}
          16: {}
      training:
        variants:
          trained: {}
          untrained: {untrained: true}

Variants that differ in `processor`, `embedding` or `untrained` alone share one training. Rows are scored as those of
`eval/run_domain_detection.py` are, by the same code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml

from data_processing.corpus import load_pretraining
from eval.baselines.variants import Variant, make_variant
from eval.domain_scores import Plan, Protocol, score_all
from eval.embedders import EncoderEmbedder
from eval.evaluation_sets import EvaluationSlide
from eval.features import Method, after_mean, baseline_methods, on_shuffled_counts, written_method
from eval.resumable import ScoreLog
from modeling_stimg import STImageMAEModel, STPatchProcessor
from modeling_stimg.compaction_stimg import compact
from modeling_stimg.embedding_stimg import NUM_CONTEXT_PASSES, embedding_options
from modeling_stimg.sample_units_stimg import covering_samples, sample_side
from modeling_stimg.sampling_stimg import GENE_SELECTIONS

SECTIONS = ("training", "processor", "embedding")
# What may differ from training when a model is loaded, without its weights meaning something else.
PROCESSOR_OPTIONS = ("window_size", "num_channels", "gene_selection", "compaction")
UNTRAINED = "untrained"  # of a variant, and the folder in a trained model's that holds it at step 0
BASE = "base"
BASELINE = "baseline"
# Rows of the table of domain detection, by what --baselines calls them.
BASELINES = {"raw": "raw", "pca": "PCA", "coordinates": "coordinates only", "shuffled": "raw, counts shuffled"}
BASELINE_RADII = (0, 1, 2, 3)
BUDGET = ("max_steps", "num_windows", "num_spots_seen")
PASSES = {"spot": 1, "context": NUM_CONTEXT_PASSES, "both": 1 + NUM_CONTEXT_PASSES}


@dataclass(frozen=True)
class Reference:
    """One row without a model: features that cost nothing, after the mean over a square of sites.

    Attributes:
        method: what the row shows. key: fingerprint of everything that decides its numbers.
    """

    factor: str
    variant: str
    unit: str
    method: Method = field(repr=False)
    key: str

    def told(self) -> dict[str, Any]:
        """For `results.json`."""
        return {"model": None, "training": {}, "processor": {}, "embedding": {}}


@dataclass(frozen=True)
class Run:
    """One row: a variant of one factor.

    Attributes:
        trained: the training that it reads. untrained: whether it reads that training's model at step 0.
        key: fingerprint of everything that decides its numbers.
    """

    factor: str
    variant: str
    unit: str
    trained: Variant
    processor: Mapping[str, Any]
    embedding: Mapping[str, Any]
    untrained: bool = False
    key: str = ""

    @property
    def folder(self) -> Path:
        """Of the model that it embeds with."""
        return self.trained.folder / UNTRAINED if self.untrained else self.trained.folder

    @property
    def window_size(self) -> int:
        """Side of the windows that cover a slide."""
        return self.processor.get("window_size", self.trained.window_size)

    def options(self) -> dict[str, Any]:
        """What embedding will do, before there is a model.

        Raises:
            ValueError: options that do not exist, are out of range, or that the variant cannot give.
        """
        config = SimpleNamespace(
            **{name: getattr(self.trained, name) for name in ("embedding_defaults", "mask_unit", "projection_size")}
        )
        told = {name: getattr(self.trained, name) for name in ("gene_selection", "num_channels")}
        told |= {name: self.processor[name] for name in told if name in self.processor}
        processor = SimpleNamespace(window_size=self.window_size, **told)
        options = embedding_options(SimpleNamespace(config=config), processor, **self.embedding)
        if options["gene_selection"] not in GENE_SELECTIONS:
            raise ValueError(f"gene_selection is {options['gene_selection']!r}: expected one of {GENE_SELECTIONS}.")
        return options

    def encoding(self) -> str:
        """What its embeddings depend on, before their neighbourhood mean: rows of one encoding embed once."""
        return json.dumps([str(self.folder), self.processor, {**self.options(), "smoothing": 0}], sort_keys=True)

    def told(self) -> dict[str, Any]:
        """For `results.json`, without this machine's folders, which mean nothing elsewhere."""
        return {
            "model": f"models/{self.trained.folder.name}{f'/{UNTRAINED}' if self.untrained else ''}",
            "training": without_paths(self.trained.fields),
            "processor": dict(self.processor),
            "embedding": self.options(),
        }


Row = Run | Reference


def without_paths(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Training fields for publication: this machine's folders mean nothing elsewhere."""
    return {name: value for name, value in fields.items() if name not in ("slides", "corpus", "gene_table")}


# ---------------------------------------------------------------------------- the grid


def read_grid(
    path: Path, training: Mapping[str, Any], models: Path, scoring: Mapping[str, Any]
) -> tuple[list[Run], str]:
    """The runs of a grid, in its order, and the key of its base.

    Args:
        training: fields that take the place of the grid's own base. models: folder for trained variants.
        scoring: everything that decides a row's numbers beside the row: how it is scored, and on which slides.

    Raises:
        ValueError: a grid of another form, or fields that do not exist; names the variant. OSError: a missing file.
    """
    grid = _checked_grid(path)
    base = {name: dict(grid.get(name) or {}) for name in SECTIONS}
    base["training"] |= training
    runs = []
    for factor, told in {BASE: {"variants": {BASE: {}}}, **grid["factors"]}.items():
        for variant, overrides in told["variants"].items():
            overrides = overrides or {}
            fields = {name: {**base[name], **(overrides.get(name) or {})} for name in SECTIONS}
            place = factor, str(variant), str(told.get("unit", ""))
            try:
                runs.append(_make_run(place, fields, overrides.get(UNTRAINED, False), models, scoring))
            except (ValueError, OSError) as error:
                raise ValueError(f"{path.name}, {factor}: {variant}: {error}") from error
    return runs[1:], runs[0].key


def references(names: Sequence[str], scoring: Mapping[str, Any], seed: int) -> list[Reference]:
    """Rows of features that cost nothing, each after the means over the squares of `BASELINE_RADII`.

    Args:
        names: any of `BASELINES`. scoring: as of `read_grid`. seed: of principal components and shuffled counts.
    """
    methods = {method.name: method for method in baseline_methods(seed)}
    rows = []
    for name in dict.fromkeys(names):
        for radius in BASELINE_RADII:
            method = after_mean(methods[BASELINES[name]], radius)
            rows.append(Reference(BASELINE, method.name, "", method, _key(BASELINE, BASELINES[name], radius, scoring)))
    return rows


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
    if BASELINE in grid["factors"]:
        raise ValueError(f"{path.name} has a factor {BASELINE!r}, which is how rows without a model are called.")
    for factor, told in grid["factors"].items():
        if not isinstance(told, dict) or not isinstance(told.get("variants"), dict) or set(told) - {"unit", "variants"}:
            raise ValueError(f"{path.name}, {factor}: expected variants, by name, and perhaps their unit.")
        for variant, overrides in told["variants"].items():
            known = (*SECTIONS, UNTRAINED)
            wrong = sorted(set(overrides or {}) - set(known))
            if wrong:
                raise ValueError(f"{path.name}, {factor}: {variant} overrides {wrong}: expected any of {known}.")
            if not isinstance((overrides or {}).get(UNTRAINED, False), bool):
                told = f"{UNTRAINED} is {overrides[UNTRAINED]!r}"
                raise ValueError(f"{path.name}, {factor}: {variant}: {told}: expected true or false.")
    return grid


def _make_run(
    place: tuple[str, str, str],
    fields: Mapping[str, dict],
    untrained: bool,
    models: Path,
    scoring: Mapping[str, Any],
) -> Run:
    unknown = sorted(set(fields["processor"]) - set(PROCESSOR_OPTIONS))
    if unknown:
        raise ValueError(f"Processor options {unknown} cannot be varied: expected any of {PROCESSOR_OPTIONS}.")
    trained = make_variant(fields["training"], models)
    run = Run(*place, trained, fields["processor"], fields["embedding"], untrained)
    return replace(run, key=_key(trained.folder.name, untrained, fields["processor"], run.options(), scoring))


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------- a row


def evaluate_run(
    run: Run,
    plans: Sequence[Plan],
    protocol: Protocol,
    log: ScoreLog,
    cache: Path,
    control: bool = False,
    batch_size: int = 32,
    device: str | None = None,
) -> dict[str, Any]:
    """The scores of a run whose variant is trained; what `cache` and `log` hold is not computed anew.

    Args:
        control: whether to score the slides with their counts shuffled over their spots, too.

    Returns:
        `trained` (steps, windows and spots seen), `too_small` (slides into which its windows do not fit) and `scores`:
        a record for every cell of `score_all`, with whether counts were `shuffled` instead of the features' name.
    """
    processor = STPatchProcessor.from_pretrained(run.folder, **run.processor)
    model = STImageMAEModel.from_pretrained(run.folder).eval()
    saw, told = load_pretraining(run.trained.folder)
    # At step 0 only gene vectors that start as singular vectors come from slides.
    learnt = not run.untrained or told["singular_start"]
    embedder = EncoderEmbedder(
        run.variant,
        model,
        processor,
        saw,
        learnt,
        given=run.embedding,
        device=device,
        seed=protocol.seed,
        batch_size=batch_size,
    )
    scores = score_method(written_method(embedder, cache), plans, protocol, log, control)
    slides = [slide for plan in plans for slide in plan.slides.values()]
    too_small = [slide.name for slide in slides if embedder.is_smaller_than_window(slide)]
    budget = {name: 0 if run.untrained else told[name] for name in BUDGET}
    return {"trained": budget, "too_small": too_small, "scores": scores}


def evaluate_reference(
    row: Reference, plans: Sequence[Plan], protocol: Protocol, log: ScoreLog, control: bool = False
) -> dict[str, Any]:
    """The same of a row without a model; `trained` tells None."""
    scores = score_method(row.method, plans, protocol, log, control)
    return {"trained": dict.fromkeys(BUDGET), "too_small": [], "scores": scores}


def score_method(
    method: Method, plans: Sequence[Plan], protocol: Protocol, log: ScoreLog, control: bool
) -> list[dict[str, Any]]:
    """The records of `evaluate_run`."""
    control_row = [on_shuffled_counts(method, protocol.seed)] if control else []
    records = score_all(plans, [method, *control_row], protocol, log)
    return [
        {**{key: value for key, value in record.items() if key != "features"}, "shuffled": name != method.name}
        for record in records
        for name in [record["features"]]
    ]


def windows_to_read(run: Run, slides: Sequence[EvaluationSlide]) -> int:
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
