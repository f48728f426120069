"""What a model card is made of: the files of a model's folder, and nothing else."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from data_processing.corpus import PRETRAINING_FILE, SlideRecord
from data_processing.writing import write_whole
from eval.aggregate import Record, check_records, distinct, matching
from eval.features import BY_DEFAULT
from modeling_stimg import STImageMAEConfig, STPatchProcessor

RESULTS_FILE, REGIONS_FILE, THROUGHPUT_FILE = "results.json", "regions.json", "throughput.json"
OPTIONS_FILE = "card.json"
TRAINED, UNTRAINED = "stimg", "untrained"


@dataclass(frozen=True)
class CardOptions:
    """What no other file of the folder tells; kept in `card.json`.

    Attributes:
        repo: ORG/NAME on the Hub. licence: of the weights, an identifier of the Hub.
        row: of the model in `results.json`. datasets: on the Hub, of the training slides.
        watts: power of everything that the training ran on, in W; None: not known.
        corpus_command: that made the corpus; None: not told.
    """

    repo: str
    licence: str = "apache-2.0"
    row: str = TRAINED
    datasets: tuple[str, ...] = ()
    watts: float | None = None
    corpus_command: str | None = None


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder as its card sees it.

    Raises:
        ValueError, OSError: where a file is missing or does not hold what it should, in one sentence.
    """

    path: Path

    @cached_property
    def options(self) -> CardOptions:
        fields = _read(self.path / OPTIONS_FILE)
        return CardOptions(**{**fields, "datasets": tuple(fields.get("datasets", ()))})

    @cached_property
    def config(self) -> STImageMAEConfig:
        return STImageMAEConfig.from_pretrained(self.path)

    @cached_property
    def processor(self) -> STPatchProcessor:
        return STPatchProcessor.from_pretrained(self.path)

    @cached_property
    def num_parameters(self) -> int:
        """Numbers in the weights, decoder included."""
        with safe_open(self.path / "model.safetensors", "np") as file:
            return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no dict

    @cached_property
    def is_halved(self) -> bool:
        """Whether gene embeddings are in float16, as `gather.py --half` writes them."""
        with safe_open(self.path / "model.safetensors", "np") as file:
            return any(file.get_slice(name).get_dtype() == "F16" for name in file.keys())  # noqa: SIM118 - no dict

    @cached_property
    def pretraining(self) -> dict[str, Any]:
        """The content of `pretraining.json`."""
        return _read(self.path / PRETRAINING_FILE)

    @cached_property
    def slides(self) -> list[SlideRecord]:
        """Every slide that the model saw."""
        return [SlideRecord(**record) for record in self.pretraining["slides"]]

    @cached_property
    def results(self) -> tuple[list[Record], dict[str, Any]]:
        """Records and metadata of domain detection."""
        content = _results(self.path / RESULTS_FILE, "eval/run_domain_detection.py")
        records, metadata, row = content["records"], content["metadata"], self.options.row
        try:
            check_records(records)
        except ValueError as error:
            raise ValueError(f"{self.path / RESULTS_FILE} holds no results of domain detection: {error}.") from error
        if row not in distinct(records, "features"):
            models = ", ".join(metadata.get("models", {})) or "no model"
            raise ValueError(
                f"{self.path / RESULTS_FILE} has no row {row!r} but {models}: name the model's with --row."
            )
        told = metadata.get("models", {}).get(row, {}).get("pretraining")
        if told is not None and told != self.pretraining["arguments"]:
            raise ValueError(
                f"The row {row!r} of {RESULTS_FILE} is of a model that was trained with other arguments than "
                f"{PRETRAINING_FILE} tells: evaluate this model, or name its row with --row."
            )
        return records, metadata

    @cached_property
    def of_model(self) -> list[Record]:
        """The records of the model's own rows."""
        rows = self.options.row, self.options.row + BY_DEFAULT
        return [record for name in rows for record in matching(self.results[0], features=name)]

    @cached_property
    def simple(self) -> list[Record]:
        """The records of features without training: simple ones, and models before it, whose names say so."""
        records, metadata = self.results
        models = [name for name in metadata.get("models", {}) if not name.startswith(UNTRAINED)]
        trained = {name + end for name in (*models, self.options.row) for end in ("", BY_DEFAULT)}
        return [record for record in records if record["features"] not in trained]

    @cached_property
    def regions(self) -> tuple[list[Record], dict[str, Any]] | None:
        """Records and metadata of region reconstruction, None where there are none."""
        if not (self.path / REGIONS_FILE).exists():
            return None
        content = _results(self.path / REGIONS_FILE, "eval/run_region_reconstruction.py")
        records = content["records"]
        if not records or not {"predictor", "mse", "mae", "pearson", "slide"} <= set(records[0]):
            raise ValueError(f"{self.path / REGIONS_FILE} holds no results of eval/run_region_reconstruction.py.")
        told = content["metadata"].get("pretraining")
        if told is not None and told != self.pretraining["arguments"]:
            raise ValueError(f"{REGIONS_FILE} is of a model that was trained with other arguments: evaluate this one.")
        return records, content["metadata"]

    @cached_property
    def throughput(self) -> tuple[list[Record], dict[str, Any]] | None:
        """Records and metadata of a throughput measurement, None where there are none."""
        if not (self.path / THROUGHPUT_FILE).exists():
            return None
        content = _results(self.path / THROUGHPUT_FILE, "eval/run_throughput.py")
        return content["records"], content["metadata"]


def write_options(folder: Path, options: CardOptions) -> None:
    """Write `card.json`."""
    write_whole(folder / OPTIONS_FILE, (json.dumps(asdict(options), indent=1) + "\n").encode())


def _results(path: Path, script: str) -> dict[str, Any]:
    content = _read(path)
    if not isinstance(content.get("records"), list) or not isinstance(content.get("metadata"), Mapping):
        raise ValueError(f"{path} holds no results of {script}: expected records and metadata.")
    return content


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: python model_cards/card.py makes a card of it.") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected an object.")
    return content
