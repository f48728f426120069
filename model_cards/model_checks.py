"""What must hold of a model folder before it is published."""

import json
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from data_processing.corpus import PRETRAINING_FILE
from model_cards.fingerprint import FINGERPRINT_FILE, compare_with_fingerprint
from modeling_stimg import STPatchProcessor
from modeling_stimg.model_files import PICKLES, check_model_files

NEEDED = (
    *("config.json", "model.safetensors", "preprocessor_config.json", "genes.json", "modeling_stimg.py"),
    *("processing_stimg.py", "README.md", PRETRAINING_FILE, "results.json", FINGERPRINT_FILE),
)
OPTIONAL = (
    *("*_stimg.py", "regions.json", "throughput.json", "card.json", "loss.png", "probe.png", "LICENSE"),
    ".gitattributes",
)
SUFFIXES_OF_PICKLES = ", ".join(sorted(f"*{suffix}" for suffix in PICKLES))


def check_model_folder(folder: Path) -> Iterator[str]:
    """Check everything of a model but its card, telling what holds, one sentence at a time.

    The code in the folder is run, in a process of its own.

    Raises:
        ValueError, OSError: what does not hold, in one sentence.
    """
    check_files(folder)
    yield f"{len(published_files(folder))} files, all of them known, no pickle"
    check_model(folder)
    yield "config, weights and genes belong together"
    yield f"loads without this package; the phantom slide's embedding: {compare_with_fingerprint(folder)}"


def published_files(folder: Path) -> list[Path]:
    """The files of a folder that a Hub repository of a model may hold."""
    found = sorted(path for path in folder.iterdir() if path.is_file())
    return [path for path in found if any(fnmatch(path.name, pattern) for pattern in (*NEEDED, *OPTIONAL))]


def check_files(folder: Path, without: Sequence[str] = ()) -> None:
    """A folder must hold what a published model needs, and nothing that is not known.

    Args:
        without: files that need not be there yet.

    Raises:
        FileNotFoundError: no folder, or a file that is missing. ValueError: a pickle, or an unknown file or folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    everything = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    pickles = [str(path.relative_to(folder)) for path in everything if path.suffix in PICKLES]
    if pickles:
        raise ValueError(
            f"{folder} holds {', '.join(pickles[:3])}: pickles ({SUFFIXES_OF_PICKLES}) can run any code on the machine "
            "that reads them and are not published; keep model.safetensors alone."
        )
    missing = [name for name in NEEDED if name not in without and not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}: python model_cards/gather.py makes a model's folder, "
            "model_cards/card.py its card."
        )
    unknown = sorted({str(path.relative_to(folder)) for path in everything} - {p.name for p in published_files(folder)})
    if unknown:
        raise ValueError(
            f"{folder} holds {', '.join(unknown[:3])}{' and more' if len(unknown) > 3 else ''}, which no published "
            "model has: python model_cards/gather.py RUN FOLDER copies what belongs there."
        )


def check_model(folder: Path) -> None:
    """Config of our type, whole weights, the genes that the processor was saved with, as many as the model knows.

    Raises:
        ValueError, OSError: what does not hold.
    """
    check_model_files(folder)
    fields = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    if not fields.get("genes_sha256"):
        raise ValueError(
            f"preprocessor_config.json of {folder} names no genes_sha256: save the processor again, "
            "processor.save_pretrained(FOLDER)."
        )
    num_genes = len(STPatchProcessor.from_pretrained(folder).vocabulary)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["vocab_size"] != num_genes + 1:
        raise ValueError(
            f"The model of {folder} knows {config['vocab_size'] - 1:,} genes and genes.json names {num_genes:,}: they "
            "are of two models."
        )
    for entry, needed in (
        ("config.json", ("AutoConfig", "AutoModel", "AutoModelForPreTraining")),
        ("preprocessor_config.json", ("AutoImageProcessor",)),
    ):
        auto_map = json.loads((folder / entry).read_text(encoding="utf-8")).get("auto_map", {})
        missing = [name for name in needed if name not in auto_map]
        if missing:
            raise ValueError(
                f"{entry} of {folder} lacks {', '.join(missing)} in auto_map: without this package it could not be "
                "loaded; save it again with save_pretrained."
            )
