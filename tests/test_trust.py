"""Models that are not what they should be, and foreign files that nothing in the project may unpickle."""

import ast
import json
import shutil
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from anndata import AnnData
from safetensors import SafetensorError
from transformers import AutoModel, AutoModelForPreTraining, AutoProcessor, ViTMAEConfig, pipeline

from modeling_stimg import STImageMAEConfig, STImageMAEModel, STPatchProcessor
from modeling_stimg.cli import main
from train.continuing import load_parent

ROOT = Path(__file__).parents[1]
# Tests pickle objects of their own, as loader workers do.
FOLDERS = ("modeling_stimg", "data_processing", "train", "eval", "model_cards")


# ---------------------------------------------------------------- models


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory, slides: dict[str, AnnData]) -> Path:
    path = tmp_path_factory.mktemp("trust") / "slide.h5ad"
    slides["square"].write_h5ad(path)
    return path


def tampered_genes(folder: Path) -> None:
    content = json.loads((folder / "genes.json").read_text())
    content["gene_ids"][0], content["gene_ids"][1] = content["gene_ids"][1], content["gene_ids"][0]
    (folder / "genes.json").write_text(json.dumps(content))


def truncated_weights(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1000])


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"layernorm.weight": torch.ones(2)}, folder / "pytorch_model.bin")


def pickle_by_another_name(folder: Path) -> None:
    torch.save({"layernorm.weight": torch.ones(2)}, folder / "model.safetensors")


def other_type(folder: Path) -> None:
    ViTMAEConfig().save_pretrained(folder)


