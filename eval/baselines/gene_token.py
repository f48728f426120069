"""A gene-token model: one spot is one sentence, its genes are the words. The paper's scGPT rows, trained by ourselves.

Own implementation of the idea (scGPT, Cui et al. 2024): a gene enters as the sum of who it is and how much of it there
is, a token of its own stands for the spot, and values that are hidden are predicted. Depth, width and layers are those
of the encoder that it is compared with; what differs is what a token is. Nothing here knows where a spot lies.

It answers to the same calls as an `STImageMAEModel` of the sample unit `"spot"`, whose batches it reads: windows of one
site, (B, C, 1, 1). So the window dataset, the Trainer, `embed_image` and the probes take it as it is.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from modeling_stimg import SlideImage, STPatchProcessor
from modeling_stimg.embedding_stimg import embed_image
from modeling_stimg.layers_stimg import STImageMAELayer
from modeling_stimg.masking_stimg import default_masks, draw_mask, hidden_entries, masked_mean_squared_error
from modeling_stimg.sample_units_stimg import NUM_NEIGHBOURS


@strict
class GeneTokenConfig(PreTrainedConfig):
    r"""Architecture and objective of a gene-token model; the encoder's fields mean what they do in STImageMAEConfig.

    Args:
        num_tokens (`int`): Genes drawn for a spot in training, a token each. Any number works at inference.
        vocab_size (`int`): Rows of the gene table: `len(vocabulary) + 1`, the last one being padding.
        mask_ratio (`float`): Share of a spot's genes whose value is hidden in training.
    """

    model_type = "gene_token"

    num_tokens: int = 256
    vocab_size: int = 20001
    pad_token_id: int | None = None
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 1024
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    mask_ratio: float | int = 0.3
    embedding_defaults: dict[str, Any] | None = None
    # What the Trainer, `embed_image` and the layers ask of a model; there is no other choice here, and no position.
    mask_unit: str = "entry"
    position_embedding_type: str = "window"
    projection_size: int = 0
    sample_unit: str = "spot"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.pad_token_id is None:
            self.pad_token_id = self.vocab_size - 1
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check what types alone cannot."""
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                f"({self.num_attention_heads}): every attention head needs the same width."
            )
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens is {self.num_tokens}: expected at least one gene a spot.")
        if not 0 <= self.mask_ratio <= 1:
            raise ValueError(f"mask_ratio is {self.mask_ratio}: expected a share between 0 and 1.")
        if (self.mask_unit, self.sample_unit) != ("entry", "spot"):
            raise ValueError(
                f"mask_unit is {self.mask_unit!r} and sample_unit {self.sample_unit!r}: a gene-token model hides "
                "single values ('entry') of single spots ('spot')."
            )


@dataclass
class GeneTokenForPreTrainingOutput(ModelOutput):
    """Output of `GeneTokenForPreTraining`.

    Args:
        loss: float (). Mean squared error over hidden values, of the genes' own predictions plus of the spot token's.
        reconstruction: float (B, C, 1, 1), every gene's value, read from its own token. mask: bool, True = was hidden.
        spot_reconstruction: float (B, C, 1, 1), the same values, read from the spot token.
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    spot_reconstruction: torch.Tensor | None = None


class GeneTokenEmbeddings(nn.Module):
    """Genes to tokens: who it is plus how much of it there is, and before them the token of the spot."""

    def __init__(self, config: GeneTokenConfig):
        super().__init__()
        width = config.hidden_size
        self.gene_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.gene_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.value_in = nn.Linear(1, width)
        self.value_out = nn.Linear(width, width)
        self.value_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.hidden_value = nn.Parameter(torch.zeros(width))
        self.spot_token = nn.Parameter(torch.zeros(width))

    def forward(self, values: torch.Tensor, gene_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Tokens float (B, 1 + C, D), the spot's first, of values float (B, C), bool (B, C) of them hidden."""
        seen = values.masked_fill(hidden, 0)[..., None].to(self.value_in.weight.dtype)  # (B, C, 1)
        amounts = self.value_layernorm(self.value_out(nn.functional.gelu(self.value_in(seen))))
        amounts = torch.where(hidden[..., None], self.hidden_value.to(amounts.dtype), amounts)
        genes = self.gene_layernorm(self.gene_embeddings(gene_ids)) + amounts  # (B, C, D)
        return torch.cat([self.spot_token.to(genes.dtype).expand(len(genes), 1, -1), genes], dim=1)


