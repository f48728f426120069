"""Going on from a model on other slides: what it knew stays, what it did not know gets a place."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from anndata import AnnData
from small_pretraining import (
    CONFIG,
    SCRIPT,
    command_line,
    finish,
    logged_values,
    same_weights,
    start,
    train_corpus,
    train_here,
    weights,
)

from data_processing.corpus import find_slides, load_pretraining, read_slides, slide_images
from data_processing.image_views import RenumberedImages
from data_processing.open_corpus import Corpus
from data_processing.phantom import PhantomTissue
from data_processing.window_dataset import WindowDataset
from modeling_stimg import GeneVocabulary, STImageMAEForPreTraining, STPatchProcessor
from train.continuing import extend_model, keep_statistics

TABLE = "stimg.embeddings.gene_embeddings.weight"


@pytest.fixture(scope="module")
def parent_config(small_config: Path, slides: dict[str, AnnData], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two slides with 90 of their 120 genes, the last 90."""
    folder = tmp_path_factory.mktemp("parent")
    (folder / "slides").mkdir()
    for name, adata in slides.items():
        adata[:, 30:].copy().write_h5ad(folder / "slides" / f"{name}.h5ad")
    (folder / "config.yaml").write_text(CONFIG.format(slides=folder / "slides"))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def parent(parent_config: Path) -> Path:
    return train_here(parent_config, parent_config.parent / "parent")


@pytest.fixture(scope="module")
def new_config(parent_config: Path, tissue: PhantomTissue) -> Path:
    """Two other slides, with the first 100 genes: 30 are new, and 20 that the parent knows are missing."""
    folder = parent_config.parent / "new"
    (folder / "slides").mkdir(parents=True)
    for number in (5, 6):
        adata = tissue.slide(number, array="square", height=12, width=12, median_counts=200)[:, :100].copy()
        adata.write_h5ad(folder / "slides" / f"new{number}.h5ad")
    # No architecture: it is the parent's.
    kept = [line for line in CONFIG.splitlines() if not any(w in line for w in ("hidden", "num_", "intermediate"))]
    text = "\n".join([*kept, "num_cpu_threads: 1"]).format(slides=folder / "slides")
    (folder / "config.yaml").write_text(text)
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def child(parent: Path, new_config: Path) -> Path:
    """Gone on from the parent, in a fresh process."""
    output = new_config.parent / "child"
    finish(start(SCRIPT, *command_line(new_config, output, init_from=parent, learning_rate=0.01)))
    return output


def test_known_genes_keep_numbers_rows_and_statistics(parent: Path, child: Path):
    before, now = (STPatchProcessor.from_pretrained(folder).vocabulary for folder in (parent, child))
    assert (len(before), len(now)) == (90, 120)
    assert now.gene_ids[:90] == before.gene_ids
    for name in ("mean", "deviation", "share"):
        np.testing.assert_array_equal(getattr(now, name)[:90], getattr(before, name))
    table, start_table = weights(parent)[TABLE], weights(child / "untrained")[TABLE]
    assert torch.equal(start_table[:90], table[:90])
    new, scale = start_table[90:120], table[:90].square().mean().sqrt()
    assert new.square().mean().sqrt() / scale == pytest.approx(1, abs=0.1)
    assert len(torch.unique(new, dim=0)) == 30
    assert not start_table[120].any(), "padding stays 0"
    assert all(
        torch.equal(tensor, weights(child / "untrained")[name])
        for name, tensor in weights(parent).items()
        if name != TABLE
    )


def test_new_genes_have_the_statistics_of_the_new_slides(child: Path, new_config: Path):
    processor = STPatchProcessor.from_pretrained(child)
    slides = read_slides(find_slides([str(new_config.parent / "slides" / "*.h5ad")]))
    dense = []
    for image in slide_images(slides, processor):
        values = np.zeros((image.num_spots, 120))
        genes, of_spot, owner = image.expression(np.arange(image.num_spots))
        values[owner, genes] = of_spot
        dense.append(values)
    mean = np.concatenate(dense).mean(0)
    np.testing.assert_allclose(processor.vocabulary.mean[90:], mean[90:], rtol=1e-4)
    assert not np.allclose(processor.vocabulary.mean[:70], mean[:70], rtol=1e-2)


