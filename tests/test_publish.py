"""Publishing a model and a corpus: what is checked, what is refused, and what is sent to the Hub."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from anndata import AnnData
from huggingface_hub import HfApi, ModelCard
from model_results import write_domains
from transformers import ViTMAEConfig

from data_processing.fingerprints import fingerprint, load_fingerprints, save_fingerprints
from model_cards import fingerprint as fingerprints
from model_cards.card import make_card
from model_cards.fingerprint import TOLERANCE, compare_with_fingerprint, embed_in_fresh_process
from model_cards.gather import gather
from model_cards.publish import command_line
from modeling_stimg import GeneVocabulary, STImageMAEModel, STPatchProcessor

REPO = "org/tiny"


@pytest.fixture(scope="module")
def gathered(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, fingerprints.Embedded]:
    """The folder of a model that was really trained, with its fingerprint and card, and what the fresh process gave."""
    folder, answers = tmp_path_factory.mktemp("model_cards") / "tiny", []

    def embed_and_tell(folder: Path) -> fingerprints.Embedded:
        answers.append(embed_in_fresh_process(folder))
        return answers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprints, "embed_in_fresh_process", embed_and_tell)
        gather(small_model, folder)
    arguments = json.loads((folder / "pretraining.json").read_text())["arguments"]
    results = write_domains(tmp_path_factory.mktemp("domains"), arguments)
    make_card(folder, {"repo": REPO, "results": results})
    return folder, answers[-1]


@pytest.fixture(scope="module")
def published(gathered: tuple[Path, fingerprints.Embedded]) -> Path:
    return gathered[0]


@pytest.fixture(scope="module")
def embedded(gathered: tuple[Path, fingerprints.Embedded]) -> fingerprints.Embedded:
    return gathered[1]


@pytest.fixture
def folder(published: Path, embedded: fingerprints.Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil; the fresh process' answer is known already."""
    monkeypatch.setattr(fingerprints, "embed_in_fresh_process", lambda folder: embedded)
    return Path(shutil.copytree(published, tmp_path / "tiny"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict]]:
    """Every call that would reach the Hub."""
    calls: list[tuple[str, dict]] = []

    def record(name: str):
        def method(self, *args, **kwargs):
            calls.append((name, {**kwargs, "args": args}))
            return SimpleNamespace(commit_url="https://hub/commit/1")

        return method

    for name in ("create_repo", "create_branch", "upload_folder", "create_commit", "upload_file"):
        monkeypatch.setattr(HfApi, name, record(name))
    monkeypatch.setattr(ModelCard, "validate", record("validate"))
    return calls


# ---------------------------------------------------------------- a model


def test_a_trained_model_passes_and_a_dry_run_sends_nothing(published: Path, hub: list, capsys):
    assert command_line([str(published), "--repo", REPO, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "the same bits as in its fingerprint" in told
    assert not hub
    listed = {line.split()[-1] for line in told.split("Would be uploaded")[1].splitlines()[1:]}
    assert listed == {path.name for path in published.iterdir()}
    assert {"README.md", "model.safetensors", "genes.json", "modeling_stimg.py", "pretraining.json"} <= listed
    assert f"model {REPO}, branch main" in told


def test_gathering_leaves_behind_what_is_only_of_the_run(published: Path, small_model: Path):
    behind = {path.name for path in small_model.iterdir()} - {path.name for path in published.iterdir()}
    assert behind == {"trainer_state.json", "untrained"}
    assert (published / "model.safetensors").read_bytes() == (small_model / "model.safetensors").read_bytes()
    assert json.loads((published / "pretraining.json").read_text())["cost"]["steps"] == 12
    with pytest.raises(ValueError, match="holds a model already"):
        gather(small_model, published)


def test_the_upload_is_one_commit_on_the_branch_after_the_card_is_validated(folder: Path, hub: list, capsys):
    words = [str(folder), "--repo", REPO, "--private", "--revision", "v1"]
    assert command_line(words) == 0, capsys.readouterr().err
    assert [name for name, _ in hub] == ["validate", "create_repo", "create_branch", "upload_folder"]
    asked = dict(hub)
    assert asked["create_repo"] == {"args": (REPO,), "private": True, "repo_type": "model", "exist_ok": True}
    assert asked["create_branch"] == {"args": (REPO,), "branch": "v1", "repo_type": "model", "exist_ok": True}
    assert (asked["upload_folder"]["revision"], asked["upload_folder"]["repo_id"]) == ("v1", REPO)
    assert set(asked["upload_folder"]["allow_patterns"]) == {path.name for path in folder.iterdir()}
    assert asked["upload_folder"]["delete_patterns"] == "*", "what the folder does not hold, the repository does not"
    assert "https://hub/commit/1" in capsys.readouterr().out


def tampered_genes(folder: Path) -> None:
    content = json.loads((folder / "genes.json").read_text())
    content["gene_ids"][:2] = content["gene_ids"][1::-1]
    (folder / "genes.json").write_text(json.dumps(content))


def truncated_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])