class GeneTokenPreTrainedModel(PreTrainedModel):
    """Weights, files and defaults that both models share."""

    config: GeneTokenConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    # The loss is a mean over spots already: the Trainer has to average it over accumulation steps itself.
    accepts_loss_kwargs = False
    _no_split_modules = ["GeneTokenEmbeddings", "STImageMAELayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GeneTokenEmbeddings):
            init.normal_(module.hidden_value, std=self.config.initializer_range)
            init.normal_(module.spot_token, std=self.config.initializer_range)
            # Bends all over the range of values: from a start near 0 the layer norm would leave of a value its sign.
            init.normal_(module.value_in.weight, std=1.0)
            init.normal_(module.value_in.bias, std=1.0)

    def embed(self, image: SlideImage, processor: STPatchProcessor, **options: Any) -> np.ndarray:
        """Embed every spot; see `embed_gene_tokens`."""
        return embed_gene_tokens(self, processor, image, **options)


class GeneTokenModel(GeneTokenPreTrainedModel):
    """The encoder: the genes of a spot to one vector for the spot, and one for each gene."""

    _keys_to_ignore_on_load_unexpected = [r"^(value_head|spot_head)\."]  # noqa: RUF012

    def __init__(self, config: GeneTokenConfig):
        super().__init__(config)
        self.embeddings = GeneTokenEmbeddings(config)
        self.layers = nn.ModuleList(
            STImageMAELayer(config, config.hidden_size, config.num_attention_heads, config.intermediate_size)
            for _ in range(config.num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.gene_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.gene_embeddings = value

    def encode(self, values: torch.Tensor, gene_ids: torch.Tensor, measured: torch.Tensor, hidden: torch.Tensor) -> Any:
        """Float (B, 1 + C, D): the spot token first, then the genes, padded ones among them.

        Args:
            values: float (B, C). gene_ids: int64 (B, C). measured: bool (B, C), False = padding, which nobody attends
                to. hidden: bool (B, C), genes of which nothing but their name enters.
        """
        hidden_states = self.embeddings(values, gene_ids, hidden | ~measured)
        keys = nn.functional.pad(measured, (1, 0), value=True)  # the spot token is always there
        attention_mask = create_bidirectional_mask(self.config, hidden_states, keys)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask)
        return self.layernorm(hidden_states)

    def forward(
        self,
        pixel_values: torch.Tensor,
        gene_ids: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        channel_mask: torch.Tensor | None = None,
        coordinates: torch.Tensor | None = None,
        bool_masked_entries: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """The spot token's output, as `last_hidden_state` float (B, 1, D), one site, and `pooler_output` (B, D).

        Args:
            pixel_values: float (B, C, 1, 1). gene_ids: int64 (B, C). channel_mask: bool (B, C), True = measured.
            bool_masked_entries: bool (B, C, 1, 1), True = hidden; None: nothing is.
            pixel_mask, coordinates: of a batch of windows; not looked at, a spot is all that a sample has.

        Raises:
            ValueError: windows of more than one site.
        """
        values, measured, hidden = spot_values(
            self.config, pixel_values, gene_ids, pixel_mask, channel_mask, bool_masked_entries
        )
        spot = self.encode(values, gene_ids, measured, hidden)[:, :1]
        return BaseModelOutputWithPooling(last_hidden_state=spot, pooler_output=spot[:, 0])


class GeneTokenForPreTraining(GeneTokenPreTrainedModel):
    """Encoder and two readings of hidden values: from the gene's own token, and from the spot token.

    The second, the spot token's projection times the gene's embedding, is what trains the spot token: the first alone
    would never ask what it holds. (scGPT has the same pair of objectives.)
    """

    def __init__(self, config: GeneTokenConfig):
        super().__init__(config)
        width = config.hidden_size
        self.encoder = GeneTokenModel(config)
        self.value_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        self.spot_head = nn.Linear(width, width)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.encoder.set_input_embeddings(value)

    def forward(
        self,
        pixel_values: torch.Tensor,
        gene_ids: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        channel_mask: torch.Tensor | None = None,
        coordinates: torch.Tensor | None = None,
        bool_masked_entries: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> GeneTokenForPreTrainingOutput:
        """Hide values and predict them.

        Args:
            pixel_values, gene_ids, pixel_mask, channel_mask, coordinates: as for `GeneTokenModel`.
            bool_masked_entries: bool (B, C, 1, 1), the mask itself. noise: float (B, C, 1, 1) in [0, 1), otherwise:
                the lowest `round(mask_ratio * n)` of a spot's n genes are hidden; None: from the global generator.
        """
        if bool_masked_entries is None:
            noise = torch.rand(pixel_values.shape, device=pixel_values.device) if noise is None else noise
            pixel_mask, channel_mask = default_masks(
                self.config.pad_token_id, pixel_values, gene_ids, pixel_mask, channel_mask
            )
            mask = draw_mask(noise, channel_mask, pixel_mask, self.config.mask_ratio, self.config.mask_unit)
        else:
            mask = bool_masked_entries.bool()
        values, measured, hidden = spot_values(self.config, pixel_values, gene_ids, pixel_mask, channel_mask, mask)
        encoded = self.encoder.encode(values, gene_ids, measured, hidden)
        own = self.value_head(encoded[:, 1:])[..., None]  # (B, C, 1, 1)
        genes = self.get_input_embeddings()(gene_ids).to(encoded.dtype)  # (B, C, D)
        of_spot = (genes @ self.spot_head(encoded[:, 0])[..., None])[..., None]  # (B, C, 1, 1)
        mask = (hidden & measured)[..., None, None]
        return GeneTokenForPreTrainingOutput(
            loss=sum(masked_mean_squared_error(predicted, pixel_values, mask) for predicted in (own, of_spot)),
            reconstruction=own,
            mask=mask,
            spot_reconstruction=of_spot,
        )


def spot_values(
    config: GeneTokenConfig,
    pixel_values: torch.Tensor,
    gene_ids: torch.Tensor,
    pixel_mask: torch.Tensor | None,
    channel_mask: torch.Tensor | None,
    bool_masked_entries: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values float (B, C), measured bool (B, C) and hidden bool (B, C) of windows of one site.

    Raises:
        ValueError: windows of more than one site.
    """
    _, channel_mask = default_masks(config.pad_token_id, pixel_values, gene_ids, pixel_mask, channel_mask)
    if pixel_values.shape[2:] != (1, 1):
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}: a gene-token model reads single spots, (B, C, 1, 1); "
            'make them with sample_unit="spot".'
        )
    hidden = hidden_entries(channel_mask, bool_masked_entries)[..., 0]
    return pixel_values[:, :, 0, 0], channel_mask, hidden.expand_as(channel_mask)


# ---------------------------------------------------------------------------- from a folder to embeddings


def load_gene_tokens(folder: str | Path) -> tuple[GeneTokenModel, STPatchProcessor]:
    """The encoder and the processor that `train_gene_token.py` wrote.

    Raises:
        OSError: nothing there. ValueError: another kind of model, or weights that are missing.
    """
    kind = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    if kind != GeneTokenConfig.model_type:
        raise ValueError(
            f"{folder} holds {kind or 'no model'}: expected a gene-token model, as "
            "eval/baselines/train_gene_token.py writes it."
        )
    model, info = GeneTokenModel.from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{folder} lacks {len(info['missing_keys'])} tensors of the model: train it again.")
    return model.eval(), STPatchProcessor.from_pretrained(folder)


def embed_gene_tokens(
    model: GeneTokenPreTrainedModel,
    processor: STPatchProcessor,
    image: SlideImage,
    gene_selection: str | None = None,
    num_gene_draws: int | None = None,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    seed: int = 0,
    **options: Any,
) -> np.ndarray:
    """The output of the spot token for every spot of a slide, nothing hidden.

    Genes become tokens as in training: drawn anew for every spot, by the processor's rule, here from `seed` and the
    spot's number, so that the same call gives the same bits.

    Args:
        gene_selection: another rule than the processor's: `"weighted"`, `"variable"` (the slide's most variable genes,
            the same for all spots) or `"random"`.
        num_gene_draws: how many draws to average; 1 where neither given nor a default of the model.
        batch_size: spots at a time.
        device: where to run; None = where the model is.
        options: further ones of `embed_image`, such as `smoothing`.

    Returns:
        float32 (num_spots, hidden_size), in the image's order of spots.
    """
    at_a_time = max(1, batch_size // processor.window_size**2)  # `embed_image` counts in windows
    return embed_image(
        model,
        processor,
        image,
        gene_selection=gene_selection,
        num_gene_draws=num_gene_draws,
        batch_size=at_a_time,
        device=device,
        seed=seed,
        **options,
    )


def nearest_spots_mean(features: np.ndarray, image: SlideImage, k: int = NUM_NEIGHBOURS) -> np.ndarray:
    """Mean over the `k` nearest spots of each spot, itself left out: the paper's scGPT-spatial row.

    Nearest on the grid, by Euclidean distance; of equally distant spots the upper, then the left one comes first, as
    in the sample unit `"multi_spot"`.

    Args:
        features: float (num_spots, width), in the image's order of spots.

    Returns:
        float32 (num_spots, width).

    Raises:
        ValueError: features of other spots, or no `k` others.
    """
    features = np.asarray(features)
    if features.ndim != 2 or len(features) != image.num_spots:
        raise ValueError(f"features has shape {features.shape}: expected a row for each of {image.num_spots} spots.")
    if not 1 <= k < image.num_spots:
        raise ValueError(
            f"{image.name} has {image.num_spots} spots: a mean over the {k} nearest others needs at least "
            f"{max(k, 1) + 1} spots, and k from 1."
        )
    down, right = (axis.ravel() for axis in np.mgrid[1 - image.height : image.height, 1 - image.width : image.width])
    order = np.argsort(down**2 + right**2, kind="stable")[1:]  # the first is the spot itself
    total = np.zeros(features.shape, dtype=np.float64)
    missing = np.full(image.num_spots, k)
    waiting = np.arange(image.num_spots)
    for step in order:
        rows, cols = image.rows[waiting] + down[step], image.cols[waiting] + right[step]
        inside = (rows >= 0) & (rows < image.height) & (cols >= 0) & (cols < image.width)
        neighbour = np.full(len(waiting), -1)
        neighbour[inside] = image.spot_grid[rows[inside], cols[inside]]
        there = neighbour >= 0
        total[waiting[there]] += features[neighbour[there]]
        missing[waiting[there]] -= 1
        waiting = waiting[missing[waiting] > 0]
        if not len(waiting):
            break
    return (total / k).astype(np.float32)