def test_an_old_slide_embeds_as_before(parent: Path, child: Path, parent_config: Path):
    (adata,) = read_slides([parent_config.parent / "slides" / "square.h5ad"]).values()
    embeddings = {}
    for folder in (parent, child / "untrained", child):
        processor = STPatchProcessor.from_pretrained(folder)
        image = processor.slide_to_image(adata)
        embeddings[folder] = STImageMAEForPreTraining.from_pretrained(folder).embed(image, processor)
    np.testing.assert_array_equal(embeddings[child / "untrained"], embeddings[parent])
    assert not np.allclose(embeddings[child], embeddings[parent], atol=1e-2)


def test_it_trains_on(parent: Path, child: Path, new_config: Path):
    processor = STPatchProcessor.from_pretrained(child)
    slides = read_slides(find_slides([str(new_config.parent / "slides" / "*.h5ad")]))
    windows = WindowDataset(slide_images(slides, processor), processor, 64, seed=77)
    batch = {k: torch.stack([windows[i][k] for i in range(64)]) for k in windows[0]}
    with torch.no_grad():
        before, after = (
            STImageMAEForPreTraining.from_pretrained(folder)(**batch).loss for folder in (child / "untrained", child)
        )
    assert after < before
    assert not torch.equal(weights(child)[TABLE][90:120], weights(child / "untrained")[TABLE][90:120])


def test_new_genes_that_stay_random_are_told_of(
    parent: Path, new_config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    fields = {"init_from": parent, "max_steps": 1, "freeze_gene_embeddings": True}
    frozen = train_here(new_config, tmp_path / "frozen", **fields)
    assert "30 genes that parent does not know keep random embeddings" in caplog.text
    assert torch.equal(weights(frozen)[TABLE], weights(frozen / "untrained")[TABLE])


def test_it_tells_what_its_parent_saw(child: Path):
    told = json.loads((child / "pretraining.json").read_text())
    assert [slide["name"] for slide in told["slides"]] == ["new5", "new6", "square", "staggered"]
    assert told["parent"] == {"name": "parent", "slides": ["square", "staggered"]}
    assert told["arguments"]["hidden_size"] == 32
    assert [record.name for record in load_pretraining(child / "untrained")[0]] == ["square", "staggered"]
    assert "Gone on from `parent`, which saw 2 slides" in (child / "README.md").read_text()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 64}, "hidden_size is 64, but the model of init_from has 32, which cannot change"),
        ({"normalization": "log1p"}, "normalization is 'log1p', but the model of init_from has 'standardized'"),
        ({"target_sum": 500}, "target_sum is 500.0, but the model of init_from has 10000.0"),
        ({"singular_start": "true"}, "singular_start is True, but"),
        ({"validation_slides": ["square", "new5"], "slides": ["BOTH"]}, "['square'] were seen by the model"),
    ],
)
def test_what_contradicts_the_parent_is_an_error(
    parent: Path, new_config: Path, parent_config: Path, tmp_path: Path, fields: dict, message: str
):
    if "slides" in fields:
        fields = {**fields, "slides": [f"{c.parent}/slides/*.h5ad" for c in (new_config, parent_config)]}
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared as it is
        train_here(new_config, tmp_path / "m", init_from=parent, **fields)
    assert message in str(caught.value)
    assert not (tmp_path / "m").exists()


