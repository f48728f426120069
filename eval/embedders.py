"""Frozen models as embedders of slides: loaded, told apart by what their output depends on, run once a slide.

An `Embedder` is all that the feature table asks of a model; another kind of model needs these four things.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import set_seed

from data_processing.corpus import load_pretraining, slide_images
from data_processing.writing import write_whole
from eval.baselines.gene_token import load_gene_tokens, nearest_spots_mean
from eval.evaluation_sets import EvaluationSlide
from eval.provenance import seen
from modeling_stimg import SlideImage, STImageMAEModel, STPatchProcessor
from modeling_stimg.embedding_stimg import embedding_options, neighbourhood_means
from modeling_stimg.genes_stimg import VAR_ID_COLUMNS, VAR_NAME_COLUMNS, SlideGenes

RANDOM_START, SINGULAR_START = "untrained, random start", "untrained, singular start"
GENE_TOKENS = "gene tokens"
CACHE_FORMAT = 1  # raised when embeddings change though model and slide are the same


class Embedder(Protocol):
    """What the feature table asks of a model.

    Attributes:
        name: of its row. key: hash of everything, beside the slide, that its embeddings depend on.
    """

    name: str
    key: str

    def embed(self, slide: EvaluationSlide) -> np.ndarray:
        """float32 (n_obs, width), without any smoothing."""
        ...

    def seen(self, slide: EvaluationSlide) -> str | None:
        """What it saw of the slide in training, None where that has no meaning."""
        ...


@dataclass
class EncoderEmbedder:
    """A checkpoint, by its own `embedding_defaults` but for the smoothing.

    Attributes:
        name: of its row. model, processor: from one folder. corpus: slides that it saw; None = not told.
        learnt: whether anything of it comes from slides. has_default: whether it gets a row as `embed_slide` writes it.
        given: embedding options instead of the model's defaults. device: where to run. seed: of the gene draws.
        batch_size: windows at a time; None = the model's default.
    """

    name: str
    model: Any = field(repr=False)
    processor: STPatchProcessor = field(repr=False)
    corpus: list | None = field(repr=False, default=None)
    learnt: bool = True
    has_default: bool = True
    given: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    seed: int = 0
    batch_size: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What `embed_slide` does by default, or with the options given; smoothing included."""
        return embedding_options(self.model, self.processor, **self.given)

    @property
    def key(self) -> str:
        """Hash of weights, configuration, processor, options and seed."""
        digest = hashlib.sha256(f"{CACHE_FORMAT} {self.seed}".encode())
        for name, tensor in sorted(self.model.base_model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        vocabulary = self.processor.vocabulary
        digest.update("\n".join(map(str, vocabulary.gene_ids)).encode())
        for statistic in (vocabulary.mean, vocabulary.deviation, vocabulary.share):
            digest.update(b"-" if statistic is None else np.asarray(statistic, np.float64).tobytes())
        processor = {name: getattr(self.processor, name) for name in _PROCESSOR_OPTIONS}
        config = {k: v for k, v in self.model.config.to_dict().items() if k not in _CONFIG_LEFT_OUT}
        options = {**self.options, "smoothing": 0}
        digest.update(json.dumps([processor, config, options], sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def image(self, slide: EvaluationSlide) -> SlideImage:
        """The slide as its processor sees it."""
        return slide_images({slide.name: slide.adata}, self.processor)[0]

    def embed(self, slide: EvaluationSlide) -> np.ndarray:
        """float32 (n_obs, width), without any smoothing."""
        image = self.image(slide)
        options = {**self.given, "smoothing": 0, "device": self.device, "seed": self.seed}
        options |= {} if self.batch_size is None else {"batch_size": self.batch_size}
        embedding = self.model.embed(image, self.processor, **options, progress=True)
        return np.ascontiguousarray(embedding[image.spot_of_obs])

    def smoothed_by_default(self, slide: EvaluationSlide, embedding: np.ndarray) -> np.ndarray:
        """What `embed_slide` writes, from what `embed` gave: float32 (n_obs, width)."""
        if self.options["smoothing"] == 0:
            return embedding
        image = self.image(slide)
        features = embedding[image.obs_index].astype(np.float64)
        means = neighbourhood_means(image, features, self.options["smoothing"])
        return means.astype(np.float32)[image.spot_of_obs]

    def seen(self, slide: EvaluationSlide) -> str | None:
        """What it saw of the slide in pretraining."""
        return seen(slide.name, slide.adata, self.corpus, slide.patient) if self.learnt else None

    def is_smaller_than_window(self, slide: EvaluationSlide) -> bool:
        """Whether no window fits into the slide, so that all of them reach beyond it."""
        image = self.image(slide)
        return self.processor.sample_unit == "patch" and min(image.height, image.width) < self.processor.window_size


@dataclass
class NearestSpotsEmbedder:
    """Another embedder's output as the mean of the 16 nearest other spots': the paper's scGPT-spatial row.

    Attributes:
        name: of its row. of: the other embedder. embed_spots: its `embed`, cached or not.
    """

    name: str
    of: EncoderEmbedder
    embed_spots: Callable[[EvaluationSlide], np.ndarray] = field(repr=False)

    @property
    def key(self) -> str:
        """Hash of what the other one depends on."""
        return hashlib.sha256(f"16 nearest {self.of.key}".encode()).hexdigest()

    def embed(self, slide: EvaluationSlide) -> np.ndarray:
        """float32 (n_obs, width)."""
        image = self.of.image(slide)
        return nearest_spots_mean(self.embed_spots(slide)[image.obs_index], image)[image.spot_of_obs]

    def seen(self, slide: EvaluationSlide) -> str | None:
        """What the other one saw."""
        return self.of.seen(slide)


_PROCESSOR_OPTIONS = (
    *("window_size", "num_channels", "compaction", "gene_selection", "normalization", "target_sum", "min_observed"),
    "sample_unit",
)
_CONFIG_LEFT_OUT = {
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "auto_map"),
    "custom_pipelines",
}


def load_embedders(
    models: Sequence[tuple[str, str | Path]], readout: str | None = None, device: str | None = None, seed: int = 0
) -> list[EncoderEmbedder]:
    """The first model's untrained starts, then all models.

    The random start is drawn from `seed`. The singular start is read from the folder `untrained` where the model was
    started so; its gene vectors come from the slides that the model saw.

    Args:
        models: name and folder of each.

    Raises:
        ValueError: two models of one name, or one that is called like a baseline's row.
    """
    names = [name for name, _ in models]
    if len({*names, RANDOM_START, SINGULAR_START, GENE_TOKENS}) < len(names) + 3:
        raise ValueError(f"Models are called {names}: give every one a name of its own, as in --models name=folder.")
    common = {"given": {} if readout is None else {"readout": readout}, "device": device, "seed": seed}
    untrained, trained = [], []
    for position, (name, folder) in enumerate(models):
        processor = STPatchProcessor.from_pretrained(folder)
        model = STImageMAEModel.from_pretrained(folder)
        told = load_pretraining(Path(folder))
        corpus = None if told is None else told[0]
        trained.append(EncoderEmbedder(name, model, processor, corpus, **common))
        if position == 0:
            set_seed(seed)
            start = EncoderEmbedder(
                RANDOM_START, STImageMAEModel(model.config), processor, None, False, False, **common
            )
            untrained.append(start)
            told = load_pretraining(Path(folder) / "untrained")
            if told is not None and told[1]["singular_start"]:
                begun = STImageMAEModel.from_pretrained(Path(folder) / "untrained")
                untrained.append(EncoderEmbedder(SINGULAR_START, begun, processor, corpus, True, False, **common))
    return [*untrained, *trained]


def load_gene_token_embedders(folder: str, cache: Path, device: str | None = None, seed: int = 0) -> list[Embedder]:
    """The gene-token baseline as it is, and as the mean of the nearest spots.

    Args:
        folder: as eval/baselines/train_gene_token.py writes it. cache: for its embeddings, which both rows need.
    """
    model, processor = load_gene_tokens(folder)
    told = load_pretraining(Path(folder))
    corpus = None if told is None else told[0]
    tokens = EncoderEmbedder(GENE_TOKENS, model, processor, corpus, has_default=False, device=device, seed=seed)
    return [tokens, NearestSpotsEmbedder(f"{GENE_TOKENS}, 16 nearest", tokens, cached(tokens, cache))]


def slide_key(slide: EvaluationSlide) -> str:
    """Hash of everything of a slide that an embedding depends on: counts, gene names and array positions, in order."""
    adata = slide.adata
    counts = adata.X.tocsr() if hasattr(adata.X, "tocsr") else np.asarray(adata.X)
    digest = hashlib.sha256("\n".join(map(str, adata.var_names)).encode())
    if {*VAR_ID_COLUMNS, *VAR_NAME_COLUMNS} & {*adata.var}:  # which genes are matched by, too
        genes = SlideGenes.of(adata)
        digest.update(json.dumps([genes.ids, genes.symbols]).encode())
    arrays = [counts] if isinstance(counts, np.ndarray) else [counts.indptr, counts.indices, counts.data]
    for array in (*arrays, adata.obs["array_row"].to_numpy(), adata.obs["array_col"].to_numpy()):
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def cached(embedder: Embedder, folder: Path) -> Callable[[EvaluationSlide], np.ndarray]:
    """`embedder.embed`, each slide once: what it gave lies in `folder` under a hash of model, options and slide.

    A file that is damaged, or not of the slide's length, is made again.
    """
    model_key = embedder.key

    def embed(slide: EvaluationSlide) -> np.ndarray:
        name = hashlib.sha256(f"{model_key} {slide_key(slide)}".encode()).hexdigest()[:32]
        path = folder / f"{name}.npy"
        if path.exists():
            try:
                found = np.load(path, allow_pickle=False)
            except (ValueError, OSError, EOFError):
                found = np.empty(0)
            if found.ndim == 2 and found.dtype == np.float32 and len(found) == slide.adata.n_obs:
                return found
        embedding = np.ascontiguousarray(embedder.embed(slide), dtype=np.float32)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, _npy(embedding))
        return embedding

    return embed


def _npy(array: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
