"""The files of a model, before anything of them is believed: of our type, whole, and no pickle among the weights."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

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
    found = read_json(config, model).get("model_type")
    if found != STImageMAEConfig.model_type:
        raise ValueError(
            f"{model} is a model of type {found!r} ({config.name}): expected {STImageMAEConfig.model_type!r}, a model "
            "of stimg."
        )


def read_json(path: Path, model: str) -> dict[str, Any]:
    """Fields of a file of a model. ValueError where it holds none; `model`: whose the message says it is."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError(f"a {type(fields).__name__} in place of fields")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} of {model} holds no config ({error}): download the model again.") from error
    return fields


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


def load_whole(kind: Any, folder: str | os.PathLike[str]) -> Any:
    """A model of the class `kind`, every weight of which is the file's; `from_pretrained` draws those that are missing.

    Raises:
        ValueError: weights of other shapes than the config says, or that are missing, such as those of a decoder.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # of what is missing, and told below
    try:
        network, loaded = kind.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    finally:
        logging.set_verbosity(verbosity)
    if loaded["mismatched_keys"]:
        name, found, expected = min(loaded["mismatched_keys"])
        raise ValueError(
            f"The weights in {folder} do not fit its {CONFIG_NAME} in {len(loaded['mismatched_keys'])} places (e.g. "
            f"{name} has the shape {tuple(found)}, expected {tuple(expected)}): download or copy both again."
        )
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        whose = " of its decoder" if all(name.startswith("decoder") for name in missing) else ""
        raise ValueError(
            f"The model in {folder} lacks {len(missing)} weights{whose} (e.g. {missing[0]}): expected one that was "
            f"saved as {kind.__name__}."
        )
    return network


def _shards(index: Path) -> dict[str, str]:
    """Name of the file of every tensor, from the index of weights in several files."""
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index.name} holds no index of weights ({error}): download the model again.") from error