def test_what_is_no_whole_model_is_no_parent(checkpoint: Path, parent: Path, new_config: Path, tmp_path: Path):
    with pytest.raises(OSError, match="nowhere"):
        train_here(new_config, tmp_path / "m", init_from=tmp_path / "nowhere")
    damaged = shutil.copytree(parent, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged or cut off"):
        train_here(new_config, tmp_path / "m", init_from=damaged)
    (damaged / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is a model of type 'bert'"):
        train_here(new_config, tmp_path / "m", init_from=damaged)
    assert not (tmp_path / "m").exists()


def test_a_corpus_is_gone_on_with_as_its_slides_are(parent: Path, small_corpus: Path, new_config: Path, tmp_path: Path):
    """The corpus numbers its genes otherwise; its slides as files give the same windows, but for new statistics."""
    child = train_corpus(new_config, tmp_path / "m", corpus=small_corpus, init_from=parent, validation_slides=["s1"])
    before, now = (STPatchProcessor.from_pretrained(folder) for folder in (parent, child))
    assert now.vocabulary.gene_ids[:90] == before.vocabulary.gene_ids
    np.testing.assert_array_equal(now.vocabulary.mean[:90], before.vocabulary.mean)
    of_corpus = Corpus(small_corpus).vocabulary
    new = of_corpus.encode(now.vocabulary.gene_ids[90:])
    np.testing.assert_array_equal(now.vocabulary.mean[90:], of_corpus.mean[new])
    assert torch.equal(weights(child / "untrained")[TABLE][:90], weights(parent)[TABLE][:90])
    assert len(logged_values(child, "eval_loss")) == 1
    told = json.loads((child / "pretraining.json").read_text())
    assert [slide["name"] for slide in told["slides"]] == ["s0", "s2", "square", "staggered"]
    files = train_here(
        new_config,
        tmp_path / "files",
        slides=[str(small_corpus.parent / "slides" / "*.h5ad")],
        validation_slides=["s1"],
        init_from=parent,
    )
    assert not same_weights(files, child), "new genes' statistics are of two slides there, of three here"


def test_renumbered_slides_give_the_windows_of_their_files(parent: Path, small_corpus: Path):
    built, known = Corpus(small_corpus), STPatchProcessor.from_pretrained(parent).vocabulary
    extended, numbers = known.extended_by(built.vocabulary)
    assert sorted(numbers.tolist()) == list(range(120))
    images = built.images(STPatchProcessor(built.vocabulary, window_size=6, num_channels=40))
    processor = STPatchProcessor(extended, window_size=6, num_channels=40)
    renumbered = RenumberedImages(images, numbers, len(extended))
    for name, image in zip(built.column("id"), renumbered, strict=True):
        (adata,) = read_slides([small_corpus.parent / "slides" / f"{name}.h5ad"]).values()
        expected = processor.slide_to_image(adata[np.asarray(adata.X.sum(1)).ravel() >= 60].copy())
        np.testing.assert_array_equal(image.measured, expected.measured)
        a, b = (processor(i, num_windows=6, seed=1) for i in (image, expected))
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


# ---------------------------------------------------------------- vocabularies


def test_extended_vocabulary_keeps_what_names_meant():
    one = GeneVocabulary(["ENSG00000000001", "ENSG00000000002", "OLD"], ["A", "B", "OLD"], {"ALIAS": "ENSG00000000001"})
    other = GeneVocabulary(
        ["ENSG00000000002", "ENSG00000000009", "A", "ENSG00000000008", "NEW"], ["B", "A", "A", "C", ""], ambiguous=["B"]
    )
    extended, numbers = one.extended_by(other)
    assert numbers.tolist() == [1, 3, 0, 4, 5], "A is known by its symbol, but ENSG…9 contradicts being ENSG…1"
    assert extended.gene_ids == [*one.gene_ids, "ENSG00000000009", "ENSG00000000008", "NEW"]
    for name in ("A", "B", "OLD", "ALIAS", "ENSG00000000001"):
        assert extended.encode([name]).tolist() == one.encode([name]).tolist(), name
    assert extended.encode(["C", "NEW", "ENSG00000000009"]).tolist() == [4, 5, 3]


def test_shares_of_new_genes_are_scaled_as_those_of_known_ones():
    known = GeneVocabulary(["A", "B", "C"], share=np.array([0.5, 0.3, 0.2]), mean=np.zeros(3))
    extended = GeneVocabulary(["A", "B", "C", "D"], share=np.array([0.25, 0.15, 0.0, 0.6]), mean=np.ones(4))
    kept = keep_statistics(known, extended)
    np.testing.assert_allclose(kept.share, [0.5, 0.3, 0.2, 1.2], rtol=1e-6)
    np.testing.assert_array_equal(kept.mean, [0, 0, 0, 1])


def test_model_without_new_genes_is_the_parent(model: STImageMAEForPreTraining):
    same = extend_model(model, {"mask_ratio": 0.5}, model.config.vocab_size - 1, seed=0)
    assert same.config.mask_ratio == 0.5
    assert same.config.pad_token_id == model.config.pad_token_id
    ours, others = same.state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], others[name]) for name in others)
