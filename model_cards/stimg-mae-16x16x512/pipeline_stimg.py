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
"""`transformers.pipeline("st-feature-extraction", model=...)`: slides in, embeddings of their spots out."""

import inspect
import re
from types import GeneratorType
from typing import Any

import numpy as np
from transformers import Pipeline

from .embedding_stimg import embed_image
from .processing_stimg import STPatchProcessor
from .slide_image_stimg import SlideImage

TASK = "st-feature-extraction"
# What embed_image is told, but for what the pipeline has: the model, its processor, the slide, and where it runs.
OPTIONS = tuple(name for name in list(inspect.signature(embed_image).parameters)[3:] if name != "device")


class STFeatureExtractionPipeline(Pipeline):
    """Embeds every spot of slides, with the bits that `embed_slide` writes.

    ```python
    pipe = transformers.pipeline("st-feature-extraction", model="ORG/NAME", trust_remote_code=True)
    embedding = pipe(adata)  # float32 (n_obs, width)
    ```

    Args:
        model: an `STImageMAEModel`. image_processor: its processor; None: the one of the model's folder or repository.
        stride, readout, gene_selection, num_channels, num_gene_draws, smoothing, centered, projected, batch_size, seed,
            progress: as in `embed_image`; what is not given is as in the model's `config.embedding_defaults`. Also
            taken by the call.

    Raises:
        ValueError: an option that does not exist, or a model of another type.
    """

    _load_tokenizer = False
    _load_feature_extractor = False
    _load_processor = False
    _load_video_processor = False
    # AutoImageProcessor asks for Pillow, or torchvision, and where it finds none, __init__ loads the processor.
    _load_image_processor = None

    def __init__(self, model: Any, image_processor: Any = None, **kwargs: Any):
        if not hasattr(model, "embed"):
            raise ValueError(
                f"{model.name_or_path} is a model of type {model.config.model_type!r}: the {TASK} pipeline expects an "
                "STImageMAE."
            )
        if image_processor is None:
            image_processor = STPatchProcessor.from_pretrained(model.name_or_path, **_revision_of(model))
        # Loading puts classes there, which no config.json can hold.
        if getattr(model.config, "custom_pipelines", None) is not None:
            model.config.custom_pipelines = custom_pipelines()
        super().__init__(model=model, image_processor=image_processor, **kwargs)

    def __call__(self, inputs: Any, batch_size: int | None = None, **options: Any) -> Any:
        """Embed one slide or many.

        Args:
            inputs: a slide, raw counts in `X` and integer `obs["array_row"]`, `obs["array_col"]` (as `read_slide` gives
                it); or a `SlideImage`; or a list or generator of these.
            batch_size: windows at a time.
            options: as in the class.

        Returns:
            float32 (n_obs, width) in the order of `obs`; of a list a list, of a generator a generator.

        Raises:
            ValueError: no raw counts, no array positions, too few genes that the model knows, or a wrong option.
        """
        if batch_size is not None:
            options["batch_size"] = batch_size
        self._sanitize_parameters(**options)
        if isinstance(inputs, list | tuple):
            return [self(slide, **options) for slide in inputs]
        if isinstance(inputs, GeneratorType):
            return (self(slide, **options) for slide in inputs)
        if self._batch_size is not None:
            options.setdefault("batch_size", self._batch_size)
        # transformers' own batch size counts slides.
        _, forward, _ = self._sanitize_parameters(**options)
        return self.run_single(inputs, {}, {**self._forward_params, **forward}, {})

    def _sanitize_parameters(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise ValueError(f"Unknown options {unknown} of the {TASK} pipeline: expected any of {OPTIONS}.")
        return {}, options, {}

    def preprocess(self, slide: Any) -> dict[str, Any]:
        """A slide on its grid; spots that share an array position share an embedding."""
        if isinstance(slide, SlideImage) or type(slide).__name__ == "SlideImage":
            return {"image": slide}
        if not hasattr(slide, "obs") and not hasattr(slide, "keys"):
            raise ValueError(
                f"Got a {type(slide).__name__}: expected an AnnData with raw counts and array positions, or a "
                "SlideImage; modeling_stimg.read_slide reads files."
            )
        return {"image": self.image_processor.slide_to_image(slide, on_duplicate="first")}

    def _forward(self, inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
        return {**inputs, "embedding": self.model.embed(inputs["image"], self.image_processor, **options)}

    def postprocess(self, outputs: dict[str, Any]) -> np.ndarray:
        """float32 (n_obs, width): the embedding of every row of the source."""
        return np.ascontiguousarray(outputs["embedding"][outputs["image"].spot_of_obs])


def _revision_of(model: Any) -> dict[str, str]:
    """`revision=` the commit of the Hub that a model is from, where it can be told: its code is kept under its name."""
    known = [getattr(model.config, "_commit_hash", None) or "", *type(model).__module__.split(".")]
    commit = next((name for name in known if re.fullmatch("[0-9a-f]{40}", name)), None)
    return {} if commit is None else {"revision": commit}


def custom_pipelines() -> dict[str, Any]:
    """The entry of `config.json` from which transformers finds the pipeline in a repository."""
    impl = f"{__name__.rpartition('.')[2]}.{STFeatureExtractionPipeline.__name__}"
    return {TASK: {"impl": impl, "pt": ["AutoModel"]}}


__all__ = ["TASK", "STFeatureExtractionPipeline", "custom_pipelines"]
