"""What made an embedding: the model, the options, and how many of the slide's genes it knew."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .embedding_stimg import embedding_options
from .slide_image_stimg import SlideImage

# The others are options of an embedding, and told as such.
_OF_THE_PROCESSOR = ("window_size", "compaction", "normalization", "target_sum", "sample_unit")
# Where huggingface_hub keeps the files of a repository's commit.
_SNAPSHOT = re.compile(r"models--(?P<name>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})")


def model_name(model: Any) -> str:
    """What a model is called, without a path of this machine: `ORG/NAME@COMMIT` of the Hub, or its folder's name.

    "unnamed" of one that was made in memory.
    """
    given = str(getattr(model.config, "_name_or_path", "") or "")
    cached = _SNAPSHOT.search(given)
    if cached:
        return f"{cached['name'].replace('--', '/')}@{cached['commit']}"
    if not given:
        return "unnamed"
    commit = getattr(model.config, "_commit_hash", None)
    if commit and not Path(given).is_dir():
        return f"{given}@{commit}"
    # "." and ".." are no names; a folder that has gone is called as it was.
    return Path(given).resolve().name or "unnamed"


@torch.no_grad()
def fingerprint(model: Any, processor: Any) -> str:
    """16 hexadecimal digits of everything about a model and its processor that decides an embedding.

    The same of `STImageMAEModel` and `STImageMAEForPreTraining`: the decoder takes no part in it.
    """
    digest = hashlib.sha256()  # processors have instructions for it
    encoder = model.base_model
    for name, tensor in sorted(encoder.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy())
    # The fields that the class declares: others tell where a model lies and how it was loaded. Options are told apart.
    declared = sorted(set(type(model.config).__annotations__) - {"embedding_defaults"})
    vocabulary = processor.vocabulary
    for owner, names in ((model.config, declared), (processor, _OF_THE_PROCESSOR)):
        digest.update(repr([(name, getattr(owner, name, None)) for name in names]).encode())
    digest.update(vocabulary.ids_sha256.encode())
    for name in ("mean", "deviation", "share"):
        values = getattr(vocabulary, name)
        digest.update(name.encode() if values is None else np.ascontiguousarray(values))
    return digest.hexdigest()[:16]


def embedding_settings(model: Any, processor: Any, seed: int = 0, **options: Any) -> dict[str, Any]:
    """What decides an embedding of any slide: equal settings, equal embedding (of the same slide).

    Args:
        options: as `embed_image` takes them; None = what the model says, else the general default.

    Returns:
        `model`, its name; `fingerprint`; `seed`; and every option as it is used: text, numbers, or a list of numbers.

    Raises:
        ValueError: an option that `embed_image` refuses.
    """
    used = embedding_options(model, processor, **options)
    return {
        "model": model_name(model),
        "fingerprint": fingerprint(model, processor),
        "seed": int(seed),
        **{name: _plain(value) for name, value in used.items()},
    }


def reading_settings(
    layer: str | None = None,
    slide_key: str | None = None,
    bin_size: float | None = None,
    microns_per_pixel: float | None = None,
) -> dict[str, str]:
    """How a slide was read, as `read_slide` takes it, in text; empty where it was not told."""
    given = {"layer": layer, "slide_key": slide_key, "bin_size": bin_size, "microns_per_pixel": microns_per_pixel}
    return {name: "" if value is None else str(value) for name, value in given.items()}


def embedding_provenance(settings: Mapping[str, Any], image: SlideImage) -> dict[str, Any]:
    """`embedding_settings`, the versions that computed it, and how many of the slide's genes the model knew."""
    from . import __version__

    return {
        **settings,
        "stimg_version": __version__,
        "torch_version": str(torch.__version__),
        "matched_genes": int(image.num_matched_genes),
        "source_genes": int(image.num_source_genes),
    }


def same_settings(told: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Names of the settings in which an embedding differs from what would be made; none: it is the same.

    A model of another name with the same fingerprint is the same model.
    """
    names = [name for name in settings if name != "model"]
    return [name for name in names if not np.array_equal(_comparable(told.get(name)), _comparable(settings[name]))]


def _comparable(value: Any) -> Any:
    """A setting as it is before and after it went through a file."""
    return str(value) if isinstance(value, str | type(None)) else np.asarray(value)


def _plain(value: Any) -> Any:
    """A setting as a .h5ad can hold it."""
    if isinstance(value, list | tuple):
        return [int(v) for v in value]
    return value if isinstance(value, str | bool) else int(value)