def config_of_no_model(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


def missing_part(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": {"layernorm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


DAMAGES = {
    tampered_genes: "genes.json is not the file that the processor was saved with",
    truncated_weights: "model.safetensors of {model} is damaged or cut off at",
    pickled_weights: "holds no model.safetensors (only pytorch_model.bin, and reading such a pickle can run any code)",
    pickle_by_another_name: "model.safetensors of {model} is damaged or cut off at",
    other_type: "{model} is a model of type 'vit_mae' (config.json): expected 'st_image_mae'",
    config_of_no_model: "config.json of {model} holds no config",
    missing_part: "holds no model-00001-of-00002.safetensors, a part of the weights",
}


def damaged(checkpoint: Path, folder: Path, damage) -> Path:
    """A copy of a model that something was done to."""
    shutil.copytree(checkpoint, folder)
    damage(folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_ends_in_one_sentence_status_2_and_no_file(
    damage, checkpoint: Path, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    model, output = damaged(checkpoint, tmp_path / "model", damage), tmp_path / "output"
    output.mkdir()
    words = ["embed", str(slide), "--model", str(model), "--output", str(output / "x.h5ad")]
    monkeypatch.setattr(sys, "argv", ["stimg", *words, "--plot", str(output / "x.png")])
    with pytest.raises(SystemExit) as status:
        main()
    assert status.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert DAMAGES[damage].format(model=model) in errors[0]
    assert not list(output.iterdir())


def load_by_class(model: Path, slide: AnnData) -> None:
    STPatchProcessor.from_pretrained(model)
    STImageMAEModel.from_pretrained(model)


def load_automatically(model: Path, slide: AnnData) -> None:
    for auto in (AutoProcessor, AutoModelForPreTraining, AutoModel):
        auto.from_pretrained(model, trust_remote_code=False)


def load_pipeline(model: Path, slide: AnnData) -> None:
    pipeline("st-feature-extraction", model=str(model))(slide)


def load_to_go_on(model: Path, slide: AnnData) -> None:
    load_parent(str(model))


CUT = r"weights of .* damaged or cut off.*: download or copy|is damaged or cut off at"
REFUSALS = {
    tampered_genes: "genes.json is not the file that the processor was saved with",
    truncated_weights: CUT,
    pickled_weights: r"no (file named )?model\.safetensors",
    pickle_by_another_name: CUT,
    other_type: "of type 'vit_mae'.* expect",
    missing_part: r"model-00001-of-00002\.safetensors",
}
ENTRANCES = (load_by_class, load_automatically, load_pipeline, load_to_go_on)


@pytest.mark.parametrize(
    ("damage", "entrance"),
    # AutoModel makes whatever model a config names.
    [pair for pair in product(REFUSALS, ENTRANCES) if pair != (other_type, load_automatically)],
)
def test_a_damaged_model_is_refused_at_every_entrance(
    damage, entrance, checkpoint: Path, slides: dict[str, AnnData], tmp_path: Path
):
    model = damaged(checkpoint, tmp_path / "model", damage)
    with pytest.raises((ValueError, OSError, SafetensorError), match=REFUSALS[damage]) as told:
        entrance(model, slides["square"])
    if not (entrance is load_pipeline and damage in (pickled_weights, missing_part)):  # transformers' own long report
        assert "\n" not in str(told.value)


def test_fields_of_another_type_make_no_config():
    with pytest.raises(ValueError, match="of type 'bert'"):
        STImageMAEConfig.from_dict({"model_type": "bert"})


# ---------------------------------------------------------------- the source

UNPICKLING_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNPICKLING_CALLS = {
    *("torch.load", "torch.jit.load", "torch.hub.load", "torch.export.load", "torch.package.PackageImporter"),
    *("pandas.read_pickle", "numpy.lib.format.read_array", "sklearn.externals.joblib.load"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"),
}


def unpicklings(source: str) -> list[str]:
    """What in a source can run code that a foreign file holds: modules, calls, and arguments that allow it."""
    tree, names, found = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                found += [alias.name] if alias.name.split(".")[0] in UNPICKLING_MODULES else []
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found += [node.module] if node.module.split(".")[0] in UNPICKLING_MODULES else []
    for node in ast.walk(tree):
        # A name counts where it is called, and where it is handed on.
        if isinstance(node, ast.Attribute | ast.Name):
            words = ast.unparse(node).split(".")
            meant = ".".join([names.get(words[0], words[0]), *words[1:]])
            if meant in UNPICKLING_CALLS:
                found.append(meant)
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                safe = {"allow_pickle": False, "weights_only": True, "use_safetensors": True}.get(keyword.arg or "")
                if safe is not None and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is safe):
                    found.append(f"{keyword.arg}={ast.unparse(keyword.value)}")
            if isinstance(node.func, ast.Name) and node.func.id == "__import__":
                found.append("__import__")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x')",
        "from torch import load\nload('x')",
        "from torch import load as read\nmap(read, files)",
        "import pickle",
        "import pandas as pd\npd.read_pickle('x')",
        "from joblib import load",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', allow_pickle=flag)",
        "model.from_pretrained('x', use_safetensors=False)",
        "load('x', weights_only=False)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "__import__('pickle').loads(b'')",
    ],
)
def test_every_way_to_unpickle_is_recognised(source: str):
    assert unpicklings(source)


def test_what_unpickles_nothing_is_left_alone():
    assert not unpicklings(
        "import numpy as np, yaml\nmodel.eval()\nnp.load('x', allow_pickle=False)\nyaml.safe_load(s)"
    )


def test_code_of_a_repository_is_run_in_one_place_alone():
    """In the process that publishing starts to see that a model loads; everywhere else our own code reads files."""
    found = {
        str(path.relative_to(ROOT)): ast.unparse(keyword.value)
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "trust_remote_code"
    }
    assert found == {"model_cards/fresh_process.py": "True"}


def test_nothing_in_the_project_unpickles_a_foreign_file():
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert {path.relative_to(ROOT).parts[0] for path in paths} == set(FOLDERS)
    found = {str(path.relative_to(ROOT)): what for path in paths if (what := unpicklings(path.read_text("utf-8")))}
    assert not found
