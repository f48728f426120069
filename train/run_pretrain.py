"""Pretrain an STImageMAE on slides.

    accelerate launch train/run_pretrain.py --config train/configs/demo.yaml [--field value ...]

Writes the model, its processor and code, `pretraining.json` (the slides it saw), a model card, the loss curve, and
under `untrained/` the model at step 0, against which an evaluation measures what training added.

The same command again goes on from the last whole checkpoint, to the same weights as without the interruption.
"""

import dataclasses
import gc
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from transformers import set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging

from data_processing.corpus import SlideRecord, save_pretraining
from data_processing.window_dataset import WindowDataset, collate_windows, spots_of, windows_per_epoch
from modeling_stimg import SlideImage, STImageMAEConfig, STImageMAEForPreTraining, STPatchProcessor
from modeling_stimg.embedding_stimg import embedding_options
from modeling_stimg.host import keep_freed_memory
from modeling_stimg.plotting import logged, plot_loss, plot_probe
from train.arguments import CorpusArguments, ModelArguments, PretrainingArguments, ProbeArguments, parse_arguments
from train.callbacks import FiniteWatch, ProbeCallback, ProbeSlide, read_probe_slides
from train.checkpoints import checkpoint_step, checkpoint_to_resume, remove_checkpoints, saving
from train.continuing import Parent, extend_model, load_parent
from train.model_card import CardFacts, write_card
from train.preparing import Prepared, gene_vectors, prepare
from train.projection import fit_projection
from train.provenance import Progress, card_facts, deciding_arguments, lineage, told_arguments, training_cost
from train.pushing import check_push, remove_staged
from train.trainer import PretrainTrainer

logger = logging.get_logger("stimg")

# Of the held-out windows; the same in every run, so that losses of runs over one set of slides can be compared.
VALIDATION_SEED = 20_260


def build_model(
    processor: STPatchProcessor,
    images: Sequence[SlideImage],
    arguments: ModelArguments,
    seed: int,
    parent: Parent | None = None,
) -> STImageMAEForPreTraining:
    """The model at step 0: random, with gene embeddings that span the corpus' leading gene programs, or a parent's."""
    set_seed(seed)
    if parent is not None:
        model = extend_model(parent.model, arguments.config_fields(), len(processor.vocabulary), seed)
        new = len(processor.vocabulary) - len(parent.processor.vocabulary)
        if new and arguments.freeze_gene_embeddings:
            logger.warning(
                f"{new:,} genes that {parent.name} does not know keep random embeddings, because "
                "freeze_gene_embeddings is on: train without it to learn them."
            )
        model.get_input_embeddings().weight.requires_grad_(not arguments.freeze_gene_embeddings)
        return model
    config = STImageMAEConfig(vocab_size=len(processor.vocabulary) + 1, **arguments.config_fields())
    model = STImageMAEForPreTraining(config)
    if arguments.singular_start:
        vectors = gene_vectors(processor, images, config.hidden_size, seed, arguments.vector_smoothing)
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


def training_windows(
    data: Prepared, corpus: CorpusArguments, training: PretrainingArguments, length: int
) -> WindowDataset:
    """The windows of a run, `length` of them."""
    return WindowDataset(
        data.images, data.processor, length, training.seed, corpus.window_sizes, training.windows_a_step
    )


def plan_steps(
    data: Prepared, corpus: CorpusArguments, model: ModelArguments, training: PretrainingArguments
) -> WindowDataset:
    """The windows of the whole training, every one of them drawn once; sets `training.max_steps`."""
    if training.max_spots is not None:
        training.max_steps = steps_to_see(training_windows(data, corpus, training, 1), training.max_spots)
    elif training.max_steps <= 0:
        sizes = corpus.window_sizes or [model.window_size]
        windows = training.num_train_epochs * windows_per_epoch(data.images, sizes, corpus.coverage, model.sample_unit)
        training.max_steps = max(1, math.ceil(windows / training.windows_a_step))
    return training_windows(data, corpus, training, training.max_steps * training.windows_a_step)


def steps_to_see(windows: WindowDataset, spots: int, steps_at_a_time: int = 64) -> int:
    """Steps after which at least so many spots have stood in windows."""
    steps, seen, stride = 0, 0, steps_at_a_time * windows.windows_a_step
    while True:
        start = steps * windows.windows_a_step
        of_steps = windows.spots_of_items(start, start + stride).reshape(steps_at_a_time, -1).sum(-1).cumsum()
        if seen + of_steps[-1] >= spots:
            return steps + 1 + int(np.searchsorted(seen + of_steps, spots))
        seen, steps = seen + int(of_steps[-1]), steps + steps_at_a_time


