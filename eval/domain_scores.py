"""The cells of the domain detection table: its splits, and the score of every method, smoothing and probe."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from data_processing.slide_fingerprint import SAME_SPOTS, fingerprint, similarity
from data_processing.splits import (
    Split,
    Transfer,
    block_splits,
    encode_labels,
    spot_splits,
    transfer_splits,
    transfers,
)
from eval.baselines.expression import NUM_GENES
from eval.clustering import CLUSTERINGS
from eval.evaluation_sets import EvaluationSet, EvaluationSlide
from eval.features import Method, smoothed
from eval.probes import PROBES, check_neighbours, score
from eval.resumable import ScoreLog, content_key
from eval.scoring import cluster_scores
from modeling_stimg import GeneVocabulary
from modeling_stimg.genes_stimg import SlideGenes

SPLITS = ("spots", "blocks", "slides")
UNSUPERVISED = "no labels"
SCORES_FORMAT = 1  # raised when a probe or a clustering gives other scores for the same features


@dataclass(frozen=True)
class Protocol:
    """How to score; see the fields of `DomainDetectionArguments`.

    Raises:
        ValueError: an unknown probe, split or clustering, or a radius that is none.
    """

    splits: tuple[str, ...] = SPLITS
    probes: tuple[str, ...] = tuple(PROBES)
    clusterings: tuple[str, ...] = tuple(CLUSTERINGS)
    num_splits: int = 10
    train_share: float = 0.2
    tile_side: int = 6
    max_train_spots: int = 1000
    mlp_epochs: int = 800
    smoothings: tuple[int, ...] = (0, 1, 2, 3)
    mlp_smoothings: tuple[int, ...] = (0,)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("probes", PROBES), ("splits", SPLITS), ("clusterings", CLUSTERINGS)):
            unknown = sorted(set(getattr(self, name)) - set(known))
            if unknown:
                or_none = ", or none" if name == "clusterings" else ""
                raise ValueError(f"Unknown {name} {unknown}: expected any of {list(known)}{or_none}.")
        if not self.smoothings or min((*self.smoothings, *self.mlp_smoothings)) < 0:
            told = f"smoothings are {list(self.smoothings)}, of the MLP {list(self.mlp_smoothings)}"
            raise ValueError(f"{told}: expected radii in sites, from 0.")

    def told(self) -> dict[str, Any]:
        """For `results.json`."""
        return dataclasses.asdict(self)

    def probes_at(self, radius: int) -> list[str]:
        """The probes to train on features after a mean of this radius."""
        return [probe for probe in self.probes if probe != "mlp" or radius in self.mlp_smoothings]

    def radii(self, method: Method) -> tuple[int, ...]:
        """The means to take of a method's features."""
        return self.smoothings if method.smoothed else (0,)


@dataclass(frozen=True)
class AcrossSlides:
    """A slide to test on, with the splits of the training slides' spots followed by its own."""

    transfer: Transfer
    codes: np.ndarray = field(repr=False)
    splits: list[Split] = field(repr=False)
    dropped: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Plan:
    """All splits of one set, made before any feature is computed.

    Attributes:
        name: of the set. slides: by name. within: by slide that is tested, by kind of split. across: one a slide that
            can be tested.
        same_spots: pairs of sections that share spots. notes: what a reader has to know, a sentence each.
    """

    name: str
    slides: dict[str, EvaluationSlide]
    within: dict[str, dict[str, list[Split]]] = field(repr=False)
    across: list[AcrossSlides] = field(repr=False)
    same_spots: list[tuple[str, str]]
    notes: list[str]

    def told(self) -> dict[str, Any]:
        """For `results.json`."""
        slides = {
            name: {
                "patient": s.patient,
                "spots": len(s.codes),
                "labelled": int((s.codes >= 0).sum()),
                "classes": s.classes,
            }
            for name, s in self.slides.items()
        }
        across = [{**dataclasses.asdict(one.transfer), "dropped": one.dropped} for one in self.across]
        return {"slides": slides, "across_slides": across, "same_spots": self.same_spots, "notes": self.notes}


