"""Pretrain an STImageMAE on slides.

    accelerate launch train/run_pretrain.py --config train/configs/demo.yaml [--field value ...]

Writes the model, its processor and code, `pretraining.json` (the slides it saw), the loss curve, and under `untrained/`
the model at step 0, against which an evaluation measures what training added.
"""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import Trainer, set_seed
from transformers.utils import logging

from data_processing.corpus import save_pretraining
from data_processing.window_dataset import WindowDataset, spots_of, windows_per_epoch
from modeling_stimg import SlideImage, STImageMAEConfig, STImageMAEForPreTraining, STPatchProcessor
from modeling_stimg.embedding_stimg import embedding_options
from modeling_stimg.host_memory import keep_freed_memory
from modeling_stimg.plotting import plot_loss
from train.arguments import CorpusArguments, ModelArguments, PretrainingArguments, parse_arguments
from train.preparing import gene_vectors, prepare

logger = logging.get_logger("stimg")


def build_model(
    processor: STPatchProcessor, images: Sequence[SlideImage], arguments: ModelArguments, seed: int
) -> STImageMAEForPreTraining:
    """The model at step 0: random, or with gene embeddings that span the corpus' leading gene programs."""
    config = STImageMAEConfig(vocab_size=len(processor.vocabulary) + 1, **arguments.config_fields())
    set_seed(seed)
    model = STImageMAEForPreTraining(config)
    if arguments.singular_start:
        start_gene_embeddings(model, gene_vectors(processor, images, config.hidden_size, seed))
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
    images: Sequence[SlideImage], corpus: CorpusArguments, model: ModelArguments, training: PretrainingArguments
) -> int:
    """Windows of the whole training; sets `training.max_steps`, so that every window is drawn once."""
    # `train_batch_size` is the batch of a process, over all its devices.
    windows_a_step = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    if training.max_steps <= 0:
        windows = training.num_train_epochs * windows_per_epoch(images, model.window_size, corpus.coverage)
        training.max_steps = max(1, math.ceil(windows / windows_a_step))
    return training.max_steps * windows_a_step


def use_cpu_well(training: PretrainingArguments) -> None:
    """Let a CPU run use all cores: `accelerate launch` would leave each process a single thread. And keep memory."""
    if training.device.type != "cpu":
        return
    keep_freed_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(training.num_cpu_threads or max(share, int(os.environ.get("OMP_NUM_THREADS", "1"))))


def told_arguments(
    corpus: CorpusArguments, model: ModelArguments, training: PretrainingArguments, num_windows: int
) -> dict[str, Any]:
    """What a reader of the checkpoint should know of its training; no paths, which mean nothing elsewhere."""
    paths = {"slides", "corpus", "gene_table"}
    told = ("max_steps", "learning_rate", "weight_decay", "lr_scheduler_type", "warmup_steps", "seed", "bf16", "fp16")
    return {
        **{k: v for k, v in asdict(corpus).items() if k not in paths},
        **asdict(model),
        **{k: v for k, v in training.to_dict().items() if k in told},
        "num_windows": num_windows,
    }


def check_arguments(corpus: CorpusArguments, training: PretrainingArguments) -> None:
    """Stop before any work where there is nothing to learn from, or a finished model would be overwritten."""
    if bool(corpus.slides) == bool(corpus.corpus):
        given = "Both slides and a corpus" if corpus.slides else "No slides"
        raise ValueError(f"{given} were given: name slides with --slides, or a corpus with --corpus.")
    if corpus.corpus and corpus.exclude:
        raise ValueError("A corpus is trained on as a whole: leave slides out (--exclude) when it is built.")
    if (Path(training.output_dir) / "model.safetensors").exists():
        raise ValueError(
            f"{training.output_dir} holds a trained model already: give another --output_dir, or move that one away."
        )


def main(argv: list[str] | None = None) -> None:
    corpus, model_arguments, training = parse_arguments(argv)
    check_arguments(corpus, training)
    use_cpu_well(training)
    processor, images, records = prepare(corpus, model_arguments, tell=training.process_index == 0)
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
            f"{len(images)} slides, {int(spots_of(images).sum()):,} spots, {len(processor.vocabulary):,} genes; "
            f"{parameters:,} parameters; {training.max_steps:,} steps, {num_windows:,} windows."
        )
        start = output / "untrained"
        start.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(start)
        processor.save_pretrained(start)
        save_pretraining(start, [], arguments)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        # Before the weights: a folder with a model always tells which slides it saw.
        save_pretraining(output, records, arguments)
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
