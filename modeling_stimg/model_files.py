"""The files of a model, before anything of them is believed: of our type, whole, and no pickle among the weights."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .configuration_stimg import STImageMAEConfig

# Formats that can run code when they are read.
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".mar"})


def check_model_files(model: str | os.PathLike[str], **hub: Any) -> None:
    """Look at `config.json` and the weights of a model before they are loaded.

    Args:
        model: a folder, or a Hub repository, whose weights are fetched.
        hub: arguments of `cached_file`, such as `revision`.

    Raises:
        ValueError: a config of another model type, or weights that are damaged, cut off or a pickle.
        FileNotFoundError: no config, or no weights.
    """
    hub = {key: value for key, value in hub.items() if value is not None}
    config = _file(model, CONFIG_NAME, hub)
    if config is None:
        raise FileNotFoundError(
            f"{model} holds no {CONFIG_NAME}: expected a model, as train/run_pretrain.py writes it."
        )
    check_model_type(config, str(model))
    weights = _file(model, SAFE_WEIGHTS_NAME, hub)
    if weights is not None:
        check_weights(weights, str(model))
        return
    index = _file(model, SAFE_WEIGHTS_INDEX_NAME, hub)
    if index is None:
        found = sorted(path.name for path in Path(model).glob("*") if path.suffix in PICKLES)
        told = f"only {', '.join(found)}, and reading such a pickle can run any code" if found else "no weights"
        raise FileNotFoundError(
            f"{model} holds no {SAFE_WEIGHTS_NAME} ({told}): stimg reads safetensors alone; ask those who trained the "
            "model for that file."
        )
    for name in sorted(set(_shards(index).values())):
        part = _file(model, name, hub)
        if part is None:
            raise FileNotFoundError(f"{model} holds no {name}, a part of the weights: download the model again.")
        check_weights(part, str(model))


def check_model_type(config: Path, model: str) -> None:
    """ValueError unless a `config.json` is one of a stimg model; `model` is how the message calls it."""
    try:
        found = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config.name} of {model} holds no config ({error}): download the model again.") from error
    if found != STImageMAEConfig.model_type:
        raise ValueError(
            f"{model} is a model of type {found!r} ({config.name}): expected {STImageMAEConfig.model_type!r}, a model "
            "of stimg."
        )


def check_weights(path: Path, model: str) -> None:
    """ValueError unless a safetensors file is as long as its header says; `model` is how the message calls it."""
    try:
        with safe_open(path, "np") as file:
            file.keys()
    except SafetensorError as error:
        raise ValueError(
            f"{path.name} of {model} is damaged or cut off at {path.stat().st_size:,} bytes ({error}): download or "
            "copy the model again."
        ) from error


def _shards(index: Path) -> dict[str, str]:
    """Name of the file of every tensor, from the index of weights in several files."""
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index.name} holds no index of weights ({error}): download the model again.") from error


def _file(model: str | os.PathLike[str], name: str, hub: dict[str, Any]) -> Path | None:
    """Path of a model's file, None where it has none of that name."""
    path = cached_file(str(model), name, _raise_exceptions_for_missing_entries=False, **hub)
    return None if path is None else Path(path)
