r"""Make the folder of a published model from the output of a training, with its fingerprint.

    python model_cards/gather.py runs/mine model_cards/NAME

Copies what belongs on the Hub (weights, configs, genes, code, `pretraining.json`, curves) and nothing else, and writes
`fingerprint.json`: a fresh process embeds a phantom slide, with which a later check compares. Given the same folder
twice, it only writes the fingerprint anew. `model_cards/card.py` writes the card then.
"""

import argparse
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from data_processing.corpus import PRETRAINING_FILE
from model_cards.fingerprint import write_fingerprint
from model_cards.model_checks import check_files, check_model, published_files
from modeling_stimg.model_files import check_model_files

# These are made for the published model, and tell of another where the run's folder holds any.
MADE_LATER = ("README.md", "results.json", "regions.json", "throughput.json", "card.json", "fingerprint.json")


def gather(run: Path, folder: Path, half: bool = False) -> None:
    """Copy a trained model from `run` to `folder`, made if it is missing, and write its fingerprint.

    Args:
        half: write gene embeddings as float16, half of their bytes. They are loaded as float32, as `config.json` says.

    Raises:
        ValueError: `run` holds no whole model, or `folder` another one.
    """
    check_model_files(run)
    if not (run / PRETRAINING_FILE).exists():
        raise ValueError(f"{run} holds no {PRETRAINING_FILE}: a published model tells which slides it saw.")
    if run.resolve() != folder.resolve():
        if (folder / "model.safetensors").exists():
            raise ValueError(f"{folder} holds a model already: give another folder, or move that one away.")
        folder.mkdir(parents=True, exist_ok=True)
        for path in published_files(run):
            if path.name not in MADE_LATER:
                shutil.copyfile(path, folder / path.name)
        if half:
            halve_gene_embeddings(folder / "model.safetensors")
    check_files(folder, without=MADE_LATER)
    check_model(folder)
    write_fingerprint(folder)


def halve_gene_embeddings(weights: Path) -> None:
    """Write the gene embeddings of a safetensors file as float16, where all of them are in its range."""
    tensors = load_file(weights)
    (name,) = [name for name in tensors if name.endswith("gene_embeddings.weight")]
    halved = tensors[name].half()
    if not halved.isfinite().all():
        raise ValueError(f"{name} of {weights} has values that float16 does not hold: publish it without --half.")
    temporary = weights.with_suffix(".tmp")
    save_file({**tensors, name: halved}, temporary, metadata={"format": "pt"})
    temporary.replace(weights)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="Output folder of train/run_pretrain.py.")
    parser.add_argument("folder", type=Path, help="Folder to make, model_cards/NAME; RUN itself: only a fingerprint.")
    parser.add_argument(
        "--half", action="store_true", help="Write gene embeddings, most of a model's bytes, as float16."
    )
    arguments = parser.parse_args(argv)
    gather(arguments.run, arguments.folder, arguments.half)
    print(f"{arguments.folder} holds the model and its fingerprint; next: python model_cards/card.py")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
