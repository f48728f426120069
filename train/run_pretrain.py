"""Pretrain an STImageMAE on slides.

    accelerate launch train/run_pretrain.py --config train/configs/demo.yaml [--field value ...]

Writes the model, its processor and code, `corpus.json` (the slides it saw), the loss curve, and under `untrained/` the
model at step 0, against which an evaluation measures what training added.
"""

import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, set_seed
from transformers.utils import logging

from data_processing.corpus import find_slides, read_slides, save_records, slide_images, vocabulary_of
from data_processing.gene_statistics import gene_moments, leading_gene_vectors
from data_processing.window_dataset import WindowDataset, windows_per_epoch
from modeling_stimg import SlideImage, STImageMAEConfig, STImageMAEForPreTraining, STPatchProcessor
from modeling_stimg.plotting import plot_loss
from train.arguments import CorpusArguments, ModelArguments, PretrainingArguments, parse_arguments

logger = logging.get_logger("stimg")


def build_processor(slides: dict, corpus: CorpusArguments, model: ModelArguments) -> STPatchProcessor:
    """The processor over the slides' genes; with "standardized" input, means and deviations come from the slides."""
    vocabulary = vocabulary_of(slides, corpus.gene_table)
    options = {
        "window_size": model.window_size,
        "num_channels": model.num_channels,
        "compaction": corpus.compaction,
        "gene_selection": corpus.gene_selection,
        "target_sum": corpus.target_sum,
        "min_observed": corpus.min_observed,
    }
    processor = STPatchProcessor(vocabulary, **options)
    images = slide_images(slides, processor)
    vocabulary = vocabulary.with_statistics(*gene_moments(images))
    return STPatchProcessor(vocabulary, normalization=corpus.normalization, **options)


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
):
    """Windows of the whole training; sets `training.max_steps`, so that every window is drawn once."""
    windows_a_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    if training.max_steps <= 0:
        windows = training.num_train_epochs * windows_per_epoch(images, model.window_size, corpus.coverage)
        training.max_steps = max(1, math.ceil(windows / windows_a_step))
    return training.max_steps * windows_a_step


def use_cpu_threads(training: PretrainingArguments) -> None:
    """Let a CPU run use all cores: `accelerate launch` would leave each process a single thread."""
    if training.device.type == "cpu":
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(training.num_cpu_threads or max(1, (os.cpu_count() or 1) // local_processes))


def main(argv: list[str] | None = None) -> None:
    corpus, model_arguments, training = parse_arguments(argv)
    if not corpus.slides:
        raise ValueError("No slides were given: name them with --slides or in the config.")
    use_cpu_threads(training)
    slides = read_slides(find_slides(corpus.slides, corpus.exclude))
    processor = build_processor(slides, corpus, model_arguments)
    images = slide_images(slides, processor)
    model = build_model(processor, images, model_arguments, training.seed)
    num_windows = plan_steps(images, corpus, model_arguments, training)
    output = Path(training.output_dir)

    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=WindowDataset(images, processor, num_windows, seed=training.seed),
        processing_class=processor,
    )
    if trainer.is_world_process_zero():
        parameters = sum(p.numel() for p in model.parameters())
        logger.warning(
            f"{len(images)} slides, {sum(i.num_spots for i in images):,} spots, {len(processor.vocabulary):,} genes; "
            f"{parameters:,} parameters; {training.max_steps:,} steps, {num_windows:,} windows."
        )
        for folder in (output, output / "untrained"):
            folder.mkdir(parents=True, exist_ok=True)
            save_records({} if folder != output else slides, folder)
        model.save_pretrained(output / "untrained")
        processor.save_pretrained(output / "untrained")
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    # The Trainer leaves its arguments as a pickle, which has no place in a folder that others load a model from.
    (output / "training_args.bin").unlink(missing_ok=True)
    if trainer.is_world_process_zero():
        plot_loss(trainer.state.log_history, output / "loss.png")
        logger.warning(f"The model is in {output}.")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
