"""Models through a Hub and back: pushed, trained into it, for strangers, pinned, private, cut, offline."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pytest
import torch
from anndata import AnnData
from hub_server import TOKEN, Hub, serving_hub
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import _http
from safetensors.torch import load
from stranger import CLASSES, OPTIONS, embedding, stranger
from transformers import AutoModelForPreTraining, AutoProcessor, pipeline

from data_processing.open_corpus import find_corpus
from eval import run_masked_loss
from modeling_stimg import (
    STFeatureExtractionPipeline,
    STImageMAEForPreTraining,
    STImageMAEModel,
    STPatchProcessor,
    cli,
)
from modeling_stimg.hub import find_model
from modeling_stimg.model_files import PICKLES
from train.checkpoints import last_whole_checkpoint
from train.continuing import load_parent, parent_fields
from train.pushing import NotPushedError

CODE = {path.name for path in (Path(__file__).parents[1] / "modeling_stimg").glob("*_stimg.py")}
MODEL = {"config.json", "model.safetensors", "preprocessor_config.json", "genes.json", *CODE}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving_hub() as hub:
        yield hub


@pytest.fixture
def here(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """This process at the Hub, with an empty cache."""
    hub.here(monkeypatch, tmp_path / "cache")
    return hub


@pytest.fixture(scope="module")
def pushed(hub: Hub, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Hub:
    """`lab/made` holds the model of `checkpoint`, pushed part by part; tag `first` other weights before it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        hub.here(monkeypatch, tmp_path_factory.mktemp("cache"))
        model = STImageMAEForPreTraining.from_pretrained(checkpoint)
        other = STImageMAEForPreTraining.from_pretrained(checkpoint)
        with torch.no_grad():
            other.stimg.layernorm.weight.mul_(2)
        STPatchProcessor.from_pretrained(checkpoint).push_to_hub("lab/made")
        other.push_to_hub("lab/made")
        HfApi().create_tag("lab/made", tag="first")
        model.push_to_hub("lab/made")
    return hub


