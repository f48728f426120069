"""Arguments of pretraining: dataclasses, filled from a YAML file and the command line."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import logging

from modeling_stimg.host import multiplies_bfloat16
from train.continuing import check_agrees, parent_fields

logger = logging.get_logger("stimg")


@dataclass
class CorpusArguments:
    """Which slides to learn from, and how they become windows."""

    slides: list[str] = field(
        default_factory=list,
        metadata={"help": "Slides: files, Space Ranger folders or globs; $VARIABLES are expanded."},
    )
    corpus: str | None = field(
        default=None,
        metadata={
            "help": "Instead of slides: a folder that data_processing/build_corpus.py wrote, or such a dataset on the "
            "Hub (ORG/NAME, ORG/NAME@REVISION)."
        },
    )
    exclude: list[str] = field(
        default_factory=list,
        metadata={"help": "Slide names (file names without suffix) to leave out, e.g. those of an evaluation."},
    )
    gene_table: str | None = field(
        default=None,
        metadata={"help": "TSV with gene_id and gene_name; needed when slides mix Ensembl ids and symbols."},
    )
    compaction: str = field(
        default="lattice", metadata={"help": "How array indices become a grid: lattice, rank or minmax."}
    )
    gene_selection: str = field(
        default="weighted", metadata={"help": "How a window's genes are drawn: weighted, variable, random or slide."}
    )
    normalization: str = field(
        default="log1p",
        metadata={
            "help": "log1p values, or standardized ones (per gene, corpus mean and deviation), or centered ones (the "
            "slide's own mean, corpus deviation)."
        },
    )
    target_sum: str = field(
        default="10000",
        metadata={
            "help": "Counts per spot after depth normalisation; low values tell depth and biology better apart. Or "
            "panel: 10,000 times the share of all counts that the corpus expects from the genes measured on a slide."
        },
    )
    min_observed: float = field(
        default=0.2, metadata={"help": "Share of a training window's sites that should hold a spot."}
    )
    coverage: float = field(
        default=2.0, metadata={"help": "How often an epoch covers every spot on average; sets windows per epoch."}
    )
    window_sizes: list[int] = field(
        default_factory=list,
        metadata={"help": "Sides to draw windows with instead of window_size, equally often, one side a step."},
    )
    validation_slides: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Slides to hold out and compute eval_loss on: names among those given, or one share such as 0.1, "
            "drawn by seed, all slides of a patient together. They are left out of training windows, of the "
            "vocabulary, of gene statistics and of the singular start; a corpus, though, keeps the statistics and "
            "vectors that it was built with, which are those of all its slides."
        },
    )
    validation_windows: int = field(
        default=256, metadata={"help": "Windows of the held-out slides, the same at every evaluation and in every run."}
    )

    def __post_init__(self) -> None:
        if self.target_sum != "panel":
            try:
                self.target_sum = float(self.target_sum)
            except ValueError as error:
                raise ValueError(f"target_sum is {self.target_sum!r}: expected a number or panel.") from error


@dataclass
class ModelArguments:
    """Architecture and objective; see STImageMAEConfig."""

    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Go on from a model, a folder or Hub id (ORG/NAME, ORG/NAME@REVISION): its weights, architecture, "
            "gene statistics and values. Genes that it does not know get new rows; fields that are not given are its "
            "own."
        },
    )
    window_size: int = field(default=16, metadata={"help": "Side of a window, in sites."})
    num_channels: int = field(default=512, metadata={"help": "Genes of a window."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the encoder and of gene embeddings."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Layers of the encoder."})
    num_attention_heads: int = field(default=8, metadata={"help": "Attention heads of the encoder."})
    intermediate_size: int = field(default=1024, metadata={"help": "Feed-forward width of the encoder."})
    decoder_hidden_size: int = field(default=128, metadata={"help": "Width of the decoder."})
    decoder_num_hidden_layers: int = field(default=2, metadata={"help": "Layers of the decoder."})
    decoder_num_attention_heads: int = field(default=8, metadata={"help": "Attention heads of the decoder."})
    decoder_intermediate_size: int = field(default=512, metadata={"help": "Feed-forward width of the decoder."})
    hidden_dropout_prob: float = field(default=0.0, metadata={"help": "Dropout after attention and feed-forward."})
    mask_ratio: float = field(default=0.3, metadata={"help": "Share of entries (or sites) that is hidden."})
    mask_unit: str = field(default="entry", metadata={"help": "What is hidden: entry, site or mixed."})
    sample_unit: str = field(
        default="patch",
        metadata={
            "help": "Which sites make a sample: patch, a window; and for comparison spot, one site; multi_spot, a spot "
            "and its 16 nearest; slice, the whole slide. An epoch is the same number of spots with all of them."
        },
    )
    reconstruction: str = field(
        default="product",
        metadata={
            "help": "How a masked entry is predicted: product, of site and gene (Eq. 8); or residual, that plus the "
            "mean of the gene's visible values at other sites, weighted by attention."
        },
    )
    target_smoothing: int = field(
        default=0,
        metadata={"help": "Radius in sites of the mean that is predicted of a masked entry; 0 = its own value."},
    )
    position_embedding_type: str = field(
        default="window",
        metadata={"help": "Positions of sites: within the window or on the slide, added to them; or rotary, relative."},
    )
    singular_start: bool = field(
        default=True,
        metadata={"help": "Start gene embeddings from the singular vectors of the corpus instead of at random."},
    )
    vector_smoothing: int = field(
        default=0,
        metadata={
            "help": "Radius in sites of the means over neighbours whose singular vectors they are; 0 = single spots."
        },
    )
    freeze_gene_embeddings: bool = field(
        default=False,
        metadata={"help": "Keep gene embeddings at their start: a small corpus updates each too rarely to improve it."},
    )
    projection_size: int = field(
        default=0,
        metadata={
            "help": "Width of a projection of the encoder's outputs for embed_slide, fitted on the slides after the "
            "training so that what differs between neighbours counts little; 0 = none."
        },
    )
    embedding_defaults: dict | str | None = field(
        default=None, metadata={"help": "What embed_slide does when not told: a mapping (JSON on the command line)."}
    )

    def config_fields(self) -> dict[str, Any]:
        """The fields that belong to STImageMAEConfig."""
        ours = {"init_from", "singular_start", "vector_smoothing", "freeze_gene_embeddings"}
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in ours}

    def __post_init__(self) -> None:
        if isinstance(self.embedding_defaults, str):
            self.embedding_defaults = json.loads(self.embedding_defaults)


@dataclass
class ProbeArguments:
    """Labelled slides on which the embedding is watched while it is trained; nothing is learnt from them."""

    probe_slides: list[str] = field(
        default_factory=list,
        metadata={"help": "Labelled slides to embed now and then: files or globs; $VARIABLES are expanded."},
    )
    probe_label_key: str = field(default="label", metadata={"help": "Column of their obs with the domains."})
    probe_unlabelled: list[str] = field(
        default_factory=lambda: ["undetermined", "WH"],
        metadata={"help": "Labels that are no class, beside missing ones."},
    )
    probe_steps: int = field(
        default=500,
        metadata={"help": "Steps between two probes: ARI of a 10-NN probe on 20/80 splits; one more at the end."},
    )

    def __post_init__(self) -> None:
        if self.probe_steps < 1:
            raise ValueError(f"probe_steps is {self.probe_steps}: expected a whole number from 1.")


@dataclass
class PretrainingArguments(TrainingArguments):
    """Hugging Face training arguments with defaults for this model; `max_steps` and `max_spots` win over epochs."""

    output_dir: str | None = field(default="runs/pretrain", metadata={"help": "Where checkpoints and the model go."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up: steps, or below 1 a share of all steps."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Windows a device and step."})
    num_train_epochs: float = field(default=40.0, metadata={"help": "Epochs; an epoch is `coverage` of the corpus."})
    max_spots: int | None = field(
        default=None,
        metadata={
            "help": "Train until this many spots have stood in windows, repetitions counted, instead of for epochs or "
            "steps: the same budget for all sample units."
        },
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: windows are dicts."})
    train_sampling_strategy: str = field(
        default="sequential", metadata={"help": "Windows are drawn independently, so their order needs no shuffling."}
    )
    num_cpu_threads: int | None = field(
        default=None, metadata={"help": "Threads of a process on CPUs; default: the machine's cores, shared evenly."}
    )
    report_to: str = field(default="none", metadata={"help": "Where to log, e.g. tensorboard."})
    resume: bool = field(
        default=True,
        metadata={
            "help": "Go on from the last whole checkpoint in output_dir, with the same arguments. False: start anew "
            "and remove the checkpoints that are there."
        },
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep, the newest ones."})
    eval_strategy: str = field(
        default="steps",
        metadata={"help": "When to compute eval_loss on validation_slides: steps, or no (at the end)."},
    )
    eval_steps: float | None = field(default=500, metadata={"help": "Steps between evaluations; below 1 a share."})
    prediction_loss_only: bool = field(
        default=True,
        metadata={"help": "Must stay true: reconstructions of all windows would fill the memory."},
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["pixel_values"],
        metadata={"help": "Must stay pixel_values: what is predicted; without it there is no eval_loss."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must stay false: a loss that is not finite ends the run instead of hiding."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Several processes: look for parameters without gradient; there are none."}
    )

    def __post_init__(self) -> None:
        if self.dataloader_num_workers == 0:  # of a config with workers: what is said of them does not matter then
            self.dataloader_prefetch_factor, self.dataloader_persistent_workers = None, False
        if self.bf16 and (self.use_cpu or not torch.accelerator.is_available()) and not multiplies_bfloat16():
            logger.warning_once("bf16 is asked for, which this CPU has no instructions for: training in float32.")
            self.bf16 = False
        super().__post_init__()
        if self.resume_from_checkpoint is not None:
            raise ValueError(
                f"resume_from_checkpoint is {self.resume_from_checkpoint!r}: a run goes on from its own output_dir by "
                "itself; to go on from another model, give --init_from."
            )
        if self.max_spots is not None and (self.max_steps > 0 or self.max_spots < 1):
            given = f"max_spots is {self.max_spots}" + (
                f" beside max_steps {self.max_steps}" if self.max_steps > 0 else ""
            )
            raise ValueError(f"{given}: expected a whole number from 1, or max_steps, and not both.")
        if self.logging_nan_inf_filter:
            raise ValueError("logging_nan_inf_filter is on: it would hide a loss that is not finite; leave it out.")

    @property
    def windows_a_step(self) -> int:
        """Windows of all processes and accumulation steps."""
        # `train_batch_size` is the batch of a process, over all its devices.
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size


def parse_arguments(
    argv: Sequence[str] | None = None,
) -> tuple[CorpusArguments, ModelArguments, ProbeArguments, PretrainingArguments]:
    """Dataclasses from `--config FILE.yaml [--field value ...]`; the command line wins over the file.

    With `init_from`, what neither gives is as in that model.

    Raises:
        SystemExit: unknown fields or a missing file, with status 2 and one sentence.
        ValueError: fields that contradict the model of `init_from`. OSError: there is none.
    """
    types = (CorpusArguments, ModelArguments, ProbeArguments, PretrainingArguments)
    parser = HfArgumentParser(types, allow_abbrev=False)
    argv = list(sys.argv[1:] if argv is None else argv)
    of_file = fields_of_config(parser, argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--init_from", "--init-from")
    known, _ = first.parse_known_args(argv)
    source = known.init_from or of_file.get("init_from")
    of_parent = {} if source is None else parent_fields(source)
    parser.set_defaults(**{**of_parent, **of_file})
    *dataclass_values, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    if source is not None:
        check_agrees(of_parent, {k: v for part in dataclass_values for k, v in vars(part).items()})
    return tuple(dataclass_values)


def fields_of_config(parser: HfArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """What the file says that `--config` names; the parser gets that flag.

    Raises:
        SystemExit: unknown fields or a missing file, with status 2 and one sentence.
    """
    parser.add_argument("--config", help="YAML file with any of the fields below; the command line wins over it.")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    known, _ = first.parse_known_args(argv)
    return {} if known.config is None else _read_config(Path(known.config), parser)


def _read_config(path: Path, parser: HfArgumentParser) -> dict[str, Any]:
    if not path.is_file():
        parser.error(f"--config {path}: no such file; the configs of this project are in train/configs/.")
    types = {f.name: f.type for t in parser.dataclass_types for f in dataclasses.fields(t) if f.init}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        parser.error(f"--config {path}: no valid YAML ({' '.join(str(error).split())}).")
    if not isinstance(content, dict):
        parser.error(f"--config {path}: holds a {type(content).__name__}, expected fields and their values.")
    unknown = sorted(set(content) - set(types))
    if unknown:
        parser.error(f"--config {path}: unknown fields {unknown}; see --help for those that exist.")
    return {k: [v] if types[k] == list[str] and isinstance(v, str) else v for k, v in content.items()}
