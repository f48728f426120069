"""`README.md` of a trained model: what it is, what it saw, and how it did. Every number is from the run itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from data_processing.corpus import SlideRecord
from modeling_stimg import STImageMAEConfig, STPatchProcessor
from modeling_stimg.plotting import logged

MAX_LISTED_SLIDES = 60
TAGS = ["spatial-transcriptomics", "masked-autoencoder", "st_image_mae", "gene-expression", "biology"]


@dataclass(frozen=True)
class CardFacts:
    """What a card tells.

    Attributes:
        name: of the model. records, held_out: slides that were trained on, and that the loss was evaluated on.
        parent: name of the model that was gone on from, and the slides that this one saw (None: it does not say).
        arguments: of the run. num_parameters: of the whole model, decoder included.
        corpus: of the Hub, `ORG/NAME@COMMIT`; None of slides and corpora on disk.
    """

    name: str
    config: STImageMAEConfig
    processor: STPatchProcessor
    num_parameters: int
    records: Sequence[SlideRecord]
    held_out: Sequence[SlideRecord]
    probed: Sequence[str]
    parent: tuple[str, Sequence[SlideRecord] | None] | None
    arguments: dict[str, Any]
    corpus: str | None = None


def write_card(facts: CardFacts, log_history: Sequence[dict[str, Any]]) -> ModelCard:
    """The card of a model with its Hub metadata, which `ModelCard.save` writes."""
    data = ModelCardData(
        library_name="transformers",
        tags=list(TAGS),
        pipeline_tag="feature-extraction",
        datasets=None if facts.corpus is None else [facts.corpus.partition("@")[0]],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {facts.name}\n",
        describe_model(facts),
        describe_usage(facts),
        describe_slides(facts),
        describe_run(facts, log_history),
        describe_arguments(facts),
        "Every number above is from the run that made this model. It is meant for research, not for clinical use.\n",
    ]
    return ModelCard("\n".join(parts))


MASKED = {"entry": "of the entries", "site": "of the sites", "mixed": "of the sites, and of the entries at the others"}


def describe_model(facts: CardFacts) -> str:
    """What the model is: its size, its windows, its values."""
    c, p = facts.config, facts.processor
    depth = "of the panel" if p.target_sum == "panel" else f"{p.target_sum:,g} counts a spot"
    return (
        "A masked autoencoder over windows of spatial transcriptomics slides (STImageMAE, package `stimg`): it gives "
        "every spot an embedding that knows its surroundings.\n\n"
        f"- {facts.num_parameters:,} parameters; encoder {c.num_hidden_layers} layers x {c.hidden_size}, "
        f"{c.num_attention_heads} heads; decoder {c.decoder_num_hidden_layers} layers x {c.decoder_hidden_size}\n"
        f"- windows of {p.window_size} x {p.window_size} sites with {p.num_channels} genes of "
        f"{len(p.vocabulary):,} in the vocabulary\n"
        f"- values: {p.normalization}, depth {depth}; hidden: {c.mask_ratio:g} {MASKED[c.mask_unit]}\n"
    )


def describe_pipeline(name: str) -> str:
    """Three lines that need nothing but transformers."""
    return (
        "```python\n"
        "from transformers import pipeline\n\n"
        f'pipe = pipeline("st-feature-extraction", model="{name}", trust_remote_code=True)\n'
        'embedding = pipe(adata)  # raw counts; obs["array_row"], obs["array_col"] -> float32 (spots, width)\n'
        "```\n"
    )


def describe_usage(facts: CardFacts) -> str:
    return (
        "## Use\n\nWith transformers alone, and the code in this folder:\n\n"
        f"{describe_pipeline(facts.name)}\n"
        "With the package `stimg`, which reads all common files:\n\n```python\n"
        "from modeling_stimg import STImageMAEModel, STPatchProcessor, embed_slide, read_slide\n\n"
        f'model, processor = (c.from_pretrained("{facts.name}") for c in (STImageMAEModel, STPatchProcessor))\n'
        'adata = read_slide("slide.h5ad")  # raw counts and array positions\n'
        'embed_slide(adata, model, processor)  # float32 (spots, width) in adata.obsm["X_stimg"]\n'
        "```\n"
    )


def describe_slides(facts: CardFacts) -> str:
    """Which slides it was trained on, evaluated on while it trained, probed with, and inherits."""
    source = "" if facts.corpus is None else f", of the corpus `{facts.corpus}`"
    lines = ["## Slides\n", f"Trained on {listed(facts.records)}{source}"]
    if facts.held_out:
        lines.append(f"\nHeld out, for the evaluation loss alone: {listed(facts.held_out)}")
    if facts.probed:
        seen = sorted(set(facts.probed) & {record.name for record in facts.records})
        told = f" (of these, {', '.join(seen)} were trained on, without labels)" if seen else ""
        lines.append(f"\nProbed with their labels: {', '.join(facts.probed)}{told}")
    if facts.parent is not None:
        name, slides = facts.parent
        told = "which does not say what it saw" if slides is None else f"which saw {listed(slides)}"
        lines.append(f"\nGone on from `{name}`, {told}")
    return "\n".join(lines) + "\n"


def listed(records: Sequence[SlideRecord]) -> str:
    """Number, spots and names of slides."""
    names = [record.name for record in records]
    spots = sum(record.num_spots for record in records)
    more = f" and {len(names) - MAX_LISTED_SLIDES} more (`pretraining.json` names all)"
    listed = ", ".join(names[:MAX_LISTED_SLIDES]) + (more if len(names) > MAX_LISTED_SLIDES else "")
    return f"{len(names)} slides, {spots:,} spots: {listed}"


def describe_run(facts: CardFacts, log_history: Sequence[dict[str, Any]]) -> str:
    rows = [
        ("loss", "training loss (masked mean squared error, mean since the log entry before)"),
        ("eval_loss", "loss on held-out slides"),
        ("probe_ari", "adjusted Rand index of a 10-NN probe, 20 % of labelled spots to train on"),
    ]
    lines = ["## Results\n", "| | step | value |", "| --- | --- | --- |"]
    for key, title in rows:
        points = logged(log_history, key)
        if points:
            lines.append(f"| {title} | {points[-1][0]:,} | {points[-1][1]:.4f} |")
    return "\n".join(lines) + "\n"


def describe_arguments(facts: CardFacts) -> str:
    lines = ["## Arguments\n", "| field | value |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in facts.arguments.items()]
    return "\n".join(lines) + "\n"