@pytest.fixture(scope="module")
def trained(hub: Hub, small_config: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`lab/trained`: a Trainer's run that pushes its checkpoints too, and its output folder."""
    from small_pretraining import train_here

    output = tmp_path_factory.mktemp("trained") / "model"
    with pytest.MonkeyPatch.context() as monkeypatch:
        hub.here(monkeypatch, tmp_path_factory.mktemp("cache"))
        saves = {"save_strategy": "steps", "save_steps": 5, "hub_strategy": "checkpoint", "hub_always_push": True}
        train_here(small_config, output, push_to_hub=True, hub_model_id="lab/trained", hub_token=TOKEN, **saves)
    return SimpleNamespace(output=output, repository=hub.repository("lab/trained"))


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *words: object) -> tuple[int, str]:
    """Exit status and stderr of `stimg`."""
    monkeypatch.setattr(sys, "argv", ["stimg", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code or 0, capsys.readouterr().err


def test_what_is_pushed_is_what_is_saved(pushed: Hub, checkpoint: Path):
    saved = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    files = pushed.files("lab/made")
    assert files.keys() == {*saved, "README.md"}
    assert {name: files[name] for name in saved} == saved


def test_processor_saved_and_pushed_at_once_brings_its_genes(checkpoint: Path, here: Hub, tmp_path: Path):
    processor = STPatchProcessor.from_pretrained(checkpoint)
    processor.save_pretrained(str(tmp_path / "p"), push_to_hub=True, repo_id="lab/processor")
    assert {"genes.json", "preprocessor_config.json", "processing_stimg.py"} <= here.files("lab/processor").keys()


def test_strangers_load_everything_and_embed_alike(
    pushed: Hub,
    trained: SimpleNamespace,
    slides: dict[str, AnnData],
    tmp_path: Path,
):
    with pytest.MonkeyPatch.context() as inside:
        pushed.here(inside, tmp_path / "cache")
        middle = next(c.id for c in trained.repository.history if c.title == "Training in progress, step 5")
        models = [("lab/made", None), ("lab/made", "first"), ("lab/trained", None), ("lab/trained", middle)]
        folders = [Path(snapshot_download(name, revision=revision)) for name, revision in models]
    for (name, revision), folder in zip(models, folders, strict=True):
        found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert found == pushed.repository(name).commit(revision or "main").files
    slide = tmp_path / "slide.h5ad"
    slides["staggered"].write_h5ad(slide)
    made, classes = stranger(pushed, tmp_path, slide=str(slide), models=models)
    assert set(classes) == CLASSES
    assert set(classes.values()) == {"transformers_modules"}

    for (name, revision), folder in zip(models, folders, strict=True):
        for key, options in (("", {}), (" options", OPTIONS)):
            here = embedding(folder, slides["staggered"], **options)
            np.testing.assert_array_equal(made[f"{name}@{revision}{key}"], here)
    assert not np.array_equal(made["lab/made@None"], made["lab/made@first"])
    assert not np.array_equal(made["lab/trained@None"], made[f"lab/trained@{middle}"])

    asked = len(pushed.requests)
    again, _ = stranger(pushed, tmp_path, slide=str(slide), models=[models[0], models[-1]], offline=True)
    assert len(pushed.requests) == asked
    assert len(again) == 4
    for key in again:
        np.testing.assert_array_equal(again[key], made[key])


def test_package_brings_its_own_pipeline(pushed: Hub, here: Hub, checkpoint: Path, slides: dict[str, AnnData]):
    for trust in ({}, {"trust_remote_code": True}):
        pipe = pipeline("st-feature-extraction", model="lab/made", **trust)
        assert type(pipe) is STFeatureExtractionPipeline
        np.testing.assert_array_equal(pipe(slides["square"]), embedding(checkpoint, slides["square"]))
    with pytest.raises(ValueError, match=r"Unknown options \['strid'\]"):
        pipe(slides["square"], strid=3)
    with pytest.raises(ValueError, match="Got a str: expected an AnnData"):
        pipe("slide.h5ad")
    assert isinstance(AutoModelForPreTraining.from_pretrained("lab/made", revision="first"), STImageMAEForPreTraining)


def test_run_in_the_hub_is_a_model_and_nothing_else(trained: SimpleNamespace, tmp_path: Path):
    final = trained.repository.commit("main").files
    told = {"README.md", "pretraining.json", "loss.png", ".gitattributes"}
    assert {name for name in final if "/" not in name} == MODEL | told
    for name in MODEL | told - {".gitattributes"}:
        assert final[name] == (trained.output / name).read_bytes(), name
    last = {name.removeprefix("last-checkpoint/"): content for name, content in final.items() if "/" in name}
    newest, _ = last_whole_checkpoint(trained.output)
    assert last == {name: (newest / name).read_bytes() for name in MODEL}

    titles = [commit.title for commit in trained.repository.history]
    assert titles[-1] == "Model save"
    fifth = trained.repository.history[titles.index("Training in progress, step 5")].files
    assert {name for name in fifth if "/" not in name} >= MODEL | {"README.md", "pretraining.json"}
    told = [json.loads(files["pretraining.json"])["arguments"] for files in (fifth, final)]
    assert [(t.get("steps_done"), t["num_windows"]) for t in told] == [(5, 40), (None, 96)]
    assert 0 < told[0]["num_spots_seen"] < told[1]["num_spots_seen"]
    weights = [load(files["model.safetensors"]) for files in (fifth, final)]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])

    everything = [f for commit in trained.repository.history for f in commit.files.items()]
    assert not [name for name, content in everything if TOKEN.encode() in content]
    assert not [path for path in trained.output.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not list(trained.output.glob(".pushing*"))
    assert "# lab/trained" in final["README.md"].decode()


def test_recipes_take_models_of_the_hub(
    trained: SimpleNamespace, here: Hub, slides: dict[str, AnnData], tmp_path: Path
):
    commit = trained.repository.branches["main"]
    fields, parent = parent_fields("lab/trained"), load_parent(f"lab/trained@{commit}")
    assert (fields["hidden_size"], fields["normalization"]) == (32, "standardized")
    assert parent.name == f"lab/trained@{commit}"
    assert {slide.name for slide in parent.slides} == set(slides)
    slides["square"].write_h5ad(tmp_path / "square.h5ad")
    words = ["--models", "lab/trained@main", str(trained.output), "--slides", str(tmp_path / "square.h5ad")]
    run_masked_loss.main([*words, "--output_dir", str(tmp_path / "loss"), "--coverage", "0.3"])
    results = json.loads((tmp_path / "loss" / "results.json").read_text())
    models, (there, local) = results["metadata"]["models"], results["records"]
    assert [models[name]["hub"] for name in ("trained@main", "model")] == [f"lab/trained@{commit}", None]
    assert models["trained@main"]["arguments"] == models["model"]["arguments"]
    assert {**there, "trained_model": "model"} == local


def test_every_strategy_leaves_what_it_says(
    hub: Hub, here: Hub, small_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from small_pretraining import train_here

    common = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "hub_always_push": True}
    for strategy in ("end", "every_save", "all_checkpoints"):
        name = f"lab/{strategy}"
        branch = "trial" if strategy == "end" else "main"
        fields = {**common, "hub_strategy": strategy, "hub_revision": branch}
        train_here(small_config, tmp_path / strategy, hub_model_id=name, **fields)
        assert hub.repository(name).branches[branch] == hub.repository(name).history[-1].id
        titles = [commit.title for commit in hub.repository(name).history[1:]]
        during = [] if strategy == "end" else [f"Training in progress, step {step}" for step in (2, 4)]
        assert titles == [*during, "Model save"]
        folders = {"checkpoint-2", "checkpoint-4"} if strategy == "all_checkpoints" else set()
        assert {path for path in hub.files(name, branch) if "/" in path} == {f"{f}/{m}" for f in folders for m in MODEL}
    pickles = {n for r in hub.repositories.values() for c in r.history for n in c.files if Path(n).suffix in PICKLES}
    assert not pickles, "of no strategy, in no commit"
    weights = [STImageMAEModel.from_pretrained(name, subfolder=f).layernorm.weight for f in ("checkpoint-2", "")]
    assert not torch.equal(*weights)
    first, last = (AutoProcessor.from_pretrained(name, subfolder=f) for f in ("checkpoint-2", ""))
    assert first.vocabulary == last.vocabulary


def test_failing_push_costs_nothing_but_itself(
    hub: Hub,
    here: Hub,
    small_config: Path,
    small_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    from small_pretraining import same_weights, train_here

    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    hub.cut_uploads(1000, after=1000)
    fields = {"push_to_hub": True, "hub_model_id": "lab/cut", "save_strategy": "steps", "save_steps": 6}
    with pytest.raises(
        NotPushedError, match=r"The model is in .*, but not on the Hub, where `hf upload lab/cut"
    ) as told:
        train_here(small_config, tmp_path / "cut", **fields)
    hub.cut_uploads(0)
    assert TOKEN not in str(told.value)
    assert "\n" not in str(told.value)
    assert [commit.title for commit in hub.repository("lab/cut").history] == ["initial commit"]
    assert same_weights(tmp_path / "cut", small_model)
    assert not list((tmp_path / "cut").glob(".pushing*"))


def test_pushing_without_a_token_stops_before_any_work(
    hub: Hub, small_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from small_pretraining import train_here

    for token, reason in ((None, "nobody is logged in"), ("hf_wrong", "knows no such token")):
        hub.here(monkeypatch, tmp_path / "cache", token)
        with pytest.raises(OSError, match=f"push_to_hub is on, but nothing could be pushed: .*{reason}") as told:
            train_here(small_config, tmp_path / "never", push_to_hub=True, hub_model_id="lab/never")
        assert "hf_wrong" not in str(told.value)
        assert not (tmp_path / "never").exists()


def test_upload_cut_in_the_middle_leaves_the_repository_as_it_was_and_is_repeated(
    pushed: Hub, here: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    api = HfApi()
    api.create_repo("lab/again")
    (checkpoint_size,) = {(checkpoint / "model.safetensors").stat().st_size}
    here.cut_uploads(1000, after=checkpoint_size // 2)
    with pytest.raises(RuntimeError, match=r"Error while uploading 'model\.safetensors'"):
        api.upload_folder(repo_id="lab/again", folder_path=checkpoint)
    assert here.files("lab/again") == {}
    assert find_missing("lab/again") == "holds no preprocessor_config.json"
    here.cut_uploads(1, after=checkpoint_size // 2)  # the client tries again by itself
    api.upload_folder(repo_id="lab/again", folder_path=checkpoint)
    assert here.files("lab/again") == {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    uploads = [status for method, _, status, _ in here.requests if method == "PUT"]
    assert uploads[-2:] == [0, 200]


def find_missing(name: str) -> str:
    """What is said of a repository without a model."""
    with pytest.raises(FileNotFoundError) as told:
        find_model(name)
    return str(told.value).split(": ")[0].partition(" ")[2]


def test_command_line_takes_models_of_the_hub_at_a_revision(
    pushed: Hub,
    here: Hub,
    checkpoint: Path,
    slides: dict[str, AnnData],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    slide, output = tmp_path / "slide.h5ad", tmp_path / "out.h5ad"
    slides["square"].write_h5ad(slide)
    status, told = command(monkeypatch, capsys, "embed", slide, "--model", "lab/made", "--output", output)
    assert status == 0, told
    assert "Fetching 4 files" in told
    newest = anndata.read_h5ad(output).obsm["X_stimg"]
    np.testing.assert_array_equal(newest, embedding(checkpoint, slides["square"]))
    words = ("embed", slide, "--output", output, "--model")
    for pinned in (("lab/made@first",), ("lab/made", "--revision", "first")):
        assert command(monkeypatch, capsys, *words, *pinned)[0] == 0
        first = anndata.read_h5ad(output).obsm["X_stimg"]
        assert not np.array_equal(first, newest)
    found = find_model("lab/made@first")
    assert (found.name, found.hub) == ("lab/made", f"lab/made@{pushed.repository('lab/made').tags['first']}")
    np.testing.assert_array_equal(first, embedding(found.folder, slides["square"]))
    assert not list(found.folder.rglob("*.py"))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(pushed.requests)
    assert command(monkeypatch, capsys, *words, "lab/made@first")[0] == 0
    np.testing.assert_array_equal(anndata.read_h5ad(output).obsm["X_stimg"], first)
    status, told = command(monkeypatch, capsys, *words, "lab/other")
    assert (status, told.count("\n")) == (2, 1)
    assert "lab/other is not in the cache" in told
    assert "HF_HUB_OFFLINE is set" in told
    assert len(pushed.requests) == asked


@pytest.mark.parametrize("token", [None, "hf_strangertoken", "hf_unknowntoken"])
def test_private_missing_and_misnamed_models_end_in_one_sentence(
    token: str | None,
    pushed: Hub,
    here: Hub,
    tmp_path: Path,
    slides: dict[str, AnnData],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    HfApi().create_repo("lab/secret", private=True, exist_ok=True)
    HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="lab/secret")
    pushed.tokens["hf_strangertoken"] = {"stranger"}
    pushed.here(monkeypatch, tmp_path / "cache", token)
    slide = tmp_path / "slide.h5ad"
    slides["square"].write_h5ad(slide)
    said = {}
    for name in ("lab/secret", "lab/nowhere"):
        status, told = command(
            monkeypatch, capsys, "embed", slide, "--model", name, "--output", tmp_path / "x.h5ad", "--device", "cpu"
        )
        assert (status, told.count("\n")) == (2, 1), told
        assert "Traceback" not in told
        assert not token or token not in told
        said[name] = told.replace(name, "NAME")
    assert said["lab/secret"] == said["lab/nowhere"], "whether it is there is not told either"
    expected = "refuses the token" if token == "hf_unknowntoken" else "no model NAME on http://127.0.0.1"
    assert expected in said["lab/secret"]
    assert not (tmp_path / "x.h5ad").exists()
    for find, kind in ((load_parent, "model"), (find_corpus, "dataset")):
        if kind == "dataset":
            pushed.repositories[kind, "lab/secret"] = replace(pushed.repository("lab/secret"), kind=kind)
        with pytest.raises(OSError, match=r"refuses the token|or it is private: check") as told:
            find("lab/secret")
        assert "\n" not in str(told.value)
        assert not token or token not in str(told.value)
    if token != "hf_unknowntoken":
        with pytest.raises(RepositoryNotFoundError):
            snapshot_download("lab/secret")


def test_what_is_no_revision_or_no_model_is_told(pushed: Hub, here: Hub, checkpoint: Path, monkeypatch, tmp_path: Path):
    for given, message in {
        "lab/made@nothing": "lab/made has no revision 'nothing'",
        "lab/made@": "There is no model folder lab/made@",
        "./lab/made": "There is no model folder ./lab/made",
        "a/b/c": "There is no model folder a/b/c",
    }.items():
        with pytest.raises(FileNotFoundError, match=message):
            find_model(given)
    with pytest.raises(ValueError, match="is a folder and has no revision 'first'"):
        find_model(str(checkpoint), "first")
    with pytest.raises(ValueError, match="'other' is another one"):
        find_model("lab/made@first", "other")
    assert find_model(str(checkpoint)).hub is None
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        OSError,
        match=r"lab/made is no folder here, and could not be downloaded from http://127\.0\.0\.1:9 \(ConnectError\)",
    ):
        find_model("lab/made")
