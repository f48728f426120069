"""Someone who has the Hub and not this package: what a fresh process makes of models and corpora there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from anndata import AnnData
from hub_server import Hub

from modeling_stimg import STImageMAEModel, STPatchProcessor, embed_slide

OPTIONS = {"readout": "both", "smoothing": 1, "stride": 2}
CLASSES = {
    *("STImageMAEConfig", "STImageMAEModel", "STImageMAEForPreTraining", "STPatchProcessor"),
    "STFeatureExtractionPipeline",
}

SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np

sys.modules["modeling_stimg"] = None
sys.path = [path for path in sys.path if Path(path).resolve() != Path(sys.argv[2])]
import anndata
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoProcessor, pipeline
from transformers.utils import is_torchvision_available

if transformers.__version__.startswith("5.17.") and not is_torchvision_available():
    # What this version calls AutoImageProcessor only says that torchvision is missing.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
else:
    from transformers import AutoImageProcessor

told = json.loads(sys.argv[1])
slide = anndata.read_h5ad(told["slide"])
trust = {"trust_remote_code": True}
embeddings, classes = {}, {}
for name, revision in told["models"]:
    config = AutoConfig.from_pretrained(name, revision=revision, **trust)
    models = [a.from_pretrained(name, revision=revision, **trust) for a in (AutoModel, AutoModelForPreTraining)]
    processors = [a.from_pretrained(name, revision=revision, **trust) for a in (AutoImageProcessor, AutoProcessor)]
    pipe = pipeline("st-feature-extraction", model=name, revision=revision, **trust)
    image = processors[1].slide_to_image(slide)
    made = [model.embed(image, processor)[image.spot_of_obs] for model in models for processor in processors]
    made += [pipe(slide), *pipe([slide, image]), *pipe(each for each in [slide]), type(pipe)(models[0])(slide)]
    assert all(np.array_equal(made[0], each) and each.dtype == np.float32 for each in made), name
    embeddings[f"{name}@{revision}"] = made[0]
    embeddings[f"{name}@{revision} options"] = pipe(slide, batch_size=3, **told["options"])
    for part in (config, *models, *processors, pipe):
        classes.setdefault(type(part).__name__, type(part).__module__.split(".")[0])
    str(pipe.model.config)
if told["card"]:
    from huggingface_hub import ModelCard
    scope = {"adata": slide}
    exec(ModelCard.load(told["card"]).text.split("```python")[1].split("```")[0], scope)
    embeddings["card"] = scope["embedding"]
if told["dataset"]:
    import datasets
    for key, streaming in (("", False), (" streamed", True)):
        rows = list(datasets.load_dataset(told["dataset"], split="train", streaming=streaming))
        for column in ("indptr", "counts", "indices"):
            embeddings[column + key] = np.concatenate([np.asarray(row[column], np.int64) for row in rows])
        embeddings["id" + key] = np.array([row["id"] for row in rows])
np.savez(told["output"], **embeddings)
print(json.dumps(classes))
"""


def stranger(
    hub: Hub, folder: Path, token: str | None = None, offline: bool = False, **told: object
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What the process makes of the Hub: arrays by name, and where its classes come from.

    Args:
        folder: keeps its cache. told: `slide`, a file; `models`, pairs of a repository and a revision;
            `card`, of which repository the first lines of Python are run; `dataset`.
    """
    root = str(Path(__file__).parents[1])
    environment = {"PATH": os.environ.get("PATH", ""), "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    told = {"output": str(folder / "made.npz"), "options": OPTIONS, "card": None, "dataset": None, **told}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(told), root],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**environment, **hub.environment(token), **({"HF_HUB_OFFLINE": "1"} if offline else {})},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    with np.load(told["output"]) as made:
        return dict(made), json.loads(run.stdout.splitlines()[-1])


def embedding(folder: Path, adata: AnnData, **options: object) -> np.ndarray:
    """What `embed_slide` of the package writes."""
    adata = adata.copy()
    model, processor = STImageMAEModel.from_pretrained(folder), STPatchProcessor.from_pretrained(folder)
    embed_slide(adata, model, processor, progress=False, **options)
    return adata.obsm["X_stimg"]
