"""Pretrain an STImageMAE on slides.

    accelerate launch train/run_pretrain.py --config train/configs/demo.yaml [--field value ...]

Writes the model, its processor and code, `pretraining.json` (the slides it saw), the loss curve, and under `untrained/`
the model at step 0, against which an evaluation measures what training added.
"""

import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from huggingface_hub.errors import StrictDataclassError
from transformers import Trainer, set_seed
from transformers.utils import logging

from data_processing.corpus import find_slides, read_slides, save_pretraining, slide_images, vocabulary_of
from data_processing.gene_statistics import GeneSums, gene_moments, leading_gene_vectors
from data_processing.window_dataset import WindowDataset, windows_per_epoch
from modeling_stimg import SlideImage, STImageMAEConfig, STImageMAEForPreTraining, STPatchProcessor
from modeling_stimg.embedding_stimg import embedding_options
from modeling_stimg.plotting import plot_loss
from train.arguments import CorpusArguments, ModelArguments, PretrainingArguments, parse_arguments

logger = logging.get_logger("stimg")


def build_processor(
    slides: dict[str, AnnData], corpus: CorpusArguments, model: ModelArguments, tell: bool
) -> tuple[STPatchProcessor, list[SlideImage]]:
    """The processor over the slides' genes, with their statistics, and the slides as it sees them.

    Images do not depend on `normalization`, which applies to windows: one pass serves statistics and training. Only
    `target_sum="panel"` takes a second one, because it needs the genes' shares first.
    """
    vocabulary = vocabulary_of(slides, corpus.gene_table)
    options = {
        "window_size": model.window_size,
        "num_channels": model.num_channels,
        "compaction": corpus.compaction,
        "gene_selection": corpus.gene_selection,
        "min_observed": corpus.min_observed,
    }
    total = {"target_sum": 1e4 if corpus.target_sum == "panel" else corpus.target_sum}
    images = slide_images(slides, STPatchProcessor(vocabulary, **options, **total), tell=tell)
    sums = GeneSums.of(images)
    vocabulary = vocabulary.with_statistics(*sums.moments(), share=sums.shares())
    if corpus.target_sum == "panel":
        total = {"target_sum": "panel"}
        images = slide_images(slides, STPatchProcessor(vocabulary, **options, **total))
        vocabulary = vocabulary.with_statistics(*gene_moments(images))
    return STPatchProcessor(vocabulary, normalization=corpus.normalization, **options, **total), images


def build_model(
    processor: STPatchProcessor, images: list[SlideImage], arguments: ModelArguments, seed: int
) -> STImageMAEForPreTraining:
    """The model at step 0: random, or with gene embeddings that span the corpus' leading gene programs."""
    config = STImageMAEConfig(vocab_size=len(processor.vocabulary) + 1, **arguments.config_fields())
    set_seed(seed)
    model = STImageMAEForPreTraining(config)
    if arguments.singular_start:
        vocabulary = processor.vocabulary
        vectors = leading_gene_vectors(images, vocabulary.mean, vocabulary.deviation, config.hidden_size, seed)
        start_gene_embeddings(model, vectors)
    model.get_input_embeddings().weight.requires_grad_(not arguments.freeze_gene_embeddings)
    return model


def start_gene_embeddings(model: STImageMAEForPreTraining, vectors: np.ndarray) -> None:
    """Replace the random gene embeddings by `vectors` float32 (vocabulary, hidden), scaled to a mean square norm of 1.

    Genes without a direction of their own (all-zero rows: they never vary) keep their random start.
    """
    table = model.get_input_embeddings().weight
    start = torch.from_numpy(vectors).to(table)
    moving = start.abs().sum(-1) > 0
    scale = start[moving].square().sum(-1).mean().rsqrt()
    with torch.no_grad():
        table[: len(start)][moving] = start[moving] * scale


def plan_steps(
    images: list[SlideImage], corpus: CorpusArguments, model: ModelArguments, training: PretrainingArguments
) -> int:
    """Windows of the whole training; sets `training.max_steps`, so that every window is drawn once."""
    # `train_batch_size` is the batch of a process, over all its devices.
    windows_a_step = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    if training.max_steps <= 0:
        windows = training.num_train_epochs * windows_per_epoch(images, model.window_size, corpus.coverage)
        training.max_steps = max(1, math.ceil(windows / windows_a_step))
    return training.max_steps * windows_a_step


def use_cpu_threads(training: PretrainingArguments) -> None:
    """Let a CPU run use all cores: `accelerate launch` would leave each process a single thread."""
    if training.device.type != "cpu":
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(training.num_cpu_threads or max(share, int(os.environ.get("OMP_NUM_THREADS", "1"))))


def told_arguments(
    corpus: CorpusArguments, model: ModelArguments, training: PretrainingArguments, num_windows: int
) -> dict[str, Any]:
    """What a reader of the checkpoint should know of its training; no paths, which mean nothing elsewhere."""
    paths = {"slides", "gene_table"}
    told = ("max_steps", "learning_rate", "weight_decay", "lr_scheduler_type", "warmup_steps", "seed", "bf16", "fp16")
    return {
        **{k: v for k, v in asdict(corpus).items() if k not in paths},
        **asdict(model),
        **{k: v for k, v in training.to_dict().items() if k in told},
        "num_windows": num_windows,
    }


def check_arguments(corpus: CorpusArguments, training: PretrainingArguments) -> None:
    """Stop before any work where there is nothing to learn from, or a finished model would be overwritten."""
    if not corpus.slides:
        raise ValueError("No slides were given: name them with --slides or in the config.")
    if (Path(training.output_dir) / "model.safetensors").exists():
        raise ValueError(
            f"{training.output_dir} holds a trained model already: give another --output_dir, or move that one away."
        )


def main(argv: list[str] | None = None) -> None:
    corpus, model_arguments, training = parse_arguments(argv)
    check_arguments(corpus, training)
    use_cpu_threads(training)
    slides = read_slides(find_slides(corpus.slides, corpus.exclude))
    processor, images = build_processor(slides, corpus, model_arguments, tell=training.process_index == 0)
    model = build_model(processor, images, model_arguments, training.seed)
    embedding_options(model, processor)
    num_windows = plan_steps(images, corpus, model_arguments, training)
    output = Path(training.output_dir)

    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=WindowDataset(images, processor, num_windows, seed=training.seed),
        processing_class=processor,
    )
    arguments = told_arguments(corpus, model_arguments, training, num_windows)
    if trainer.is_world_process_zero():
        parameters = sum(p.numel() for p in model.parameters())
        logger.warning(
            f"{len(images)} slides, {sum(i.num_spots for i in images):,} spots, {len(processor.vocabulary):,} genes; "
            f"{parameters:,} parameters; {training.max_steps:,} steps, {num_windows:,} windows."
        )
        start = output / "untrained"
        start.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(start)
        processor.save_pretrained(start)
        save_pretraining(start, {}, arguments)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        # Before the weights: a folder with a model always tells which slides it saw.
        save_pretraining(output, slides, arguments)
        plot_loss(trainer.state.log_history, output / "loss.png")
    trainer.save_state()
    trainer.save_model()
    if trainer.is_world_process_zero():
        # The Trainer leaves its arguments as a pickle, which has no place in a folder that others load a model from.
        (output / "training_args.bin").unlink(missing_ok=True)
        logger.warning(f"The model is in {output}.")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, StrictDataclassError) as error:
        # A config's own check is the cause of the error that names the config's class.
        sys.exit(f"error: {error.__cause__ if isinstance(error, StrictDataclassError) else error}")