def use_cpu_well(training: PretrainingArguments) -> None:
    """Let a CPU run use all cores: `accelerate launch` would leave each process a single thread. And keep memory."""
    if training.device.type != "cpu":
        return
    keep_freed_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(training.num_cpu_threads or max(share, int(os.environ.get("OMP_NUM_THREADS", "1"))))


def check_arguments(corpus: CorpusArguments, training: PretrainingArguments) -> None:
    """Stop before any work where there is nothing to learn from, or a finished model would be overwritten."""
    if bool(corpus.slides) == bool(corpus.corpus):
        given = "Both slides and a corpus" if corpus.slides else "No slides"
        raise ValueError(f"{given} were given: name slides with --slides, or a corpus with --corpus.")
    if corpus.corpus and corpus.exclude:
        raise ValueError("A corpus is trained on as a whole: leave slides out (--exclude) when it is built.")
    if min(corpus.window_sizes, default=1) < 1:
        raise ValueError(f"window_sizes is {corpus.window_sizes}: expected sides in sites, from 1.")
    if corpus.corpus and corpus.gene_table:
        raise ValueError("A corpus and a gene table were given: a corpus has its genes; leave --gene_table out.")
    if training.n_gpu > 1:
        raise ValueError(
            f"One process sees {training.n_gpu} GPUs: give each its own, accelerate launch --multi_gpu --num_processes "
            f"{training.n_gpu}, or show it a single one with CUDA_VISIBLE_DEVICES."
        )
    if (Path(training.output_dir) / "model.safetensors").exists():
        raise ValueError(
            f"{training.output_dir} holds a trained model already: give another --output_dir, or move that one away."
        )


def check_reporting(training: PretrainingArguments) -> None:
    """Stop where a run would report to something that is not installed."""
    for callback in get_reporting_integration_callbacks(training.report_to):
        try:
            callback()
        except RuntimeError as error:
            raise ImportError(f"report_to is {training.report_to}: {error}") from error


def save_start(
    output: Path, model: STImageMAEForPreTraining, processor: STPatchProcessor, seen: Sequence[SlideRecord], told: dict
) -> None:
    """Write the model at step 0 to `untrained/`."""
    start = output / "untrained"
    with saving(str(start)):
        start.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(start)
        processor.save_pretrained(start)
        save_pretraining(start, seen, told)


def make_trainer(
    model: STImageMAEForPreTraining,
    data: Prepared,
    corpus: CorpusArguments,
    training: PretrainingArguments,
    windows: WindowDataset,
    **options: Any,
) -> PretrainTrainer:
    """The Trainer over `windows` of `data`; without held-out slides it evaluates nothing."""
    held_out = None
    if len(data.held_out_images):
        held_out = WindowDataset(data.held_out_images, data.processor, corpus.validation_windows, VALIDATION_SEED)
    else:
        training.eval_strategy, training.load_best_model_at_end = "no", False
    watch = FiniteWatch(
        windows, training.windows_a_step, training.gradient_accumulation_steps, Path(training.output_dir)
    )
    return PretrainTrainer(
        model=model,
        args=training,
        train_dataset=windows,
        eval_dataset=held_out,
        data_collator=collate_windows,
        processing_class=data.processor,
        callbacks=[watch],
        on_loss=watch.on_loss,
        **options,
    )


def train(trainer: PretrainTrainer, checkpoint: Path | None) -> None:
    """Train to the end, and evaluate there, if that was not just done."""
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    evaluated = [step for step, _ in logged(trainer.state.log_history, "eval_loss")]
    if trainer.eval_dataset is not None and trainer.state.global_step not in evaluated:
        trainer.evaluate()


def project(model: STImageMAEForPreTraining, data: Prepared, seed: int) -> None:
    """Fit the projection of the model's outputs, where it has one."""
    if model.config.projection_size:
        projection = fit_projection(model, data.processor, data.images, seed)
        model.base_model.projection.copy_(torch.from_numpy(projection))


def save_results(trainer: PretrainTrainer, probed: bool) -> None:
    """Write everything that tells of the training, and then the model: a folder with a model always has the rest."""
    output = Path(trainer.args.output_dir)
    with saving(f"What there is to tell of {output}"):
        if trainer.is_world_process_zero():
            plot_loss(trainer.state.log_history, output / "loss.png")
            if probed:
                plot_probe(trainer.state.log_history, output / "probe.png")
        trainer.create_model_card()
        trainer.save_state()
    trainer.save_model()