def plan_set(evaluation_set: EvaluationSet, protocol: Protocol, tested: Collection[str] = ()) -> Plan:
    """The splits of a set.

    Args:
        tested: slides to score on, all where none is named; the others only train, where slides are told apart.

    Raises:
        ValueError: a slide that cannot be split; the sentence names it.
    """
    slides = evaluation_set.slides
    chosen = [name for name in slides if not tested or name in tested]
    within = {name: _splits_within(slides[name], protocol) for name in chosen}
    same_spots, unknown = _same_spots(slides)
    notes = [f"{a} and {b} share spots: they are one piece of evidence rather than two." for a, b in same_spots]
    notes += [
        f"{a} and {b} name their genes in different ways, by id and by symbol: whether they share spots is not known."
        for a, b in unknown
    ]
    across: list[AcrossSlides] = []
    if "slides" in protocol.splits:
        patients = {name: slide.patient for name, slide in slides.items()}
        possible = transfers(patients, {frozenset(pair) for pair in same_spots})
        for name in [name for name in chosen if name not in {transfer.test for transfer in possible}]:
            notes.append(f"{name}: no other slide of {evaluation_set.name} to train on, so no split across slides.")
        for transfer in [transfer for transfer in possible if transfer.test in chosen]:
            found, sentences = _splits_across(transfer, slides, protocol)
            across += found
            notes += sentences
    return Plan(evaluation_set.name, slides, within, across, same_spots, notes)


def score_all(plans: Sequence[Plan], methods: Sequence[Method], protocol: Protocol, log: ScoreLog) -> list[dict]:
    """A record for every cell, in the order of sets, methods, splits, slides, smoothings and probes."""
    records = []
    total = sum(_num_cells(plan, method, protocol) for plan in plans for method in methods)
    with tqdm(total=total, desc="scores") as bar:
        for plan in plans:
            for method in methods:
                for record in _cells(plan, method, protocol, log):
                    bar.set_postfix_str(f"{record['set']}, {record['features']}, {record['split']}", refresh=False)
                    bar.update()
                    records.append(record)
    return records


# ---------------------------------------------------------------- plan


def _splits_within(slide: EvaluationSlide, protocol: Protocol) -> dict[str, list[Split]]:
    common = (protocol.num_splits, protocol.train_share, protocol.seed)
    splits: dict[str, list[Split]] = {}
    try:
        if "spots" in protocol.splits:
            splits["spots"] = spot_splits(slide.codes, *common)
            check_neighbours(len(splits["spots"][0][0]), protocol.probes)
        if "blocks" in protocol.splits:
            splits["blocks"] = block_splits(slide.codes, slide.rows, slide.cols, *common, side=protocol.tile_side)
    except ValueError as error:
        raise ValueError(f"{slide.name}: {error}") from error
    return splits


def _splits_across(
    transfer: Transfer, slides: dict[str, EvaluationSlide], protocol: Protocol
) -> tuple[list[AcrossSlides], list[str]]:
    """The splits of one transfer, none where it cannot be made, and what to say of it."""
    training = np.concatenate([slides[name].labels for name in transfer.training])
    test = slides[transfer.test].labels
    measured = [slides[name].adata.var_names for name in (*transfer.training, transfer.test)]
    num_shared = len(set.intersection(*(set(map(str, genes)) for genes in measured)))
    if num_shared == 0:
        trained_on = ", ".join(transfer.training)
        reason = f"it and the slides to train on ({trained_on}) have no gene of one name in common"
        return [], [f"{transfer.test}: no split across slides, because {reason}."]
    try:
        splits, dropped = transfer_splits(training, test, protocol.num_splits, protocol.max_train_spots, protocol.seed)
    except ValueError as error:
        return [], [f"{transfer.test}: no split across slides, because {error}."]
    codes, _ = encode_labels(np.concatenate([training, test]))
    start = f"{transfer.test}: trained on {transfer.trained_on}, {', '.join(transfer.training)}"
    counts = [
        f"{sum(classes.values())} {side} spots of {', '.join(classes)}" for side, classes in dropped.items() if classes
    ]
    left_out = f"; left out, sharing spots with it: {', '.join(transfer.left_out)}" if transfer.left_out else ""
    dropped_note = f"; dropped, because the other side lacks the class: {' and '.join(counts)}" if counts else ""
    few = f"; all of them have only {num_shared} gene(s) in common" if num_shared < NUM_GENES else ""
    return [AcrossSlides(transfer, codes, splits, dropped)], [f"{start}{left_out}{few}{dropped_note}."]


Pairs = list[tuple[str, str]]


