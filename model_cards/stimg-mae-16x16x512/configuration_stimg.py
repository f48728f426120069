# Copyright 2026 The stimg authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""STImageMAE configuration."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

MASK_UNITS = ("entry", "site", "mixed")
RECONSTRUCTIONS = ("product", "residual")
SAMPLE_UNITS = ("patch", "spot", "multi_spot", "slice")
POSITION_EMBEDDING_TYPES = ("window", "slide", "rotary")


@strict
class STImageMAEConfig(PreTrainedConfig):
    r"""Architecture and objective of an STImageMAE, a masked autoencoder over windows of a tissue slide.

    Args:
        window_size (`int`): Side S of the square training window, in sites. Any side works at inference.
        num_channels (`int`): Genes C drawn for a training window. Any number works at inference.
        vocab_size (`int`): Rows of the gene embedding table: `len(vocabulary) + 1`, the last one being padding.
        pad_token_id (`int`, *optional*): Row of the padding gene; `None` becomes `vocab_size - 1`.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size (`int`): The encoder.
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads, decoder_intermediate_size
            (`int`): The decoder, used in pretraining and reconstruction alone.
        mask_ratio (`float`): Share of a window's maskable entries (or sites) that pretraining hides.
        mask_unit (`str`): `"entry"` hides single (site, gene) entries; `"site"` hides whole sites, which the encoder
            then leaves out; `"mixed"` hides `mask_ratio` of the sites and then `mask_ratio` of the entries at the sites
            that are left, and hidden sites enter as mask tokens, so that they can be read from their surroundings.
        sample_unit (`str`): Which sites the model sees at a time: `"patch"`, a window; `"spot"`, one; `"multi_spot"`, a
            spot and its 16 nearest; `"slice"`, the whole slide. The last three are baselines of the first.
        reconstruction (`str`): How a masked entry is predicted. `"product"`: the site's decoded feature, projected,
            times the gene's embedding (Eq. 8). `"residual"`: that product, plus the mean of the gene's visible values
            at the other sites, weighted by attention between sites: the product only tells how the site differs.
        target_smoothing (`int`): What is to be predicted of a masked entry: 0, its value; from 1, the mean of the gene
            over the observed sites in the square of this radius around it, which holds less noise.
        position_embedding_type (`str`): `"window"` encodes a site's row and column within its window; `"slide"` its
            `coordinates` on the slide, 0 to 100 an axis; both are fixed 2-D sine-cosine codes that are added to a site.
            `"rotary"` turns queries and keys by row and column instead, and lets heads prefer sites nearby: how sites
            lie to each other is seen, and where in the window they lie is not.
        projection_size (`int`): Width of a linear projection of the outputs, which `embed_slide` takes; 0 = none.
            Pretraining fits it after the weights, so that directions in which neighbours differ count little. A power
            of two, at most `hidden_size`.
        embedding_defaults (`dict`, *optional*): What `embed_slide` does when not told: any of `stride`, `readout`,
            `gene_selection`, `num_channels`, `num_gene_draws`, `projected`, `smoothing`, `centered`.
    """

    model_type = "st_image_mae"

    window_size: int = 16
    num_channels: int = 512
    vocab_size: int = 20001
    pad_token_id: int | None = None
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 1024
    decoder_hidden_size: int = 128
    decoder_num_hidden_layers: int = 2
    decoder_num_attention_heads: int = 8
    decoder_intermediate_size: int = 512
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    mask_ratio: float | int = 0.3
    mask_unit: str = "entry"
    sample_unit: str = "patch"
    reconstruction: str = "product"
    target_smoothing: int = 0
    position_embedding_type: str = "window"
    projection_size: int = 0
    embedding_defaults: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a config of its fields.

        Raises:
            ValueError: they are of another model type, which transformers only warns of.
        """
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(f"The config is of a model of type {found!r}: expected {cls.model_type!r}.")
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs):
        # It names the pipeline's file in a repository, which transformers would load, and ask trust for, even where
        # the package has registered its own.
        if not __name__.startswith("transformers_modules."):
            kwargs.pop("custom_pipelines", None)
        if self.pad_token_id is None:
            self.pad_token_id = self.vocab_size - 1
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Check what types alone cannot: part of `@strict` validation, also after an attribute is set."""
        for width, heads in (
            ("hidden_size", "num_attention_heads"),
            ("decoder_hidden_size", "decoder_num_attention_heads"),
        ):
            if getattr(self, width) % getattr(self, heads) != 0:
                raise ValueError(
                    f"{width} ({getattr(self, width)}) is not a multiple of {heads} ({getattr(self, heads)}): "
                    "every attention head needs the same width."
                )
            if getattr(self, width) % 4 != 0:
                raise ValueError(
                    f"{width} ({getattr(self, width)}) is not a multiple of 4: the sine-cosine position code fills "
                    "it with four equal parts."
                )
            head_dim = getattr(self, width) // getattr(self, heads)
            if self.position_embedding_type == "rotary" and head_dim % 4 != 0:
                raise ValueError(
                    f"{width} ({getattr(self, width)}) over {heads} ({getattr(self, heads)}) is {head_dim}, not a "
                    "multiple of 4: rotary positions turn pairs of it, half with the row and half with the column."
                )
        if self.mask_unit not in MASK_UNITS:
            raise ValueError(f"mask_unit is {self.mask_unit!r}: expected one of {MASK_UNITS}.")
        if self.sample_unit not in SAMPLE_UNITS:
            raise ValueError(f"sample_unit is {self.sample_unit!r}: expected one of {SAMPLE_UNITS}.")
        if self.reconstruction not in RECONSTRUCTIONS:
            raise ValueError(f"reconstruction is {self.reconstruction!r}: expected one of {RECONSTRUCTIONS}.")
        if self.position_embedding_type not in POSITION_EMBEDDING_TYPES:
            raise ValueError(
                f"position_embedding_type is {self.position_embedding_type!r}: "
                f"expected one of {POSITION_EMBEDDING_TYPES}."
            )
        if not 0 <= self.mask_ratio <= 1:
            raise ValueError(f"mask_ratio is {self.mask_ratio}: expected a share between 0 and 1.")
        if self.projection_size and (
            self.projection_size & (self.projection_size - 1) or not 0 < self.projection_size <= self.hidden_size
        ):
            raise ValueError(
                f"projection_size is {self.projection_size}: expected 0 or a power of two up to hidden_size "
                f"({self.hidden_size})."
            )
        if self.target_smoothing < 0:
            raise ValueError(f"target_smoothing is {self.target_smoothing}: expected a radius in sites, from 0.")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id}: expected a row of the gene table, 0 to {self.vocab_size - 1}."
            )


__all__ = ["STImageMAEConfig"]
