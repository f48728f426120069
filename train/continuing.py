"""Going on from a model that was pretrained before, on slides of one's own."""

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from data_processing.corpus import SlideRecord, load_pretraining
from modeling_stimg import GeneVocabulary, STImageMAEConfig, STImageMAEForPreTraining, STPatchProcessor
from modeling_stimg.hub import Found, find_model

# What the weights were made for. Values of another normalisation would mean something else to them.
ARCHITECTURE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "decoder_hidden_size",
    "decoder_num_hidden_layers",
    "decoder_num_attention_heads",
    "decoder_intermediate_size",
    "sample_unit",
    "position_embedding_type",
    "projection_size",
)
VALUES = ("compaction", "normalization", "target_sum")
# What may be chosen anew; a parent's choice stands where nothing is given.
OBJECTIVE = (
    *("window_size", "num_channels", "hidden_dropout_prob", "mask_ratio", "mask_unit", "target_smoothing"),
    "embedding_defaults",
)
SAMPLING = ("gene_selection", "min_observed")


@dataclass
class Parent:
    """The model that is gone on from.

    Attributes:
        name: of its folder, or its Hub id with the commit. slides: what it saw; None where it does not say.
    """

    name: str
    model: STImageMAEForPreTraining
    processor: STPatchProcessor
    slides: list[SlideRecord] | None

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of its weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def seen(self) -> list[SlideRecord]:
        """What it saw, as far as it says."""
        return self.slides or []


def find_parent(source: str, weights: bool = True) -> Found:
    """The model of a folder, whose `$VARIABLES` and `~` are expanded, or of the Hub: see `find_model`."""
    return find_model(os.path.expanduser(os.path.expandvars(source)), weights=weights)


def parent_fields(source: str) -> dict[str, Any]:
    """The fields of a run that a parent decides, or proposes where nothing is given.

    Raises:
        ValueError: no STImageMAE. OSError: nothing there.
    """
    folder = find_parent(source, weights=False).folder
    config, _ = PreTrainedConfig.get_config_dict(folder)
    processor, _ = STPatchProcessor.get_image_processor_dict(folder)
    defaults = {f.name: f.default for f in dataclasses.fields(STImageMAEConfig)}
    of_config = {name: config.get(name, defaults[name]) for name in (*ARCHITECTURE, *OBJECTIVE)}
    of_processor = {name: processor[name] for name in (*VALUES, *SAMPLING) if name in processor}
    return {**of_config, **of_processor, "singular_start": False}


def check_agrees(fields: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuse arguments that contradict the parent.

    Args:
        fields: from `parent_fields`. given: the run's fields.

    Raises:
        ValueError: names the first field.
    """
    for name in (*ARCHITECTURE, *VALUES, "singular_start"):
        if name in fields and given[name] != fields[name]:
            raise ValueError(
                f"{name} is {given[name]!r}, but the model of init_from has {fields[name]!r}, which cannot change: "
                f"leave it out, or give --{name} {fields[name]}."
            )


def load_parent(source: str) -> Parent:
    """Model, processor and slides of the model to go on from.

    Raises:
        ValueError: a model without a decoder, or files that are damaged. OSError: files that are missing.
    """
    found = find_parent(source)
    model, info = STImageMAEForPreTraining.from_pretrained(found.folder, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(
            f"init_from {source} lacks {len(info['missing_keys'])} tensors, e.g. {min(info['missing_keys'])}: expected "
            "a whole pretraining model, encoder and decoder."
        )
    told = load_pretraining(found.folder)
    slides = None if told is None else told[0]
    return Parent(found.hub or found.name, model.float(), STPatchProcessor.from_pretrained(found.folder), slides)


def extend_model(parent: STImageMAEForPreTraining, fields: dict[str, Any], num_genes: int, seed: int) -> Any:
    """The parent with rows for more genes.

    Known genes keep their rows bit for bit, new ones get random rows of the same scale; padding, the last row, is 0.

    Args:
        fields: of the config, which may change its objective. num_genes: of the vocabulary that extends the parent's.
    """
    config = STImageMAEConfig.from_dict(
        {**parent.config.to_dict(), **fields, "vocab_size": num_genes + 1, "pad_token_id": num_genes}
    )
    model = STImageMAEForPreTraining(config)
    known = parent.get_input_embeddings().weight.detach()[:-1]  # (known genes, D)
    state = {k: v for k, v in parent.state_dict().items() if not k.endswith("gene_embeddings.weight")}
    model.load_state_dict(state, strict=False)
    generator = torch.Generator().manual_seed(seed)
    scale = known.square().mean().sqrt()
    new = scale * torch.randn(num_genes - len(known), known.shape[1], generator=generator)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.cat([known, new, torch.zeros(1, known.shape[1])]))
    return model


def keep_statistics(parent: GeneVocabulary, extended: GeneVocabulary) -> GeneVocabulary:
    """`extended` with the parent's statistics for the genes that it knew, and its own for the others.

    So known genes enter the model as they always did. Shares of counts are relative: those of new genes are scaled as
    the known ones were, so that a panel's depth per known gene stays what it was.
    """
    known = len(parent)
    kept: dict[str, np.ndarray] = {}
    for name in ("mean", "deviation", "share"):
        before, now = getattr(parent, name), getattr(extended, name)
        if before is None or now is None:
            continue
        scale = 1.0
        if name == "share":
            counted = now[:known] > 0
            both = before[counted].sum(), now[:known][counted].sum()
            scale = both[0] / both[1] if min(both) > 0 else 1.0
        kept[name] = np.concatenate([before, now[known:] * np.float32(scale)])
    return extended.with_statistics(**kept)
