"""Publishing a model and a corpus: what is checked, what is refused, and what is sent to the Hub."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from anndata import AnnData
from hub_server import TOKEN, Hub, serving_hub
from huggingface_hub import HfApi, ModelCard, constants, snapshot_download
from huggingface_hub.utils import _http
from model_results import write_domains
from stranger import CLASSES, OPTIONS, embedding, stranger
from transformers import ViTMAEConfig

from data_processing.fingerprints import fingerprint, load_fingerprints, save_fingerprints
from data_processing.open_corpus import Corpus, find_corpus
from model_cards import fingerprint as fingerprints
from model_cards.card import make_card
from model_cards.fingerprint import TOLERANCE, compare_with_fingerprint, embed_in_fresh_process
from model_cards.gather import gather, halve_gene_embeddings
from model_cards.publish import command_line
from modeling_stimg import GeneVocabulary, STImageMAEModel, STPatchProcessor

REPO, CORPUS = "lab/tiny", "lab/corpus"


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
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty Hub, and this process at it."""
    with serving_hub() as hub:
        hub.here(monkeypatch, tmp_path / "cache")
        yield hub


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def only_error(capsys: pytest.CaptureFixture) -> str:
    """The one sentence in which a command ended, without a token and without a traceback."""
    said = capsys.readouterr()
    assert "hf_" not in said.out + said.err
    assert "Traceback" not in said.err
    (error,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert said.err.endswith(f"{error}\n")
    return error


# ---------------------------------------------------------------- a model


def test_a_trained_model_passes_and_a_dry_run_sends_nothing(published: Path, hub: Hub, capsys):
    assert command_line([str(published), "--repo", REPO, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "the same bits as in its fingerprint" in told
    assert not hub.requests
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


def test_the_config_in_the_card_makes_the_model_again(
    published: Path, small_model: Path, small_config: Path, tmp_path: Path
):
    from small_pretraining import same_weights, train_here

    from train.provenance import DECIDING

    config = (published / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    assert set(DECIDING) <= set(yaml.safe_load(config)), "Adam's settings, and all others that decide"
    (tmp_path / "config.yaml").write_text(config)
    fields = {"slides": [str(small_config.parent / "slides" / "*.h5ad")], "use_cpu": True, "num_cpu_threads": 1}
    again = train_here(tmp_path / "config.yaml", tmp_path / "again", **fields, save_strategy="no")
    assert same_weights(again, small_model)


def test_a_model_is_published_and_updated_each_in_one_commit(folder: Path, hub: Hub, capsys):
    first = content(folder)
    words = [str(folder), "--repo", REPO, "--private"]
    assert command_line(words) == 0, capsys.readouterr().err
    repository, told = hub.repository(REPO), capsys.readouterr().out
    assert hub.files(REPO) == first
    assert repository.private
    assert [commit.title for commit in repository.history] == ["initial commit", "Publish tiny"]
    assert f"as {REPO}@{repository.branches['main']}: {hub.endpoint}" in told

    (folder / "loss.png").unlink()
    make_card(folder, {"watts": 65.0})
    assert command_line(words) == 0, capsys.readouterr().err
    assert hub.files(REPO) == content(folder), "what the folder does not hold, the repository does not"
    assert len(repository.history) == 3
    assert hub.files(REPO, repository.history[1].id) == first

    make_card(folder, {"watts": 130.0})
    assert command_line([*words, "--revision", "v1"]) == 0, capsys.readouterr().err
    assert hub.files(REPO, "v1") == content(folder)
    assert hub.files(REPO) == hub.files(REPO, repository.history[2].id) != hub.files(REPO, "v1")
    told = "".join(capsys.readouterr())
    assert "branch v1, private" in told
    assert TOKEN not in told


def test_strangers_use_what_was_published(
    folder: Path, corpus: Path, hub: Hub, slides: dict[str, AnnData], tmp_path: Path, capsys
):
    assert command_line([str(folder), "--repo", REPO, "--private"]) == 0, capsys.readouterr().err
    escaped = "data/s1@00002F.parquet"  # as ids of collections are
    (corpus / "data" / "s1.parquet").rename(corpus / escaped)
    edit(corpus / "corpus.json", "shards", ["data/s0.parquet", escaped, "data/s2.parquet"])
    assert command_line([str(corpus), "--repo", CORPUS, "--revision", "v1"]) == 0, capsys.readouterr().err
    assert command_line([str(corpus), "--repo", CORPUS]) == 0, capsys.readouterr().err
    with pytest.MonkeyPatch.context() as inside:
        inside.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another"))
        found = Path(snapshot_download(CORPUS, repo_type="dataset", revision="v1"))
    names = {path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()} - {".gitattributes"}
    assert {name: (found / name).read_bytes() for name in names} == hub.files(CORPUS, kind="dataset")
    assert {name: (corpus / name).read_bytes() for name in names} == hub.files(CORPUS, kind="dataset")
    assert {"data/s0.parquet", escaped, "genes.json", "report.json"} < names
    slide = tmp_path / "slide.h5ad"
    slides["staggered"].write_h5ad(slide)
    made, classes = stranger(hub, tmp_path, TOKEN, slide=str(slide), models=[(REPO, None)], card=REPO, dataset=CORPUS)
    assert (set(classes), set(classes.values())) == (CLASSES, {"transformers_modules"})
    for key, options in (("", {}), (" options", OPTIONS)):
        np.testing.assert_array_equal(made[f"{REPO}@None{key}"], embedding(folder, slides["staggered"], **options))
    np.testing.assert_array_equal(made["card"], made[f"{REPO}@None"])
    rows = datasets.load_from_disk(str(corpus / "arrow"))
    for key in ("", " streamed"):
        assert made[f"id{key}"].tolist() == rows["id"][:] == ["s0", "s1", "s2"]
        for column in ("indptr", "counts", "indices"):
            whole = np.concatenate([np.asarray(row, np.int64) for row in rows[column]])
            np.testing.assert_array_equal(made[column + key], whole)


def test_an_upload_cut_in_the_middle_changes_nothing_and_is_repeated(
    folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    words = [str(folder), "--repo", REPO]
    for name in ("model.safetensors", "loss.png"):  # a new repository, and an update of one
        before = hub.files(REPO) if hub.repositories else {}
        if name == "loss.png":
            (folder / name).write_bytes((folder / name).read_bytes() + b"more")
        hub.cut_uploads(1000, after=(folder / name).stat().st_size // 2)
        assert command_line(words) == 2
        assert only_error(capsys).startswith(
            f"error: {folder} is not published, and what {REPO} held is unchanged: {hub.endpoint} was not reached"
        )
        assert hub.files(REPO) == before
        hub.cut_uploads(0)
        assert command_line(words) == 0, capsys.readouterr().err
        assert hub.files(REPO) == content(folder)
    assert len(hub.repository(REPO).history) == 3


def public_before(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    HfApi().create_repo(REPO)


def licence_of_nobody(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    make_card(folder, {"licence": "mine"})


def no_token(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.here(monkeypatch, folder.parent / "cache", token=None)


def wrong_token(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.here(monkeypatch, folder.parent / "cache", token="hf_wrong")


def strangers_token(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.tokens["hf_strangertoken"] = {"stranger"}
    hub.here(monkeypatch, folder.parent / "cache", token="hf_strangertoken")


def nobody_there(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("circumstance", "message"),
    [
        (public_before, "lab/tiny is there already, and public: --private makes"),
        (licence_of_nobody, 'does not accept the metadata of README.md: "license" must be one of [apache-2.0'),
        (no_token, "knows no such token, log in (hf auth login) or set HF_TOKEN"),
        (wrong_token, "knows no such token"),
        (strangers_token, "the token may not write there"),
        (nobody_there, "http://127.0.0.1:9 was not reached (ConnectError)"),
    ],
)
def test_what_the_hub_does_not_take_is_told_in_one_sentence(
    circumstance, message: str, folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys
):
    circumstance(folder, hub, monkeypatch)
    assert command_line([str(folder), "--repo", REPO, "--private"]) == 2
    assert message in only_error(capsys)
    assert not [repository for repository in hub.repositories.values() if len(repository.history) > 1]
    assert bool(hub.repositories) == (circumstance is public_before)


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
def test_a_model_that_is_not_whole_is_refused_in_one_sentence(damage, message: str, folder: Path, hub: Hub, capsys):
    damage(folder)
    assert command_line([str(folder), "--repo", REPO]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not hub.requests


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repo", "org/other"], "The card is that of lab/tiny, to be published as org/other"),
        (["--repo", "tiny"], "expected ORG/NAME"),
        (["--repo", "org/a b"], "org/a b"),
    ],
)
def test_another_name_is_refused(words: list[str], message: str, folder: Path, hub: Hub, capsys):
    assert command_line([str(folder), *words]) == 2
    assert message in capsys.readouterr().err
    assert not hub.requests


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


def test_a_corpus_is_a_dataset_and_publishes_its_shards(corpus: Path, hub: Hub, capsys):
    assert command_line([str(corpus), "--repo", CORPUS, "--dry-run"]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert not hub.requests
    listed = {line.split()[-1] for line in told.split("Would be uploaded")[1].splitlines()[1:]}
    assert {
        "README.md",
        "report.json",
        "corpus.json",
        "genes.json",
        *(f"data/s{i}.parquet" for i in range(3)),
    } <= listed
    assert not [name for name in listed if name.startswith(("arrow", ".build"))]
    assert "dataset lab/corpus, branch main" in told


def test_training_takes_a_published_corpus_and_gives_the_same_model(
    corpus: Path, small_config: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    from small_pretraining import same_weights, train_corpus

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "rows")
    assert command_line([str(corpus), "--repo", CORPUS, "--private"]) == 0, capsys.readouterr().err
    commit = hub.repository(CORPUS, "dataset").branches["main"]
    steps = {"max_steps": 3, "validation_slides": ["s1"]}
    ours = train_corpus(small_config, tmp_path / "ours", corpus=corpus, **steps)
    theirs = train_corpus(small_config, tmp_path / "theirs", corpus=CORPUS, **steps)
    assert same_weights(ours, theirs)
    told = [json.loads((model / "pretraining.json").read_text()) for model in (ours, theirs)]
    assert [each.pop("corpus", None) for each in told] == [None, f"{CORPUS}@{commit}"]
    assert [each["slides"] for each in told] == [told[0]["slides"]] * 2
    assert ModelCard.load(theirs / "README.md").data.datasets == [CORPUS]
    assert ModelCard.load(ours / "README.md").data.datasets is None

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked, written = len(hub.requests), {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").rglob("*.arrow")}
    assert Corpus(find_corpus(f"{CORPUS}@{commit}").folder).column("id") == ["s0", "s1", "s2"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").rglob("*.arrow")} == written
    assert (len(hub.requests), len(written)) == (asked, 1)
    with pytest.raises(FileNotFoundError, match=r"lab/other is not in the cache .* download the corpus, or"):
        find_corpus("lab/other")


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


def other_order(corpus: Path, slides: dict[str, AnnData]) -> None:
    edit(corpus / "corpus.json", "shards", [f"data/s{number}.parquet" for number in (1, 0, 2)])


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
        (other_order, "corpus.json of {corpus} names other shards, or in another order"),
        (no_configs, "lacks configs"),
    ],
)
def test_a_corpus_with_something_wrong_is_refused(
    damage, message: str, corpus: Path, slides: dict[str, AnnData], hub: Hub, capsys
):
    damage(corpus, slides)
    assert command_line([str(corpus), "--repo", CORPUS]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.format(corpus=corpus) in error
    assert not hub.requests


def test_a_folder_that_is_neither_is_refused(tmp_path: Path, capsys):
    assert command_line([str(tmp_path), "--repo", REPO, "--type", "dataset"]) == 2
    assert "holds no corpus.json" in capsys.readouterr().err
    assert command_line([str(tmp_path / "nowhere"), "--repo", REPO]) == 2
    assert "There is no folder" in capsys.readouterr().err


def test_halved_gene_embeddings_are_loaded_as_they_were_but_for_their_rounding(small_model: Path, tmp_path: Path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((small_model / name).read_bytes())
    halve_gene_embeddings(tmp_path / "model.safetensors")
    before, after = (STImageMAEModel.from_pretrained(folder).state_dict() for folder in (small_model, tmp_path))
    for name, tensor in before.items():
        assert after[name].dtype == torch.float32
        if name == "embeddings.gene_embeddings.weight":
            assert torch.equal(after[name], tensor.half().float())
            assert not torch.equal(after[name], tensor)
        else:
            assert torch.equal(after[name], tensor)
    saved = (small_model / "model.safetensors").stat().st_size - (tmp_path / "model.safetensors").stat().st_size
    assert saved == pytest.approx(2 * before["embeddings.gene_embeddings.weight"].numel(), abs=100)
