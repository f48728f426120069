"""A saved checkpoint in a fresh process: through every Auto class, with the package and without it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from anndata import AnnData
from test_trust import damaged, pickle_by_another_name, pickled_weights, tampered_genes, truncated_weights

from modeling_stimg import STImageMAEForPreTraining, STImageMAEModel, STPatchProcessor

SCRIPT = """
import json, sys
import numpy as np

folder, slide, output, package = sys.argv[1:5]
if package == "with":
    import modeling_stimg
else:
    sys.modules["modeling_stimg"] = None  # importing it raises, as where it is not installed
import anndata
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoProcessor
from transformers.utils import is_torchvision_available

if transformers.__version__.startswith("5.17.") and not is_torchvision_available():
    # What this version calls AutoImageProcessor only says that torchvision is missing.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
else:
    from transformers import AutoImageProcessor

trust = {} if package == "with" else {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **trust)
model, info = AutoModel.from_pretrained(folder, output_loading_info=True, **trust)
pretraining, pretraining_info = AutoModelForPreTraining.from_pretrained(folder, output_loading_info=True, **trust)
processors = [auto.from_pretrained(folder, **trust) for auto in (AutoProcessor, AutoImageProcessor)]
image = processors[0].slide_to_image(anndata.read_h5ad(slide))
embeddings = [m.embed(image, p, readout="both") for m in (model, pretraining) for p in processors]
assert all(np.array_equal(e, embeddings[0]) for e in embeddings)
np.save(output, embeddings[0])
refused = {}
for damaged in (sys.argv[5:]):
    try:
        for auto in (AutoProcessor, AutoModel, AutoModelForPreTraining):
            auto.from_pretrained(damaged, **trust)
    except Exception as error:
        refused[damaged] = str(error)
print(json.dumps({
    "refused": refused,
    "config": type(config).__name__,
    "classes": [type(x).__name__ for x in (model, pretraining, *processors)],
    "modules": [type(x).__module__.split(".")[0] for x in (model, pretraining, *processors)],
    "problems": [sorted(map(str, i[k])) for i in (info, pretraining_info)
                 for k in ("missing_keys", "unexpected_keys", "mismatched_keys")],
}))
"""


@pytest.mark.parametrize("package", ["with", "without"])
def test_every_auto_class_loads_the_folder_and_embeds_alike(
    package: str, checkpoint: Path, slides: dict[str, AnnData], tmp_path: Path
):
    slide, output = tmp_path / "slide.h5ad", tmp_path / "embedding.npy"
    slides["staggered"].write_h5ad(slide)
    spoilt = {
        damaged(checkpoint, tmp_path / damage.__name__, damage): message
        for damage, message in {
            tampered_genes: "genes.json is not the file that the processor was saved with",
            truncated_weights: "are damaged or cut off, or no safetensors (",
            pickle_by_another_name: "are damaged or cut off, or no safetensors (",
            pickled_weights: "no file named model.safetensors",
        }.items()
    }
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, (checkpoint, slide, output, package, *spoilt))],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout.splitlines()[-1])
    assert told["config"] == "STImageMAEConfig"
    assert told["classes"] == ["STImageMAEModel", "STImageMAEForPreTraining", "STPatchProcessor", "STPatchProcessor"]
    assert set(told["modules"]) == ({"modeling_stimg"} if package == "with" else {"transformers_modules"})
    assert told["problems"] == [[]] * 6
    for folder, message in spoilt.items():
        assert message in told["refused"][str(folder)], folder.name
        assert "\n" not in told["refused"][str(folder)], folder.name
    assert "UNEXPECTED" not in run.stderr

    processor = STPatchProcessor.from_pretrained(checkpoint)
    image = processor.slide_to_image(slides["staggered"])
    here = STImageMAEModel.from_pretrained(checkpoint).embed(image, processor, readout="both")
    np.testing.assert_allclose(np.load(output), here, atol=1e-5)


def test_folder_holds_all_code_and_no_pickle(checkpoint: Path):
    files = {p.name for p in checkpoint.iterdir()}
    code = {p.name for p in (Path(__file__).parents[1] / "modeling_stimg").glob("*_stimg.py")}
    assert code <= files
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "genes.json"} <= files
    assert not [f for f in files if f.endswith((".bin", ".pt", ".pth", ".pkl"))]
    entries = json.loads((checkpoint / "config.json").read_text())["auto_map"]
    assert set(entries) == {"AutoConfig", "AutoModel", "AutoModelForPreTraining"}


def test_saving_the_encoder_alone_also_loads(tmp_path: Path, checkpoint: Path):
    model = STImageMAEModel.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path)
    again = STImageMAEModel.from_pretrained(tmp_path)
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    pretraining = STImageMAEForPreTraining.from_pretrained(checkpoint)
    assert pretraining.stimg.layernorm.weight.equal(model.layernorm.weight)