def leave_process_group() -> None:
    """End the connection to other processes, after everything that trained has gone.

    A gloo group that goes together with the reducer of DistributedDataParallel, its last holder, can wait for ever: it
    waits for its thread with the interpreter's lock held, and the thread may need the lock to let go of a tensor.
    """
    gc.collect()  # the Trainer and its model refer to each other
    PartialState().destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    pretrain(argv)
    leave_process_group()


def pretrain(argv: list[str] | None = None) -> None:
    """The whole run; every process calls it."""
    corpus, model_arguments, probe, training = parse_arguments(argv)
    check_arguments(corpus, training)
    check_reporting(training)
    check_push(training)
    use_cpu_well(training)
    main_process = training.process_index == 0
    parent = None if model_arguments.init_from is None else load_parent(model_arguments.init_from)
    data = prepare(corpus, model_arguments, training.seed, main_process, parent)
    probe_slides = read_probe_slides(probe, data.processor) if probe.probe_slides else []
    model = build_model(data.processor, data.images, model_arguments, training.seed, parent)
    embedding_options(model, data.processor)
    windows = plan_steps(data, corpus, model_arguments, training)
    run = deciding_arguments(corpus, model_arguments, training, data, parent)
    output = Path(training.output_dir)
    checkpoint = checkpoint_to_resume(output, run, main_process) if training.resume else None
    arguments = told_arguments(corpus, model_arguments, training, len(windows), windows.num_spots())
    facts = card_facts(training, model, data, probe_slides, parent, arguments)
    seen, told = lineage(data, parent)
    progress = Progress(windows, training.windows_a_step)
    first_step = 0 if checkpoint is None else checkpoint_step(checkpoint)

    def describe(folder: Path, history: list[dict[str, Any]], step: int) -> None:
        """What there is to tell of the model after so many steps."""
        so_far = progress.arguments(arguments, step)
        save_pretraining(folder, seen, so_far, {**told, "cost": training_cost(training, history, first_step)})
        now = dataclasses.replace(facts, name=trainer.hub_model_id or facts.name, arguments=so_far)
        write_card(now, history).save(folder / "README.md")

    trainer = make_trainer(
        model,
        data,
        corpus,
        training,
        windows,
        run=run,
        describe=describe,
    )
    if trainer.is_fsdp_enabled and model.config.projection_size:
        raise ValueError("projection_size cannot be used with FSDP, where no process holds the model: leave it out.")
    add_probe(trainer, probe_slides, data.processor, probe)
    if main_process:
        tell_start(data, facts, training, checkpoint)
        remove_staged(output)
        if not training.resume:
            remove_checkpoints(output)
        if checkpoint is None:
            project(model, data, training.seed)
            save_start(output, model, data.processor, [] if parent is None else parent.seen, arguments)
    train(trainer, checkpoint)
    if main_process:
        project(trainer.accelerator.unwrap_model(trainer.model), data, training.seed)
    save_results(trainer, probed=bool(probe_slides))
    if main_process:
        logger.warning(f"The model is in {output}.")


def add_probe(
    trainer: PretrainTrainer, slides: Sequence[ProbeSlide], processor: STPatchProcessor, probe: ProbeArguments
) -> None:
    """Have the Trainer probe the embedding now and then."""
    if slides and trainer.is_fsdp_enabled:
        raise ValueError("probe_slides cannot be used with FSDP, where no process holds the model: leave them out.")
    if slides:
        trainer.add_callback(ProbeCallback(slides, processor, probe.probe_steps, trainer.log))


def tell_start(data: Prepared, facts: CardFacts, training: PretrainingArguments, checkpoint: Path | None) -> None:
    """One line on what is going to happen."""
    held_out = f" ({len(data.held_out_records)} more held out)" if data.held_out_records else ""
    processes = f" in {training.world_size} processes" if training.world_size > 1 else ""
    going_on = "" if checkpoint is None else f" Goes on from {checkpoint}."
    logger.warning(
        f"{len(data.images)} slides{held_out}, {int(spots_of(data.images).sum()):,} spots, "
        f"{len(data.processor.vocabulary):,} genes; {facts.num_parameters:,} parameters; {training.max_steps:,} steps, "
        f"{facts.arguments['num_windows']:,} windows with {facts.arguments['num_spots_seen']:,} spots"
        f"{processes}.{going_on}"
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        # A config's own check is the cause of the error that names the config's class.
        sys.exit(f"error: {error.__cause__ if isinstance(error, StrictDataclassError) else error}")
