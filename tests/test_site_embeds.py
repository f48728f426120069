"""Tokens made once a slide, where all windows have the same genes: what windows of values give, and nothing else."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anndata import AnnData

from modeling_stimg import GeneVocabulary, STImageMAEConfig, STImageMAEForPreTraining, STImageMAEModel, STPatchProcessor
from modeling_stimg import embedding_stimg as embedding
from modeling_stimg.configuration_stimg import POSITION_EMBEDDING_TYPES, SAMPLE_UNITS
from modeling_stimg.processing_stimg import NORMALIZATIONS


@pytest.fixture(scope="module")
def further_genes(vocabulary: GeneVocabulary) -> GeneVocabulary:
    """With 9 genes before those of the slides, 9 behind them and statistics."""
    ids = [*(f"A{i}" for i in range(9)), *vocabulary.gene_ids, *(f"Z{i}" for i in range(9))]
    rng = np.random.default_rng(0)
    return GeneVocabulary(ids).with_statistics(mean=rng.random(len(ids)), deviation=0.3 + rng.random(len(ids)))


def make_model(config: STImageMAEConfig, folder: Path, **fields) -> STImageMAEModel:
    """An encoder with larger random weights than usual, saved and loaded."""
    torch.manual_seed(0)
    model = STImageMAEForPreTraining(STImageMAEConfig(**{**config.to_dict(), "pad_token_id": None, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return STImageMAEModel.from_pretrained(folder)


def from_values(model: STImageMAEModel, image, processor: STPatchProcessor, **options) -> np.ndarray:
    """The plain way: every window's values, made dense."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, "genes_are_shared", lambda *_: False)
        patch.setattr(embedding, "spot_tokens", None)
        return model.embed(image, processor, **options)


@pytest.mark.parametrize("sample_unit", SAMPLE_UNITS)
@pytest.mark.parametrize("position", POSITION_EMBEDDING_TYPES)
def test_embeddings_equal_those_from_values(
    config, further_genes, slides: dict[str, AnnData], tmp_path: Path, sample_unit: str, position: str
):
    """Of every readout, with fewer channels than genes and with more, which are padding."""
    fields = {"sample_unit": sample_unit, "position_embedding_type": position, "mask_unit": "mixed"}
    model = make_model(config, tmp_path, vocab_size=len(further_genes) + 1, **fields)
    # A panel of 90 genes on a slide with holes.
    adata = slides["staggered"][np.random.default_rng(1).random(slides["staggered"].n_obs) < 0.8, 20:110].copy()
    for number, normalization in enumerate(NORMALIZATIONS):
        options = {"window_size": 6, "sample_unit": sample_unit, "normalization": normalization}
        processor = STPatchProcessor(further_genes, **options)
        image = processor.slide_to_image(adata)
        options = {"gene_selection": "slide", "num_channels": (31, 90, 120)[number], "readout": "both", "stride": 2}
        expected = from_values(model, image, processor, **options)
        found = model.embed(image, processor, **options)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert np.array_equal(found, model.embed(image, processor, **options)), "the same bits"
        assert len(np.unique(found.round(4), axis=0)) == image.num_spots


def test_every_gene_draw_of_shared_genes_is_the_same(images, processor, model: STImageMAEForPreTraining):
    image = images["square"]
    once = model.embed(image, processor, gene_selection="slide")
    assert np.array_equal(model.embed(image, processor, gene_selection="slide", num_gene_draws=3, seed=4), once)
    np.testing.assert_allclose(
        from_values(model, image, processor, gene_selection="slide", num_gene_draws=3), once, atol=1e-5
    )
    drawn = model.embed(image, processor, num_gene_draws=3)
    assert not np.allclose(drawn, model.embed(image, processor, num_gene_draws=3, seed=4), atol=1e-3)


@pytest.mark.parametrize("gene_selection", ["weighted", "variable", "random"])
def test_genes_that_all_fit_are_shared_whatever_selects_them(images, processor, model, gene_selection: str):
    options = {"gene_selection": gene_selection, "num_channels": 120, "readout": "context"}
    found = model.embed(images["square"], processor, **options)
    np.testing.assert_allclose(from_values(model, images["square"], processor, **options), found, atol=1e-5)


@pytest.mark.parametrize(("constant", "value"), [("VALUES_AT_ONCE", {"cpu": 100}), ("SITES_AT_ONCE_ON_CPU", 36)])
def test_how_much_is_done_at_once_changes_nothing_but_rounding(images, processor, model, monkeypatch, constant, value):
    options = {"gene_selection": "slide", "readout": "both"}
    expected = model.embed(images["staggered"], processor, **options)
    monkeypatch.setattr(embedding, constant, value)
    found = model.embed(images["staggered"], processor, **options)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("mask_unit", ["entry", "site", "mixed"])
def test_model_reads_embeddings_of_sites_as_it_reads_their_values(images, processor, model, mask_unit: str):
    model.config.mask_unit = mask_unit
    batch = dict(processor(images["staggered"], num_windows=5, seed=2, return_tensors="pt"))
    del batch["spot_index"]
    encoder, sites = model.stimg, torch.rand(batch["pixel_mask"].shape, generator=torch.manual_seed(1)) < 0.3
    embeds = encoder.embeddings(batch["pixel_values"], batch["gene_ids"], batch["channel_mask"])
    rest = {key: batch[key] for key in ("pixel_mask", "coordinates")}
    for mask in (None, sites[:, None]):
        of_values = None if mask is None else mask.expand_as(batch["pixel_values"])
        expected = encoder(**batch, bool_masked_entries=of_values)
        for inputs in ({**rest, "site_embeds": embeds}, batch):
            found = encoder(**inputs, bool_masked_entries=mask)
            assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
            assert torch.equal(found.pooler_output, expected.pooler_output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_mask": None}, r"pixel_mask None: expected \(B, S\*S, hidden_size\) and \(B, S, S\)"),
        ({"pixel_mask": torch.ones(2, 3, 2)}, r"pixel_mask \(2, 3, 2\): expected"),
        ({"pixel_values": torch.zeros(2, 5, 3, 3)}, "Both pixel_values and site_embeds are given"),
        ({"bool_masked_entries": torch.ones(2, 5, 3, 3)}, "hidden by whole sites alone"),
        ({"site_embeds": None}, "pixel_values or gene_ids is missing"),
    ],
)
def test_incomplete_input_gets_one_clear_sentence(model: STImageMAEForPreTraining, change: dict, message: str):
    inputs = {"site_embeds": torch.zeros(2, 9, 32), "pixel_mask": torch.ones(2, 3, 3), **change}
    with pytest.raises(ValueError, match=message):
        model.stimg(**inputs)
