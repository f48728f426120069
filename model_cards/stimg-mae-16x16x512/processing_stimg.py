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
"""STPatchProcessor: slides and windows of slides as model input."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs

from .compaction_stimg import COMPACTIONS
from .configuration_stimg import SAMPLE_UNITS
from .corpus_row_stimg import slide_image_from_row
from .counts_stimg import PANEL
from .genes_stimg import GENES_FILE, GeneVocabulary
from .sample_units_stimg import draw_samples, sample_side, sample_spots
from .sampling_stimg import GENE_SELECTIONS, make_windows
from .slide_image_stimg import SlideImage, slide_image_from_adata, usable_device


@dataclass(frozen=True)
class Normalization:
    """What becomes of log1p values on their way into the model.

    Attributes:
        apply: takes `pixel_values` float32 (B, C, S, S), which it may overwrite, and each of `statistics`, float32
            (B, C, 1, 1), by name; returns float32 (B, C, S, S). Empty sites and padded channels are set to 0 after it.
            None: the values as they are.
        statistics: what it needs of every gene, attributes of the vocabulary.
        of_slide: what it needs of every gene of a slide: attributes of the image, by the name that `apply` gives them.
        invert: what the model predicts back to log1p values: takes float64 (n, genes), and each of `statistics`,
            float64 (genes,), by name. None: the values as they are.
    """

    apply: Callable[..., torch.Tensor] | None = None
    statistics: tuple[str, ...] = ()
    invert: Callable[..., np.ndarray] | None = None
    of_slide: Mapping[str, str] = field(default_factory=dict)


def standardize(pixel_values: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """(value - mean) / deviation, by gene."""
    return pixel_values.sub_(mean).div_(deviation)


def destandardize(values: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """value * deviation + mean, by gene."""
    return values * deviation + mean


# A further one is a further entry.
NORMALIZATIONS = {
    "log1p": Normalization(),
    "standardized": Normalization(standardize, ("mean", "deviation"), destandardize),
    "centered": Normalization(standardize, ("deviation",), destandardize, {"mean": "gene_means"}),
}
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def _whole_number(name: str, value: Any, least: int) -> int:
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} is {value!r}: expected a whole number from {least}.")
    return int(value)


class STPatchProcessorKwargs(ImagesKwargs, total=False):
    """What may be changed when a processor is loaded; see `STPatchProcessor`."""

    window_size: int
    num_channels: int
    compaction: str
    gene_selection: str
    normalization: str
    target_sum: float | str
    min_observed: float
    sample_unit: str


class STPatchProcessor(BaseImageProcessor):
    r"""Turns a slide into a `SlideImage`, and a `SlideImage` into batches of windows.

    Args:
        vocabulary: the genes that the model knows.
        window_size: side S of a window, in sites.
        num_channels: genes C of a window.
        compaction: how array indices become a grid: `"lattice"`, `"rank"` or `"minmax"`.
        gene_selection: how a window's genes are chosen: `"weighted"` by their variances in the window, the most
            `"variable"` ones in it, `"random"`, or `"slide"`: the most variable ones of the slide, all windows alike.
        normalization: `"log1p"` values, or at observed spots `"standardized"` ones: less the gene's corpus mean, over
            its corpus deviation (needs both in the vocabulary); or `"centered"` ones: less the gene's mean on the
            slide, over its corpus deviation, so that slides differ by what varies on them, and not by how they were
            made. Genes are selected by log1p variance either way.
        target_sum: counts per spot after depth normalisation, before log1p. `"panel"`, for slides on which only some
            genes were measured: 10,000 times the share of all counts that the corpus expects from those genes (needs
            `share` in the vocabulary), so that their values are those of a whole transcriptome.
        min_observed: share of a drawn window's sites that should hold a spot.
        sample_unit: which sites make a sample, as in the model's config. `"spot"` weighs genes by their variance over
            the slide, because within one spot nothing varies.

    Raises:
        ValueError: an option outside its range, or statistics that the vocabulary lacks.
    """

    model_input_names = ["pixel_values", "gene_ids", "channel_mask", "pixel_mask", "coordinates"]  # noqa: RUF012
    valid_kwargs = STPatchProcessorKwargs

    def __init__(
        self,
        vocabulary: GeneVocabulary,
        window_size: int = 16,
        num_channels: int = 512,
        compaction: str = "lattice",
        gene_selection: str = "weighted",
        normalization: str = "log1p",
        target_sum: float | str = 1e4,
        min_observed: float = 0.2,
        sample_unit: str = "patch",
        **kwargs: Any,
    ):
        known = set(STPatchProcessorKwargs.__annotations__)
        for name in kwargs:
            meant = get_close_matches(name, sorted(known - set(ImagesKwargs.__annotations__)), 1, 0.8)
            if meant and name not in known:  # any other name is kept, as transformers does
                raise ValueError(f"There is no option {name}: {meant[0]} is meant?")
        super().__init__(**kwargs)
        self.vocabulary = vocabulary
        self.window_size = window_size
        self.num_channels = num_channels
        self.compaction = compaction
        self.gene_selection = gene_selection
        self.normalization = normalization
        self.target_sum = target_sum
        self.min_observed = min_observed
        self.sample_unit = sample_unit
        self._statistics: dict[tuple[str, torch.device], tuple[np.ndarray, torch.Tensor]] = {}
        self._check_options()

    def _check_options(self) -> None:
        for name, allowed in (
            ("compaction", COMPACTIONS),
            ("gene_selection", GENE_SELECTIONS),
            ("normalization", tuple(NORMALIZATIONS)),
            ("sample_unit", SAMPLE_UNITS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {allowed}.")
        for name in ("window_size", "num_channels"):
            setattr(self, name, _whole_number(name, getattr(self, name), 1))
        number = isinstance(self.target_sum, Real) and 0 < self.target_sum < math.inf
        if not number and self.target_sum != PANEL:
            raise ValueError(f'target_sum is {self.target_sum!r}: expected a positive number or "{PANEL}".')
        if number:
            self.target_sum = float(self.target_sum)
        if not 0 <= self.min_observed <= 1:
            raise ValueError(f"min_observed is {self.min_observed}: expected a share between 0 and 1.")
        needed = {f'normalization="{self.normalization}"': NORMALIZATIONS[self.normalization].statistics}
        if self.target_sum == PANEL:
            needed[f'target_sum="{PANEL}"'] = ("share",)
        for option, statistics in needed.items():
            missing = [name for name in statistics if getattr(self.vocabulary, name) is None]
            if missing:
                raise ValueError(
                    f"{option} needs the {' and '.join(missing)} of every gene, which the vocabulary has not: compute "
                    "them on the corpus (data_processing/gene_statistics.py), or leave the option out."
                )

    # ---------------------------------------------------------------- slide -> image

    def slide_to_image(self, adata: Any, on_duplicate: str = "error", name: str = "slide") -> SlideImage:
        """Compact a slide, match its genes and normalise its counts.

        Args:
            adata: a slide as `read_slide` gives it, an AnnData with raw counts in `X` and integer `obs["array_row"]`,
                `["array_col"]`; or a row of a corpus, a mapping (see `slide_image_from_row`), whose counts are
                normalised when windows are made of them.
            on_duplicate: two spots on one array position are an `"error"`, or the `"first"` is kept and the others
                share its embedding, with one warning that counts them.
            name: what messages call the slide; a corpus row has its own.

        Raises:
            ValueError: no raw counts, no array indices, too few genes known, or spots on one position.
        """
        if isinstance(adata, Mapping):
            return slide_image_from_row(adata, self.vocabulary, self.compaction, self.target_sum)
        return slide_image_from_adata(adata, self.vocabulary, self.compaction, self.target_sum, on_duplicate, name)

    # ---------------------------------------------------------------- image -> windows

    def __call__(self, image: SlideImage, *args: Any, **kwargs: Any) -> BatchFeature:
        """Same as `preprocess`."""
        return self.preprocess(image, *args, **kwargs)

    def preprocess(
        self,
        image: SlideImage,
        num_windows: int | None = None,
        windows: Sequence[tuple[int, int]] | None = None,
        seed: int = 0,
        genes: Sequence[str] | Sequence[int] | np.ndarray | None = None,
        gene_selection: str | None = None,
        window_size: int | None = None,
        first_window: int = 0,
        device: str | torch.device = "cpu",
        return_tensors: str | None = None,
        num_channels: int | None = None,
    ) -> BatchFeature:
        """Draw windows of a slide and make them dense.

        Window `i` of the batch has the number `first_window + i`; what is drawn for it depends on `seed`, its number
        and the slide alone.

        Args:
            image: from `slide_to_image`.
            num_windows: how many windows to draw (1 when neither this nor `windows` is given).
            windows: (top, left) of every window, instead of drawing them; of a `"multi_spot"` sample that of the window
                in whose centre (`window_size // 2`) its spot stands.
            seed: int from 0.
            genes: names or vocabulary numbers that fix the channels, instead of selecting them for each window; those
                that were not measured on the slide become padding.
            gene_selection, window_size, num_channels: instead of the processor's own.
            first_window: number of the first window.
            device: where the windows are made and stay; the slide's arrays are put there once. The draws are the same
                everywhere. Another than the CPU needs `return_tensors="pt"`.
            return_tensors: `"pt"`, `"np"`, or None for NumPy.

        Returns:
            `pixel_values` float32 (B, C, S, S), 0 where empty or padded; `gene_ids` int64 (B, C), `pad_id` where
            padded; `channel_mask` bool (B, C); `pixel_mask` bool (B, S, S), True = observed; `coordinates` float32
            (B, S, S, 2), row and column in [0, 100]; `spot_index` int64 (B, S, S) into the image's spots, -1 = empty.

        Raises:
            ValueError: windows outside the slide, or given beside `num_windows`; unknown or repeated genes; an unknown
                `gene_selection`; a number that is not whole or too low; a device that cannot be used.
        """
        if not isinstance(image, SlideImage) and type(image).__name__ != "SlideImage":
            raise ValueError(
                f"Got a {type(image).__name__}: expected a SlideImage; make one with processor.slide_to_image(adata)."
            )
        seed, first_window = (_whole_number(*pair, 0) for pair in (("seed", seed), ("first_window", first_window)))
        if return_tensors != "pt" and device != "cpu" and usable_device(device).type != "cpu":
            raise ValueError(f'device is "{device}" and return_tensors {return_tensors!r}: expected "pt" there.')
        size = self.window_size if window_size is None else _whole_number("window_size", window_size, 1)
        size = sample_side(image, self.sample_unit, size)
        corners = self._corners(image, num_windows, windows, size, seed, first_window)
        arrays = make_windows(
            image,
            sample_spots(image, self.sample_unit, corners, size),
            self.num_channels if num_channels is None else _whole_number("num_channels", num_channels, 1),
            self.gene_selection if gene_selection is None else gene_selection,
            seed,
            range(first_window, first_window + len(corners)),
            None if genes is None else self.gene_numbers(genes),
            device,
            slide_variances=self.sample_unit == "spot",
        )
        arrays["pixel_values"] = self.normalize(arrays, image)
        if return_tensors != "pt":
            arrays = {key: value.numpy() for key, value in arrays.items()}
        return BatchFeature(data=arrays, tensor_type=return_tensors)

    def _corners(
        self,
        image: SlideImage,
        num_windows: int | None,
        windows: Sequence[tuple[int, int]] | None,
        size: int,
        seed: int,
        first_window: int,
    ) -> list[tuple[int, int]]:
        if windows is None:
            count = 1 if num_windows is None else _whole_number("num_windows", num_windows, 0)
            numbers = range(first_window, first_window + count)
            corners = draw_samples(image, self.sample_unit, size, self.min_observed, seed, numbers)
        else:
            if num_windows is not None:
                raise ValueError("Both num_windows and windows are given: pass one of them.")
            places = np.asarray(windows)
            if places.size and (places.ndim != 2 or places.shape[1] != 2 or places.dtype.kind not in "iu"):
                raise ValueError(f"windows has shape {places.shape}, type {places.dtype}: expected integers (B, 2).")
            corners = [(top, left) for top, left in places.tolist()]
        if not corners:
            raise ValueError("No windows were asked for: num_windows or windows must give at least one.")
        reach = size // 2 if self.sample_unit == "multi_spot" else 0
        outside = [c for c in corners if not (0 <= c[0] + reach < image.height and 0 <= c[1] + reach < image.width)]
        if outside:
            raise ValueError(
                f"Window corner {outside[0]} lies outside {image!r}: expected (top, left) within its sites."
            )
        return corners

    def gene_numbers(self, genes: Sequence[str] | Sequence[int] | np.ndarray) -> np.ndarray:
        """Vocabulary numbers int64 (C,) of genes given by name or number.

        Raises:
            ValueError: a gene that the vocabulary lacks, or one that is given twice.
        """
        given = np.asarray(genes)
        if given.ndim != 1:
            raise ValueError(f"genes has shape {given.shape}: expected a list of names or of vocabulary numbers.")
        numbers = given.astype(np.int64) if given.dtype.kind in "iu" else self.vocabulary.encode(given.tolist())
        unknown = (numbers < 0) | (numbers >= len(self.vocabulary))
        if unknown.any():
            raise ValueError(
                f"{int(unknown.sum())} of {len(numbers)} genes are not in the vocabulary, e.g. "
                f"{given[unknown].tolist()[0]!r}: it holds {len(self.vocabulary):,} genes; see processor.vocabulary."
            )
        if len(np.unique(numbers)) < len(numbers):
            raise ValueError(f"{len(numbers) - len(np.unique(numbers))} genes are given twice: name each of them once.")
        return numbers

    def normalize(self, arrays: Mapping[str, torch.Tensor], image: SlideImage) -> torch.Tensor:
        """What the model sees of log1p values, float32 (B, C, S, S); empty sites and padded channels are 0.

        Args:
            arrays: `pixel_values` float32 (B, C, S, S), which may be overwritten, and `gene_ids`, `channel_mask` and
                `pixel_mask` as in a batch. image: the slide.
        """
        normalization = NORMALIZATIONS[self.normalization]
        if normalization.apply is None:
            return arrays["pixel_values"]
        gene_ids = arrays["gene_ids"]
        of_gene = {name: self._statistic(name, gene_ids.device)[gene_ids] for name in normalization.statistics}
        for name, of_slide in normalization.of_slide.items():
            values = np.append(getattr(image, of_slide), np.float32(0))
            of_gene[name] = torch.from_numpy(values).to(gene_ids.device)[gene_ids]
        values = normalization.apply(arrays["pixel_values"], **{k: v[:, :, None, None] for k, v in of_gene.items()})
        observed = arrays["channel_mask"][:, :, None, None] & arrays["pixel_mask"][:, None]
        return values.masked_fill_(~observed, 0)

    def log1p_values(self, values: np.ndarray, gene_ids: np.ndarray, image: SlideImage) -> np.ndarray:
        """What a model predicts, in the units of its input, as log1p of counts per `target_sum`.

        Args:
            values: float (n, genes). gene_ids: int64 (genes,), their vocabulary numbers. image: whose windows it read.

        Returns:
            float64 (n, genes).
        """
        values, normalization = np.asarray(values, np.float64), NORMALIZATIONS[self.normalization]
        if normalization.invert is None:
            return values
        statistics = {name: getattr(self.vocabulary, name)[gene_ids] for name in normalization.statistics}
        statistics |= {name: getattr(image, of_slide)[gene_ids] for name, of_slide in normalization.of_slide.items()}
        return normalization.invert(values, **{name: given.astype(np.float64) for name, given in statistics.items()})

    def _statistic(self, name: str, device: torch.device) -> torch.Tensor:
        """float32 (len(vocabulary) + 1,): a gene statistic on a device; 1 for padding."""
        values = getattr(self.vocabulary, name)
        known, tensor = self._statistics.get((name, device), (None, None))
        if known is not values:  # another vocabulary may have been set
            tensor = torch.from_numpy(np.append(values, np.float32(1))).to(device)
            self._statistics[name, device] = values, tensor
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process puts its own statistics on an accelerator.
        return {**self.__dict__, "_statistics": {}}

    # ---------------------------------------------------------------- files

    def to_dict(self) -> dict[str, Any]:
        """Everything but the vocabulary, which has a file of its own (`genes.json`), named by its fingerprint."""
        fields = {k: v for k, v in self.__dict__.items() if k != "vocabulary" and not k.startswith("_")}
        return {**fields, "genes_sha256": self.vocabulary.sha256, "image_processor_type": type(self).__name__}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Write `preprocessor_config.json`, `genes.json` and the code that reads them."""
        self.register_for_auto_class()
        # Named for AutoProcessor too, which hides every error of what AutoImageProcessor finds.
        code = f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
        self.auto_map = {**(getattr(self, "auto_map", None) or {}), "AutoProcessor": code}
        files = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        return [*files, os.path.join(save_directory, GENES_FILE)]

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Write `preprocessor_config.json`, and the `genes.json` that belongs beside it."""
        self.vocabulary.save(os.path.dirname(os.path.abspath(json_file_path)))
        super().to_json_file(json_file_path)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "STPatchProcessor":
        """Load a processor and its `genes.json` from a folder or a Hub repository.

        Args:
            kwargs: those of transformers, and any option of the processor; the vocabulary is the one saved with it.

        Raises:
            ValueError: `genes.json` is not the one that the processor was saved with.
        """
        fields, _ = cls.get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        hub = {k: kwargs[k] for k in HUB_KWARGS if k in kwargs}
        kwargs["vocabulary"] = GeneVocabulary.from_pretrained(
            pretrained_model_name_or_path, sha256=fields.get("genes_sha256"), **hub
        )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(
        cls, image_processor_dict: dict[str, Any], vocabulary: GeneVocabulary | None = None, **kwargs: Any
    ) -> Any:
        """Make a processor from `to_dict()` and its vocabulary, which may also be an entry of the dictionary."""
        vocabulary = image_processor_dict.get("vocabulary") if vocabulary is None else vocabulary
        if vocabulary is None:
            raise ValueError("A processor needs its gene vocabulary: pass vocabulary=, or load with from_pretrained.")
        fields = {k: v for k, v in image_processor_dict.items() if k not in ("genes_sha256", "image_processor_type")}
        return super().from_dict({**fields, "vocabulary": vocabulary}, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> "STPatchProcessor":
        """Make a processor from `preprocessor_config.json` and the `genes.json` beside it."""
        return cls.from_pretrained(os.path.dirname(os.path.abspath(json_file)))


__all__ = ["STPatchProcessor", "STPatchProcessorKwargs"]
