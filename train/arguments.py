"""Arguments of pretraining: dataclasses, filled from a YAML file and the command line."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments


@dataclass
class CorpusArguments:
    """Which slides to learn from, and how they become windows."""

    slides: list[str] = field(
        default_factory=list,
        metadata={"help": "Slides: files, Space Ranger folders or globs; $VARIABLES are expanded."},
    )
    corpus: str | None = field(
        default=None,
        metadata={"help": "Instead of slides: a folder that data_processing/build_corpus.py wrote."},
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
        default="weighted", metadata={"help": "How a window's genes are drawn: weighted, variable or random."}
    )
    normalization: str = field(
        default="log1p", metadata={"help": "log1p values, or standardized ones (per gene, corpus mean and deviation)."}
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

    def __post_init__(self) -> None:
        if self.target_sum != "panel":
            try:
                self.target_sum = float(self.target_sum)
            except ValueError as error:
                raise ValueError(f"target_sum is {self.target_sum!r}: expected a number or panel.") from error


@dataclass
class ModelArguments:
    """Architecture and objective; see STImageMAEConfig."""

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
    position_embedding_type: str = field(
        default="window", metadata={"help": "Positions within the window, or on the slide: window or slide."}
    )
    singular_start: bool = field(
        default=True,
        metadata={"help": "Start gene embeddings from the singular vectors of the corpus instead of at random."},
    )
    freeze_gene_embeddings: bool = field(
        default=False,
        metadata={"help": "Keep gene embeddings at their start: a small corpus updates each too rarely to improve it."},
    )
    embedding_defaults: dict | str | None = field(
        default=None, metadata={"help": "What embed_slide does when not told: a mapping (JSON on the command line)."}
    )

    def config_fields(self) -> dict[str, Any]:
        """The fields that belong to STImageMAEConfig."""
        ours = {"singular_start", "freeze_gene_embeddings"}
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in ours}

    def __post_init__(self) -> None:
        if isinstance(self.embedding_defaults, str):
            self.embedding_defaults = json.loads(self.embedding_defaults)


@dataclass
class PretrainingArguments(TrainingArguments):
    """Hugging Face training arguments with defaults for this model; `max_steps` wins over `num_train_epochs`."""

    output_dir: str | None = field(default="runs/pretrain", metadata={"help": "Where checkpoints and the model go."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up: steps, or below 1 a share of all steps."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Windows a device and step."})
    num_train_epochs: float = field(default=40.0, metadata={"help": "Epochs; an epoch is `coverage` of the corpus."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: windows are dicts."})
    train_sampling_strategy: str = field(
        default="sequential", metadata={"help": "Windows are drawn independently, so their order needs no shuffling."}
    )
    num_cpu_threads: int | None = field(
        default=None, metadata={"help": "Threads of a process on CPUs; default: the machine's cores, shared evenly."}
    )
    report_to: str = field(default="none", metadata={"help": "Where to log, e.g. tensorboard."})


def parse_arguments(
    argv: Sequence[str] | None = None,
) -> tuple[CorpusArguments, ModelArguments, PretrainingArguments]:
    """Dataclasses from `--config FILE.yaml [--field value ...]`; the command line wins over the file.

    Raises:
        SystemExit: unknown fields or a missing file, with status 2 and one sentence.
    """
    parser = HfArgumentParser((CorpusArguments, ModelArguments, PretrainingArguments), allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with any of the fields below; the command line wins over it.")
    argv = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    config = first.parse_known_args(argv)[0].config
    if config is not None:
        parser.set_defaults(**_read_config(Path(config), parser))
    *dataclass_values, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    return tuple(dataclass_values)


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
