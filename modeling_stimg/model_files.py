"""The files of a model, before anything of them is believed: of our type, whole, and no pickle among the weights."""

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .configuration_stimg import STImageMAEConfig

# Formats that can run code when they are read.
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".mar"})


def check_model_files(folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Look at `config.json` and the weights of a model before they are loaded.

    Args:
        folder: of the model. name: what messages call it; None: the folder.

    Raises:
        ValueError: a config of another model type, or weights that are damaged, cut off or a pickle.
        FileNotFoundError: no config, or no weights.
    """
    folder, name = Path(folder), str(folder) if name is None else name
    check_model_type(folder, name)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not (folder / SAFE_WEIGHTS_NAME).exists() and index.exists():
        for part in sorted(set(_shards(index).values())):
            if Path(part).name != part or not (folder / part).is_file():
                raise FileNotFoundError(f"{name} holds no {part}, a part of the weights: download the model again.")
            check_weights(folder / part, name)
        return
    if not (folder / SAFE_WEIGHTS_NAME).exists():
        found = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
        told = f"only {', '.join(found)}, and reading such a pickle can run any code" if found else "no weights"
        raise FileNotFoundError(
            f"{name} holds no {SAFE_WEIGHTS_NAME} ({told}): stimg reads safetensors alone; ask those who trained the "
            "model for that file."
        )
    check_weights(folder / SAFE_WEIGHTS_NAME, name)


def check_model_type(folder: Path, model: str) -> None:
    """ValueError or FileNotFoundError unless `config.json` is that of a stimg model, called `model` in the message."""
    config = folder / CONFIG_NAME
    if not config.exists():
        raise FileNotFoundError(f"{model} holds no {CONFIG_NAME}: expected a model that train/run_pretrain.py wrote.")
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
    """ValueError unless a safetensors file is as long as its header says; `model`: whose the message says it is."""
    try:
        with safe_open(path, "np") as file:
            file.keys()
    except SafetensorError as error:
        raise ValueError(
            f"{path.name} of {model} is damaged or cut off at {path.stat().st_size:,} bytes ({error}): download or "
            "copy it again."
        ) from error


def _shards(index: Path) -> dict[str, str]:
    """Name of the file of every tensor, from the index of weights in several files."""
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index.name} holds no index of weights ({error}): download the model again.") from error
