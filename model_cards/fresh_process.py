"""Embeds a slide with the files of a model folder alone: what someone gets who has the Hub and not this package.

    python model_cards/fresh_process.py FOLDER slide.h5ad output.npz

Importing the package or a recipe raises here, wherever they lie. Runs the code in FOLDER.
"""

import json
import platform
import sys
from pathlib import Path

NOT_HERE = ("modeling_stimg", "data_processing", "train", "eval", "model_cards")


def processor_name() -> str:
    """What the machine calls its CPU; float32 sums are taken in another order on another."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main(folder: str, slide: str, output: str) -> None:
    """Write the embedding float32 (spots, width), and what it was computed with, as JSON, to an `.npz`."""
    for name in NOT_HERE:
        sys.modules[name] = None
    import anndata
    import numpy as np
    import torch
    import transformers

    torch.set_num_threads(1)  # the same sums in the same order, however many cores there are
    model, processor = (
        auto.from_pretrained(folder, trust_remote_code=True)
        for auto in (transformers.AutoModel, transformers.AutoProcessor)
    )
    image = processor.slide_to_image(anndata.read_h5ad(slide))
    embedding = model.eval().embed(image, processor, device="cpu")
    environment = {
        "processor": processor_name(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "kernels": torch.backends.cpu.get_cpu_capability(),
    }
    np.savez(output, embedding=embedding[image.spot_of_obs], environment=json.dumps(environment))


if __name__ == "__main__":
    main(*sys.argv[1:])
