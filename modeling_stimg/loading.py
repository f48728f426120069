"""A model on the device that computes with it: the encoder alone, or with its decoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


def load_encoder(model: str | None, revision: str | None, device: str | None) -> tuple[Any, Any, str]:
    """The encoder, on its device, its processor, and the device: a GPU where none is named and there is one.

    Raises:
        ValueError, OSError: no such device, or no such model.
    """
    from .hub import find_model
    from .model_files import load_whole
    from .modeling_stimg import STImageMAEModel
    from .processing_stimg import STPatchProcessor

    device = usable(device)
    folder = find_model(model, revision).folder
    processor = STPatchProcessor.from_pretrained(folder)
    return load_whole(STImageMAEModel, folder).to(device), processor, device


def load_decoder(folder: Path) -> Any:
    """A model with its decoder.

    Raises:
        ValueError: as `load_whole`; an encoder alone, whose decoder would be one of random numbers, is not enough.
    """
    from .model_files import load_whole
    from .modeling_stimg import STImageMAEForPreTraining

    return load_whole(STImageMAEForPreTraining, folder)


@dataclass(frozen=True)
class LoadedModel:
    """A model that is loaded once and asked for everything.

    Attributes:
        name: the folder's own, or `ORG/NAME@COMMIT`. network: an `STImageMAEForPreTraining` where `has_decoder`, else
            an `STImageMAEModel`. processor: its processor. has_decoder: whether it can reconstruct.
    """

    name: str
    network: Any
    processor: Any
    has_decoder: bool


def load_model(model: str | None, revision: str | None = None, device: str | None = None) -> LoadedModel:
    """All that there is of a model, on its device: with its decoder where it has one.

    Raises:
        ValueError, OSError: no such device, or no such model.
    """
    from .hub import find_model
    from .model_files import load_whole
    from .modeling_stimg import STImageMAEModel
    from .processing_stimg import STPatchProcessor

    device = usable(device)
    found = find_model(model, revision)
    has_decoder = any(name.startswith("decoder.") for name in weight_names(found.folder))
    network = load_decoder(found.folder) if has_decoder else load_whole(STImageMAEModel, found.folder)
    processor = STPatchProcessor.from_pretrained(found.folder)
    return LoadedModel(found.hub or found.name, network.to(device).eval(), processor, has_decoder)


def weight_names(folder: Path) -> list[str]:
    """Names of a model's weights, from the headers of its safetensors files; no weight is read."""
    from safetensors import safe_open

    names: list[str] = []
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            names += list(file.keys())
    return names


def usable(device: str | None) -> str:
    """A device by its name, checked; where none is named, a GPU where there is one."""
    import torch

    from .slide_image_stimg import usable_device

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(usable_device(device))
