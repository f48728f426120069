"""`fingerprint.json` of a model folder: its files, and what it says of a phantom slide, so that others can compare.

A fresh process without this package embeds a phantom slide whose genes are the model's. On the machine that wrote the
fingerprint (same processor, kernels and torch) the bits must be the same. Elsewhere float32 sums are taken in another
order, and every stored value may differ by `TOLERANCE` standard deviations of the embedding. The demo's model differed
by 2e-6 with kernels for processors without AVX, and by nothing under transformers 5.17; deeper models add up more of
it.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData

from data_processing.phantom import PhantomTissue
from data_processing.writing import write_whole
from modeling_stimg import STPatchProcessor

FINGERPRINT_FILE = "fingerprint.json"
FORMAT = 1
TOLERANCE = 1e-3
MAX_GENES = 400
NUM_SPOTS = 8  # whose values are stored
# What decides the embedding; the rest of a folder tells of it.
DECIDING = ("config.json", "genes.json", "model.safetensors", "preprocessor_config.json", "*_stimg.py")


@dataclass(frozen=True)
class Embedded:
    """What a fresh process gave.

    Attributes:
        embedding: float32 (spots, width). environment: processor, machine, torch, kernels. slide_sha256: of its input.
    """

    embedding: np.ndarray
    environment: dict[str, str]
    slide_sha256: str


def phantom_slide(processor: STPatchProcessor) -> AnnData:
    """A slide a little larger than a window, with at most `MAX_GENES` genes spread over the vocabulary.

    No more than a window's channels, so that all of them are seen and none has to be drawn.
    """
    vocabulary, side = processor.vocabulary, max(processor.window_size, 8) + 4
    num_genes = min(len(vocabulary), max(processor.num_channels, 50), MAX_GENES)
    slide = PhantomTissue.create(num_genes=num_genes).slide(0, array="square", height=side, width=side)
    chosen = np.linspace(0, len(vocabulary) - 1, num_genes).round().astype(int)
    slide.var_names = [vocabulary.gene_ids[i] for i in chosen]
    return slide


def embed_in_fresh_process(folder: Path) -> Embedded:
    """Embed the phantom slide with the files of a folder alone, offline.

    Raises:
        ValueError: the process failed; the sentence is its last line.
    """
    slide = phantom_slide(STPatchProcessor.from_pretrained(folder))
    script = Path(__file__).with_name("fresh_process.py")
    with tempfile.TemporaryDirectory() as work:
        slide_file, output = Path(work) / "slide.h5ad", Path(work) / "embedding.npz"
        slide.write_h5ad(slide_file)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE", "PYTHONPATH"))}
        run = subprocess.run(
            [sys.executable, str(script), str(folder.resolve()), str(slide_file), str(output)],
            capture_output=True,
            text=True,
            cwd=work,
            env={**kept, "HF_HOME": str(Path(work) / "hf"), "HF_HUB_OFFLINE": "1"},
            check=False,
        )
        if run.returncode:
            reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"{folder} does not load and embed in a process without this package: {reason}")
        with np.load(output) as arrays:
            embedding, environment = arrays["embedding"], json.loads(str(arrays["environment"]))
    if embedding.shape[0] != slide.n_obs or embedding.dtype != np.float32 or not np.isfinite(embedding).all():
        raise ValueError(
            f"{folder} embeds {slide.n_obs} spots as {embedding.dtype} {embedding.shape}: expected finite float32, a "
            "row a spot."
        )
    return Embedded(embedding, environment, _slide_sha256(slide))


def write_fingerprint(folder: Path) -> dict[str, Any]:
    """Embed the phantom slide and write `fingerprint.json`; returns its content."""
    embedded = embed_in_fresh_process(folder)
    embedding = embedded.embedding
    spots = np.linspace(0, len(embedding) - 1, NUM_SPOTS).round().astype(int)
    content = {
        "format": FORMAT,
        "files": deciding_files(folder),
        "environment": embedded.environment,
        "slide_sha256": embedded.slide_sha256,
        "shape": list(embedding.shape),
        "sha256": _sha256(embedding.tobytes()),
        "deviation": float(embedding.std()),
        "tolerance": TOLERANCE,
        "spots": spots.tolist(),
        # Nine significant digits give every float32 back exactly.
        "values": [[float(f"{value:.9g}") for value in row] for row in embedding[spots].tolist()],
    }
    write_whole(folder / FINGERPRINT_FILE, (json.dumps(content) + "\n").encode())
    return content


def compare_with_fingerprint(folder: Path) -> str:
    """Embed the phantom slide and compare with `fingerprint.json`; returns in words how well they agree.

    Raises:
        ValueError: other files or other values than when the fingerprint was written.
    """
    told = read_fingerprint(folder)
    anew = f"if that is meant, write {FINGERPRINT_FILE} anew: python model_cards/gather.py {folder} {folder}"
    files = deciding_files(folder)
    changed = sorted(name for name in {*files, *told["files"]} if files.get(name) != told["files"].get(name))
    if changed:
        raise ValueError(f"{', '.join(changed)} changed since {FINGERPRINT_FILE} was written: {anew}.")
    embedded = embed_in_fresh_process(folder)
    if embedded.slide_sha256 != told["slide_sha256"]:
        raise ValueError(
            f"The phantom slide is not the one of {FINGERPRINT_FILE} (numpy here draws other numbers): compare where "
            f"numpy is as it was, or {anew}."
        )
    difference = _difference(embedded.embedding, told)
    if difference > told["tolerance"]:
        raise ValueError(
            f"The embedding of the phantom slide differs from {FINGERPRINT_FILE} by {difference:.2g} standard "
            f"deviations (at most {told['tolerance']:g}): {anew}."
        )
    if _sha256(embedded.embedding.tobytes()) == told["sha256"]:
        return "the same bits as in its fingerprint"
    if embedded.environment == told["environment"]:
        raise ValueError(
            f"On the machine that wrote {FINGERPRINT_FILE} the embedding of the phantom slide has other bits (by up to "
            f"{difference:.2g} standard deviations): {anew}."
        )
    return f"within {difference:.1g} standard deviations of its fingerprint, which another machine wrote"


def read_fingerprint(folder: Path) -> dict[str, Any]:
    """The content of `fingerprint.json`.

    Raises:
        ValueError: there is none, or none of a known format.
    """
    path = folder / FINGERPRINT_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content["format"] == FORMAT
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no {FINGERPRINT_FILE}: python model_cards/gather.py writes it.") from None
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(f"{path} holds no fingerprint of format {FORMAT}: write it anew, model_cards/gather.py.")
    return content


def deciding_files(folder: Path) -> dict[str, str]:
    """sha256 of every file that the embedding depends on."""
    paths = sorted({path for pattern in DECIDING for path in folder.glob(pattern)})
    return {path.name: _sha256(path.read_bytes()) for path in paths}


def _difference(embedding: np.ndarray, told: dict[str, Any]) -> float:
    """Largest absolute difference from the stored values, in standard deviations; infinite where shapes differ."""
    values = np.array(told["values"])
    if list(embedding.shape) != told["shape"]:
        return float("inf")
    return float(np.abs(embedding[told["spots"]] - values).max() / max(told["deviation"], np.finfo(np.float32).tiny))


def _slide_sha256(slide: AnnData) -> str:
    """Of counts, genes and places."""
    parts = [slide.X.data, slide.X.indices.astype(np.int64), slide.X.indptr.astype(np.int64)]
    parts += [slide.obs[name].to_numpy(np.int64) for name in ("array_row", "array_col")]
    return _sha256(b"".join(part.tobytes() for part in parts) + "\n".join(slide.var_names).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