def _same_spots(slides: dict[str, EvaluationSlide]) -> tuple[Pairs, Pairs]:
    """Pairs of slides that hold the same spots in part, told from their counts; and pairs that cannot be compared."""
    # Without a gene table, slides that name genes by Ensembl id and by symbol have no common vocabulary.
    kinds = {name: SlideGenes.of(slide.adata).by_id for name, slide in slides.items()}
    same: Pairs = []
    for by_id in (True, False):
        alike = {name: slide.adata for name, slide in slides.items() if kinds[name] == by_id}
        if len(alike) > 1:
            vocabulary = GeneVocabulary.from_slides(alike.values())
            prints = [fingerprint(adata, vocabulary, name) for name, adata in alike.items()]
            shares = {(a.name, b.name): similarity(a, b).spots for a, b in combinations(prints, 2)}
            same += [pair for pair, share in shares.items() if share is not None and share >= SAME_SPOTS]
    return same, [(a, b) for a, b in combinations(slides, 2) if kinds[a] != kinds[b]]


# ---------------------------------------------------------------- score


def _num_cells(plan: Plan, method: Method, protocol: Protocol) -> int:
    num_kinds = sum(len(kinds) for kinds in plan.within.values()) + len(plan.across)
    probes = sum(len(protocol.probes_at(radius)) for radius in protocol.radii(method))
    return num_kinds * probes + len(plan.within) * len(protocol.clusterings) * len(protocol.radii(method))


def _cells(plan: Plan, method: Method, protocol: Protocol, log: ScoreLog) -> Iterator[dict[str, Any]]:
    for name, splits_of_kinds in plan.within.items():
        slide = plan.slides[name]
        features = method.within(slide)
        about = {"set": plan.name, "slide": name, "features": method.name}
        seen = method.seen(slide)
        about |= {} if seen is None else {"seen": seen}
        for radius in protocol.radii(method):
            means = smoothed(features, slide, radius)
            for kind, splits in splits_of_kinds.items():
                for probe in protocol.probes_at(radius):
                    scores = _probe_scores(probe, means, slide.codes, splits, protocol, log)
                    yield {**about, "split": kind, "smoothing": radius, "probe": probe, **scores}
            for clustering in protocol.clusterings:
                scores = _cluster_scores(clustering, means, slide, protocol.seed, log)
                yield {**about, "split": UNSUPERVISED, "smoothing": radius, "probe": clustering, **scores}
    for one in plan.across:
        training, test = [plan.slides[name] for name in one.transfer.training], plan.slides[one.transfer.test]
        features = method.on_slides(training, test)
        about = {"set": plan.name, "slide": test.name, "features": method.name}
        seen = method.seen(test)
        about |= {} if seen is None else {"seen": seen}
        for radius in protocol.radii(method):
            parts = [smoothed(f, s, radius) for f, s in zip(features, [*training, test], strict=True)]
            means = np.concatenate(parts)
            for probe in protocol.probes_at(radius):
                scores = _probe_scores(probe, means, one.codes, one.splits, protocol, log)
                trained_on = {"trained_on": one.transfer.trained_on}
                yield {**about, "split": "slides", **trained_on, "smoothing": radius, "probe": probe, **scores}


def _probe_scores(
    name: str, features: np.ndarray, codes: np.ndarray, splits: list[Split], protocol: Protocol, log: ScoreLog
) -> dict[str, Any]:
    probe, options = PROBES[name], ()
    if name == "mlp":
        probe, options = partial(probe, epochs=protocol.mlp_epochs), (protocol.mlp_epochs,)

    def compute() -> dict[str, Any]:
        found = score(codes, probe(features, codes, splits, protocol.seed), splits)
        values = {}
        for metric, (mean, deviation) in found.items():
            values |= {metric: mean, f"{metric}_sd": deviation}
        return values

    sizes = [len(train) for train, _ in splits]
    key = content_key(SCORES_FORMAT, name, features, codes, splits, protocol.seed, *options)
    return {**log.get(key, compute), "num_splits": len(splits), "num_train": float(np.mean(sizes))}


def _cluster_scores(
    name: str, features: np.ndarray, slide: EvaluationSlide, seed: int, log: ScoreLog
) -> dict[str, Any]:
    """All spots are clustered, the labelled ones scored."""

    def compute() -> dict[str, Any]:
        clusters = CLUSTERINGS[name](features, len(slide.classes), seed)
        labelled = slide.codes >= 0
        found = cluster_scores(clusters[labelled], slide.codes[labelled])
        return {**found, "num_clusters": int(clusters.max()) + 1}

    return log.get(content_key(SCORES_FORMAT, name, features, slide.codes, seed), compute)