def pickle_for_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def pickle_below(folder: Path) -> None:
    (folder / "checkpoint-1").mkdir()
    torch.save({}, folder / "checkpoint-1" / "optimizer.pt")


def other_type(folder: Path) -> None:
    ViTMAEConfig().save_pretrained(folder)


def no_card(folder: Path) -> None:
    (folder / "README.md").unlink()


def no_metadata(folder: Path) -> None:
    (folder / "README.md").write_text("# A model\n")


def broken_metadata(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: [a\n---\n# A model\n")


def better_numbers(folder: Path) -> None:
    lines = (folder / "README.md").read_text().splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if line.strip().startswith("value: "))
    lines[first] = lines[first].split("value:")[0] + "value: 0.999\n"
    (folder / "README.md").write_text("".join(lines))


def unknown_file(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


def no_genes_sha256(folder: Path) -> None:
    edit(folder / "preprocessor_config.json", "genes_sha256", None)


def fewer_genes(folder: Path) -> None:
    vocabulary = GeneVocabulary.load(folder / "genes.json")
    STPatchProcessor(GeneVocabulary(vocabulary.gene_ids[:-1]), window_size=6, num_channels=32).save_pretrained(folder)


def no_code_named(folder: Path) -> None:
    edit(folder / "config.json", "auto_map", {})


def changed_option(folder: Path) -> None:
    edit(folder / "preprocessor_config.json", "min_observed", 0.5)


def no_fingerprint(folder: Path) -> None:
    (folder / "fingerprint.json").unlink()


def edit(path: Path, key: str, value: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (tampered_genes, "genes.json is not the file that the processor was saved with"),
        (truncated_weights, "is damaged or cut off at"),
        (pickle_for_weights, "holds pytorch_model.bin: pickles ("),
        (pickle_below, "holds checkpoint-1/optimizer.pt: pickles ("),
        (other_type, "is a model of type 'vit_mae' (config.json): expected 'st_image_mae'"),
        (no_card, "lacks README.md"),
        (no_metadata, "has no metadata"),
        (broken_metadata, "cannot be read"),
        (better_numbers, "is not that of its results"),
        (unknown_file, "holds notes.txt, which no published model has"),
        (no_genes_sha256, "names no genes_sha256"),
        (fewer_genes, "knows 120 genes and genes.json names 119"),
        (no_code_named, "lacks AutoConfig, AutoModel, AutoModelForPreTraining in auto_map"),
        (changed_option, "preprocessor_config.json changed since fingerprint.json was written"),
        (no_fingerprint, "lacks fingerprint.json"),
    ],
)
def test_a_model_that_is_not_whole_is_refused_in_one_sentence(damage, message: str, folder: Path, hub: list, capsys):
    damage(folder)
    assert command_line([str(folder), "--repo", REPO]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not hub


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repo", "org/other"], "The card is that of org/tiny, to be published as org/other"),
        (["--repo", "tiny"], "expected ORG/NAME"),
        (["--repo", "org/a b"], "org/a b"),
    ],
)
def test_another_name_is_refused(words: list[str], message: str, folder: Path, hub: list, capsys):
    assert command_line([str(folder), *words]) == 2
    assert message in capsys.readouterr().err
    assert not hub


# ---------------------------------------------------------------- its fingerprint


def test_the_fingerprint_is_the_models_own_embedding(published: Path, embedded: fingerprints.Embedded):
    processor = STPatchProcessor.from_pretrained(published)
    image = processor.slide_to_image(fingerprints.phantom_slide(processor))
    here = STImageMAEModel.from_pretrained(published).embed(image, processor)
    np.testing.assert_allclose(embedded.embedding, here[image.spot_of_obs], atol=1e-5)


def test_another_machine_may_differ_a_little_and_the_same_not_at_all(
    folder: Path, embedded: fingerprints.Embedded, monkeypatch: pytest.MonkeyPatch
):
    deviation, elsewhere = embedded.embedding.std(), {**embedded.environment, "processor": "another"}

    def answer(change: float, environment: dict[str, str], slide: str = embedded.slide_sha256) -> str:
        moved = replace(
            embedded,
            embedding=(embedded.embedding + np.float32(change * deviation)).astype(np.float32),
            environment=environment,
            slide_sha256=slide,
        )
        monkeypatch.setattr(fingerprints, "embed_in_fresh_process", lambda folder: moved)
        return compare_with_fingerprint(folder)

    assert answer(0, elsewhere) == "the same bits as in its fingerprint"
    assert "which another machine wrote" in answer(0.5 * TOLERANCE, elsewhere)
    with pytest.raises(ValueError, match="has other bits"):
        answer(0.5 * TOLERANCE, embedded.environment)
    with pytest.raises(ValueError, match=r"differs from fingerprint\.json by 0\.002 standard deviations"):
        answer(2 * TOLERANCE, elsewhere)
    with pytest.raises(ValueError, match="draws other numbers"):
        answer(0, elsewhere, slide="other")
    monkeypatch.setattr(
        fingerprints, "embed_in_fresh_process", lambda folder: replace(embedded, embedding=embedded.embedding[1:])
    )
    with pytest.raises(ValueError, match=r"differs from fingerprint\.json by inf"):
        compare_with_fingerprint(folder)


