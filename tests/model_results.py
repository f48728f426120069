"""Results of a model that was never evaluated, in the form of the evaluation's scripts: what a card is made of."""

from pathlib import Path
from typing import Any

import numpy as np

from eval.features import BY_DEFAULT
from eval.results import write_results

SETS = {"heart": ("aspheart_1", "aspheart_2", "aspheart_3"), "her2": ("her2st_A1", "her2st_B1")}
SPLITS = {"spots": ("knn", "linear"), "blocks": ("knn",), "no labels": ("k-means",)}
FEATURES = ("raw", "coordinates only", "untrained, random start", "stimg", "stimg" + BY_DEFAULT)
SEEN = {"heart": "unseen patient", "her2": "same patient"}


def write_domains(folder: Path, pretraining: dict[str, Any] | None) -> Path:
    """`results.json` as of eval/run_domain_detection.py; pretraining: arguments that the model tells of itself."""
    rng, records = np.random.default_rng(0), []
    for name, slides in SETS.items():
        for slide in slides:
            for features in FEATURES:
                for split, probes in SPLITS.items():
                    for radius in (0,) if features.endswith(BY_DEFAULT) else (0, 1):
                        for probe in probes:
                            place = {"set": name, "slide": slide, "split": split, "features": features}
                            scores = {"ari": rng.random(), "ari_sd": rng.random()}
                            if split != "no labels":
                                scores |= {"accuracy": rng.random(), "macro_f1": rng.random()}
                            seen = {"seen": SEEN[name]} if features.startswith("stimg") else {}
                            records.append({**place, "smoothing": radius, "probe": probe, **scores, **seen})
    metadata = {
        "seed": 0,
        "commit": "0123456789abcdef",
        "command": ["eval/run_domain_detection.py", "--model", "runs/mine", "--sets", "heart", "her2"],
        "protocol": {"num_splits": 7, "train_share": 0.3},
        "models": {"stimg": {"pretraining": pretraining}},
    }
    write_results(folder, records, metadata, "")
    return folder / "results.json"


def write_throughput(folder: Path) -> Path:
    """`results.json` as of eval/run_throughput.py windows."""
    rng = np.random.default_rng(2)
    records = [
        {"slide": slide, "non_zeros": 215_638 + number, "windows_per_second": rng.random() * 700, "numpy": None}
        for number, slide in enumerate(("her2st_F2", "her2st_F3"))
    ]
    write_results(folder, records, {"command": ["eval/run_throughput.py", "windows"]}, "")
    return folder / "results.json"


def write_regions(folder: Path) -> Path:
    """`results.json` as of eval/run_region_reconstruction.py."""
    rng, records = np.random.default_rng(1), []
    for slide in ("her2st_F2", "her2st_F3"):
        for predictor in ("zeros", "mean", "stimg"):
            for mask in (4, 8):
                scores = {key: rng.random() for key in ("mse", "mae", "pearson")}
                sizes = {"region": "square", "mask_size": mask, "window_size": 20, "pearson_genes": 512}
                seen = "unseen patient" if predictor == "stimg" else None
                records.append({"slide": slide, "predictor": predictor, **sizes, **scores, "seen": seen})
    metadata = {"units": "log1p of counts", "command": ["eval/run_region_reconstruction.py", "--model", "runs/mine"]}
    write_results(folder, records, metadata, "")
    return folder / "results.json"
