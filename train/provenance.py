"""What is told of a run, to readers of its model and to the run itself when it goes on."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_processing.corpus import SlideRecord
from data_processing.window_dataset import WindowDataset
from modeling_stimg import STImageMAEForPreTraining
from train.arguments import CorpusArguments, ModelArguments, PretrainingArguments
from train.callbacks import ProbeSlide
from train.continuing import Parent
from train.model_card import CardFacts
from train.preparing import Prepared

# What of the training arguments decides the result, beside the slides, the model and the windows of a step.
DECIDING = (
    *("seed", "max_steps", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim"),
    *("optim_args", "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "bf16", "fp16"),
)


def told_arguments(
    corpus: CorpusArguments,
    model: ModelArguments,
    training: PretrainingArguments,
    num_windows: int,
    num_spots_seen: int,
) -> dict[str, Any]:
    """What a reader of the checkpoint should know of its training; no paths, which mean nothing elsewhere.

    Args:
        num_windows: of the whole training. num_spots_seen: in these windows, repetitions counted.
    """
    paths = {"slides", "corpus", "gene_table", "init_from"}
    fields = {**dataclasses.asdict(corpus), **dataclasses.asdict(model)}
    return {
        **{k: v for k, v in fields.items() if k not in paths},
        **{k: v for k, v in training.to_dict().items() if k in DECIDING},
        "num_windows": num_windows,
        "num_spots_seen": num_spots_seen,
    }


class Progress:
    """How much of its budget a run has spent.

    Args:
        windows: all of the run. windows_a_step: of all processes and accumulation steps.
    """

    def __init__(self, windows: WindowDataset, windows_a_step: int):
        self.windows, self.windows_a_step = windows, windows_a_step
        self._counted = (0, 0)  # windows, and spots in them: each is counted once

    def arguments(self, arguments: dict[str, Any], step: int) -> dict[str, Any]:
        """What `told_arguments` tells, after so many steps: the windows and spots are those seen until then."""
        start, spots = self._counted
        stop = min(step * self.windows_a_step, len(self.windows))
        if stop == len(self.windows):
            return arguments
        if stop < start:
            start, spots = 0, 0
        spots += int(self.windows.spots_of_items(start, stop).sum())
        self._counted = (stop, spots)
        return {**arguments, "steps_done": step, "num_windows": stop, "num_spots_seen": spots}


def deciding_arguments(
    corpus: CorpusArguments,
    model: ModelArguments,
    training: PretrainingArguments,
    data: Prepared,
    parent: Parent | None,
) -> dict[str, Any]:
    """What the weights depend on. How the windows of a step are spread over processes is not among it."""
    # Paths say nothing of their content, which is told below; these say how much to train, which max_steps tells.
    left_out = {"slides", "corpus", "gene_table", "exclude", "coverage", "validation_slides", "validation_windows"}
    fields = {**dataclasses.asdict(corpus), **model.config_fields()}
    return {
        **{k: v for k, v in fields.items() if k not in left_out},
        **{k: v for k, v in training.to_dict().items() if k in DECIDING},
        "singular_start": model.singular_start,
        "vector_smoothing": model.vector_smoothing,
        "freeze_gene_embeddings": model.freeze_gene_embeddings,
        "init_from": None if parent is None else parent.sha256,
        "windows_a_step": training.windows_a_step,
        "training_slides": [[record.name, record.num_spots] for record in data.records],
        "genes": data.processor.vocabulary.ids_sha256,
    }


def lineage(data: Prepared, parent: Parent | None) -> tuple[list[SlideRecord], dict[str, Any]]:
    """Every slide that the model saw, a parent's among them, and what else `pretraining.json` tells of slides."""
    own = {record.name for record in data.records}
    inherited = [] if parent is None else [record for record in parent.seen if record.name not in own]
    told: dict[str, Any] = {"validation_slides": [dataclasses.asdict(record) for record in data.held_out_records]}
    if data.corpus is not None:
        told["corpus"] = data.corpus
    if parent is not None:
        slides = None if parent.slides is None else [record.name for record in parent.slides]
        told["parent"] = {"name": parent.name, "slides": slides}
    return [*data.records, *inherited], told


def training_cost(training: PretrainingArguments, log_history: Sequence[dict[str, Any]], first_step: int) -> dict:
    """What the run took, for `pretraining.json`: seconds of so many of its steps, and on what.

    Args:
        first_step: that this process began with; what an interrupted one took before is not known.
    """
    seconds = [entry["train_runtime"] for entry in log_history if "train_runtime" in entry]
    device = training.device
    return {
        "seconds": seconds[-1] if seconds else None,
        "steps": training.max_steps - first_step if seconds else None,
        "processes": training.world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def card_facts(
    training: PretrainingArguments,
    model: STImageMAEForPreTraining,
    data: Prepared,
    probe_slides: Sequence[ProbeSlide],
    parent: Parent | None,
    arguments: dict[str, Any],
) -> CardFacts:
    """What the model card tells of a run before it starts."""
    return CardFacts(
        name=training.hub_model_id or Path(training.output_dir).name,
        config=model.config,
        processor=data.processor,
        num_parameters=sum(p.numel() for p in model.parameters()),
        records=data.records,
        held_out=data.held_out_records,
        probed=[slide.image.name for slide in probe_slides],
        parent=None if parent is None else (parent.name, parent.slides),
        arguments=arguments,
        corpus=data.corpus,
    )
