r"""Train a gene-token model, a baseline that knows genes and no tissue, on the slides that a model was pretrained on.

    python eval/baselines/train_gene_token.py --config eval/configs/gene_token.yaml --corpus runs/corpus \
        --output_dir runs/gene_token --max_spots 20000

The corpus, the vocabulary, the input and the start of the gene embeddings are those of `train/run_pretrain.py` with the
same fields, and so is the budget: `max_spots` counts the spots that a training sees. A spot costs far more here: all
its genes attend to each other. Writes the model, its processor and `pretraining.json`, and goes on from the last whole
checkpoint when the same command is given again.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, set_seed
from transformers.utils import logging

from data_processing.corpus import save_pretraining
from data_processing.window_dataset import spots_of
from eval.baselines.gene_token import GeneTokenConfig, GeneTokenForPreTraining
from train.arguments import CorpusArguments, ModelArguments, PretrainingArguments, fields_of_config
from train.checkpoints import checkpoint_to_resume, remove_checkpoints
from train.preparing import Prepared, gene_vectors, prepare
from train.provenance import deciding_arguments, lineage, told_arguments
from train.run_pretrain import (
    check_arguments,
    check_reporting,
    make_trainer,
    plan_steps,
    save_results,
    save_start,
    start_gene_embeddings,
    train,
    use_cpu_well,
)

logger = logging.get_logger("stimg")


@dataclass
class GeneTokenArguments:
    """Architecture and objective; see GeneTokenConfig."""

    num_tokens: int = field(default=256, metadata={"help": "Genes of a spot, a token each; time goes with it."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the encoder and of gene embeddings."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Layers of the encoder."})
    num_attention_heads: int = field(default=8, metadata={"help": "Attention heads of the encoder."})
    intermediate_size: int = field(default=1024, metadata={"help": "Feed-forward width of the encoder."})
    hidden_dropout_prob: float = field(default=0.0, metadata={"help": "Dropout after attention and feed-forward."})
    mask_ratio: float = field(default=0.3, metadata={"help": "Share of a spot's genes whose value is hidden."})
    singular_start: bool = field(
        default=True,
        metadata={"help": "Start gene embeddings from the singular vectors of the corpus instead of at random."},
    )
    freeze_gene_embeddings: bool = field(default=False, metadata={"help": "Keep gene embeddings at their start."})

    def as_model_arguments(self) -> ModelArguments:
        """What the preparation of a pretraining asks for: single spots, the genes of one being its channels."""
        shared = {f.name for f in dataclasses.fields(ModelArguments)}
        same = {k: v for k, v in dataclasses.asdict(self).items() if k in shared}
        return ModelArguments(**same, window_size=1, num_channels=self.num_tokens, sample_unit="spot")

    def only_own(self, fields: dict[str, Any]) -> dict[str, Any]:
        """What is told of a pretraining, less the fields of a model that this one is not, and with its own."""
        foreign = {f.name for f in dataclasses.fields(ModelArguments)}
        told = {k: v for k, v in fields.items() if k not in foreign}
        return {**told, "model_type": GeneTokenConfig.model_type, "sample_unit": "spot", **dataclasses.asdict(self)}


def build_model(data: Prepared, arguments: GeneTokenArguments, seed: int) -> GeneTokenForPreTraining:
    """The model at step 0; its gene embeddings start as those of `train/run_pretrain.py` do."""
    set_seed(seed)
    own = {f.name for f in dataclasses.fields(GeneTokenConfig)}
    fields = {k: v for k, v in dataclasses.asdict(arguments).items() if k in own}
    model = GeneTokenForPreTraining(GeneTokenConfig(vocab_size=len(data.processor.vocabulary) + 1, **fields))
    if arguments.singular_start:
        start_gene_embeddings(model, gene_vectors(data.processor, data.images, arguments.hidden_size, seed))
    model.get_input_embeddings().weight.requires_grad_(not arguments.freeze_gene_embeddings)
    return model


def parse_arguments(
    argv: Sequence[str] | None = None,
) -> tuple[CorpusArguments, GeneTokenArguments, PretrainingArguments]:
    """Dataclasses from `--config FILE.yaml [--field value ...]`; the command line wins over the file."""
    parser = HfArgumentParser((CorpusArguments, GeneTokenArguments, PretrainingArguments), allow_abbrev=False)
    argv = list(sys.argv[1:] if argv is None else argv)
    parser.set_defaults(**fields_of_config(parser, argv))
    *dataclass_values, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    return tuple(dataclass_values)


def main(argv: list[str] | None = None) -> None:
    corpus, arguments, training = parse_arguments(argv)
    check_arguments(corpus, training)
    check_reporting(training)
    use_cpu_well(training)
    main_process = training.process_index == 0
    as_model = arguments.as_model_arguments()
    data = prepare(corpus, as_model, training.seed, main_process)
    model = build_model(data, arguments, training.seed)
    windows = plan_steps(data, corpus, as_model, training)
    run = arguments.only_own(deciding_arguments(corpus, as_model, training, data, None))
    output = Path(training.output_dir)
    checkpoint = checkpoint_to_resume(output, run, main_process) if training.resume else None
    told = arguments.only_own(told_arguments(corpus, as_model, training, len(windows), windows.num_spots()))
    seen, further = lineage(data, None)

    def describe(folder: Path, *_: Any) -> None:
        """No card: it is trained to be compared with, not to be published."""
        save_pretraining(folder, seen, told, further)

    trainer = make_trainer(model, data, corpus, training, windows, run=run, describe=describe)
    if main_process:
        going_on = "" if checkpoint is None else f" Goes on from {checkpoint}."
        logger.warning(
            f"{len(data.images)} slides, {int(spots_of(data.images).sum()):,} spots, "
            f"{len(data.processor.vocabulary):,} genes; {sum(p.numel() for p in model.parameters()):,} parameters; "
            f"{training.max_steps:,} steps, {len(windows):,} spots of {arguments.num_tokens} genes.{going_on}"
        )
        if not training.resume:
            remove_checkpoints(output)
        if checkpoint is None:
            save_start(output, model, data.processor, [], told)
    train(trainer, checkpoint)
    save_results(trainer, probed=False)
    if main_process:
        logger.warning(f"The model is in {output}.")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        # A config's own check is the cause of the error that names the config's class.
        cause = error.__cause__ if isinstance(error, StrictDataclassError) else error
        print(f"error: {cause or error}", file=sys.stderr)
        sys.exit(2)
