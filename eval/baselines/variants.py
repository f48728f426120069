"""Variants of the model, trained to be compared with: each in a folder that is named after what decides its weights."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from data_processing.corpus import find_slides
from data_processing.window_dataset import windows_per_epoch
from data_processing.writing import write_whole
from modeling_stimg.sample_units_stimg import spots_of_samples
from train import run_pretrain
from train.arguments import CorpusArguments, ModelArguments, PretrainingArguments, ProbeArguments, parse_arguments
from train.checkpoints import checkpoint_folders, checkpoint_step, remove_checkpoints
from train.provenance import DECIDING

# Where it goes and from where it would go on: the folder is given by the content.
_NOT_A_VARIANTS = {"output_dir", "resume", "push_to_hub", "hub_model_id", "init_from"}
_BUDGET = ("max_spots", "max_steps", "num_train_epochs")


@dataclass(frozen=True)
class Variant:
    """A training to be done, or done.

    Attributes:
        fields: of `train/run_pretrain.py`, as far as they are given. folder: where the model is or will be.
        window_size: of the model. least_windows: how many windows the training draws at least; None where that is told
            by the slides. num_channels, mask_unit, compaction, gene_selection, sample_unit, projection_size,
            embedding_defaults: of the model too.
    """

    fields: Mapping[str, Any]
    folder: Path
    window_size: int
    num_channels: int
    mask_unit: str
    compaction: str
    gene_selection: str
    sample_unit: str
    projection_size: int
    embedding_defaults: Mapping[str, Any] | None
    least_windows: int | None

    @property
    def finished(self) -> bool:
        """Whether the model is there; a training writes it last."""
        return (self.folder / "model.safetensors").exists()

    @property
    def status(self) -> str:
        """Trained, to train, or where it goes on."""
        if self.finished:
            return "trained"
        started = checkpoint_folders(self.folder)
        return f"goes on from step {checkpoint_step(started[-1])}" if started else "to train"


def make_variant(fields: Mapping[str, Any], models: Path) -> Variant:
    """The variant of some fields of `train/run_pretrain.py`; those that are not given have their defaults there.

    Its folder in `models` is named by a fingerprint of all fields that decide the weights, given or not, and of the
    slides' content: whatever is changed, a folder holds one training.

    Raises:
        ValueError: fields that do not exist, or that a variant does not choose. OSError: slides that are not there.
    """
    types = (CorpusArguments, ModelArguments, ProbeArguments, PretrainingArguments)
    known = {f.name for part in types for f in dataclasses.fields(part) if f.init} - _NOT_A_VARIANTS
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(
            f"Training fields {unknown} cannot be varied: expected fields of train/run_pretrain.py, other than "
            f"{', '.join(sorted(_NOT_A_VARIANTS))}; see its --help."
        )
    corpus, model, training = _parse(fields)
    run_pretrain.check_arguments(corpus, training)
    told = {
        **{k: v for k, v in dataclasses.asdict(corpus).items() if k not in ("slides", "corpus", "gene_table")},
        **dataclasses.asdict(model),
        **{k: v for k, v in training.to_dict().items() if k in DECIDING},
        **{name: getattr(training, name) for name in _BUDGET},
        "windows_a_step": training.windows_a_step,
        "content": content_sha256(_sources(corpus)),
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return Variant(
        fields=dict(fields),
        folder=models / digest[:12],
        window_size=model.window_size,
        num_channels=model.num_channels,
        mask_unit=model.mask_unit,
        compaction=corpus.compaction,
        gene_selection=corpus.gene_selection,
        sample_unit=model.sample_unit,
        projection_size=model.projection_size,
        embedding_defaults=model.embedding_defaults,
        least_windows=_least_windows(corpus, model, training),
    )


def train_variant(variant: Variant) -> None:
    """Train a variant to its end, on from where an earlier call was interrupted; nothing to do where it is finished."""
    if variant.finished:
        return
    variant.folder.parent.mkdir(parents=True, exist_ok=True)
    config = variant.folder.with_suffix(".yaml")
    write_whole(config, yaml.safe_dump(dict(variant.fields), allow_unicode=True).encode())
    threads = torch.get_num_threads()
    try:
        run_pretrain.main(["--config", str(config), "--output_dir", str(variant.folder)])
    finally:
        torch.set_num_threads(threads)  # what follows gives the same bits whether it was trained now or before
    remove_checkpoints(variant.folder)  # the states of dozens of optimisers; nobody goes on from them


def content_sha256(paths: Iterable[Path]) -> str:
    """Fingerprint of names and content of files, and of the files in folders."""
    digest = hashlib.sha256()
    for path in paths:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            inside = file.relative_to(path).as_posix() if path.is_dir() else ""
            status = file.stat()
            content = _file_sha256(file, status.st_size, status.st_mtime_ns)
            digest.update(f"{path.name}\t{inside}\t{content}\n".encode())
    return digest.hexdigest()


@cache
def _file_sha256(file: Path, size: int, changed: int) -> str:
    """Of a file's content, read once for all variants as long as size and time of change stay."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _parse(fields: Mapping[str, Any]) -> tuple[CorpusArguments, ModelArguments, PretrainingArguments]:
    """All fields with their defaults, as the training will see them."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "variant.yaml"
        config.write_text(yaml.safe_dump(dict(fields)), encoding="utf-8")
        complaint = io.StringIO()
        try:
            with contextlib.redirect_stderr(complaint):
                corpus, model, _, training = parse_arguments(["--config", str(config), "--output_dir", folder])
        except SystemExit as error:
            *_, last = complaint.getvalue().strip().splitlines() or ["no reason given"]
            raise ValueError(f"The training fields are refused ({last.split('error: ')[-1]}).") from error
    return corpus, model, training


def _sources(corpus: CorpusArguments) -> list[Path]:
    """What a training reads, except the rows of a corpus: what describes these stands for them."""
    table = [] if corpus.gene_table is None else [Path(os.path.expanduser(os.path.expandvars(corpus.gene_table)))]
    if corpus.corpus is None:
        return [*find_slides(corpus.slides, corpus.exclude), *table]
    from data_processing.open_corpus import find_corpus

    folder = find_corpus(corpus.corpus).folder
    described = [folder / "corpus.json", folder / "genes.json"]
    missing = [path for path in described if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} holds no {missing[0].name}: expected a corpus, built to its end.")
    return described


def _least_windows(corpus: CorpusArguments, model: ModelArguments, training: PretrainingArguments) -> int | None:
    sizes = corpus.window_sizes or [model.window_size]
    if training.max_spots is not None:
        spots = [spots_of_samples(model.sample_unit, size) for size in sizes]
        return None if None in spots else -(-training.max_spots * len(spots) // sum(spots))
    if training.max_steps > 0:
        return training.max_steps * training.windows_a_step
    if corpus.corpus is None:
        return None
    from data_processing.open_corpus import Corpus, find_corpus
    from modeling_stimg import STPatchProcessor

    built = Corpus(find_corpus(corpus.corpus).folder)
    images = built.images(STPatchProcessor(built.vocabulary))  # none of them is opened
    return round(training.num_train_epochs * windows_per_epoch(images, sizes, corpus.coverage, model.sample_unit))