def test_code_that_needs_the_package_is_found_out(published: Path, tmp_path: Path):
    folder = Path(shutil.copytree(published, tmp_path / "tiny"))
    code = folder / "modeling_stimg.py"
    guarded = "\ntry:\n    import modeling_stimg\nexcept ImportError as error:\n    raise error\n"
    code.write_text(code.read_text() + guarded)
    with pytest.raises(ValueError, match=r"does not load and embed in a process without this package: .*modeling"):
        embed_in_fresh_process(folder)


# ---------------------------------------------------------------- a corpus


@pytest.fixture
def corpus(small_corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_corpus, tmp_path / "corpus"))


def test_a_corpus_is_a_dataset_and_publishes_its_shards(corpus: Path, hub: list, capsys):
    assert command_line([str(corpus), "--repo", "org/corpus", "--dry-run"]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert not hub
    listed = {line.split()[-1] for line in told.split("Would be uploaded")[1].splitlines()[1:]}
    assert {
        "README.md",
        "report.json",
        "corpus.json",
        "genes.json",
        *(f"data/s{i}.parquet" for i in range(3)),
    } <= listed
    assert not [name for name in listed if name.startswith(("arrow", ".build"))]
    assert "dataset org/corpus, branch main" in told


def cut_shard(corpus: Path, slides: dict[str, AnnData]) -> None:
    (corpus / "data" / "s1.parquet").write_bytes((corpus / "data" / "s1.parquet").read_bytes()[:-50])


def missing_shard(corpus: Path, slides: dict[str, AnnData]) -> None:
    (corpus / "data" / "s1.parquet").unlink()


def changed_row(corpus: Path, slides: dict[str, AnnData]) -> None:
    table = pq.read_table(corpus / "data" / "s1.parquet")
    number = table.column_names.index("organ")
    pq.write_table(table.set_column(number, table.schema.field(number), [["moon"]]), corpus / "data" / "s1.parquet")


def other_columns(corpus: Path, slides: dict[str, AnnData]) -> None:
    table = pq.read_table(corpus / "data" / "s1.parquet")
    pq.write_table(table.drop_columns(["organ"]), corpus / "data" / "s1.parquet")


def labelled_role(corpus: Path, slides: dict[str, AnnData]) -> None:
    report = json.loads((corpus / "report.json").read_text())
    report["records"][0]["role"] = "labelled"
    (corpus / "report.json").write_text(json.dumps(report))


def evaluation_id(corpus: Path, slides: dict[str, AnnData]) -> None:
    report = json.loads((corpus / "report.json").read_text())
    report["extra"]["evaluation_ids"] = ["S2"]
    (corpus / "report.json").write_text(json.dumps(report))


def evaluation_content(corpus: Path, slides: dict[str, AnnData]) -> None:
    vocabulary = GeneVocabulary.load(corpus / "genes.json")
    table = pq.read_table(corpus / "data" / "s1.parquet")
    from data_processing.st_corpus import numpy_row
    from model_cards.corpus_checks import _slide

    slide = _slide(numpy_row(table), vocabulary)
    shuffled = slide[np.random.default_rng(0).permutation(slide.n_obs)].copy()
    save_fingerprints([fingerprint(shuffled, vocabulary, "held_out_tissue")], corpus / "evaluation.npz")
    assert len(load_fingerprints(corpus / "evaluation.npz")) == 1


def no_configs(corpus: Path, slides: dict[str, AnnData]) -> None:
    (corpus / "README.md").write_text("---\nlicense: other\n---\n# A corpus\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_shard, "s1.parquet of {corpus} is no shard of a corpus"),
        (missing_shard, "holds 2 shards, its report tells of 3 slides and corpus.json of 3 (s1)"),
        (changed_row, "are not those that report.json was written of"),
        (other_columns, "its columns are not those of a corpus"),
        (labelled_role, "s0 of {corpus} has the role labelled"),
        (evaluation_id, "s2 is evaluation slide S2 by its id"),
        (evaluation_content, "s1 has the content of evaluation slide held_out_tissue"),
        (no_configs, "lacks configs"),
    ],
)
def test_a_corpus_with_something_wrong_is_refused(
    damage, message: str, corpus: Path, slides: dict[str, AnnData], hub: list, capsys
):
    damage(corpus, slides)
    assert command_line([str(corpus), "--repo", "org/corpus"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.format(corpus=corpus) in error
    assert not hub


def test_a_folder_that_is_neither_is_refused(tmp_path: Path, capsys):
    assert command_line([str(tmp_path), "--repo", REPO, "--type", "dataset"]) == 2
    assert "holds no corpus.json" in capsys.readouterr().err
    assert command_line([str(tmp_path / "nowhere"), "--repo", REPO]) == 2
    assert "There is no folder" in capsys.readouterr().err
