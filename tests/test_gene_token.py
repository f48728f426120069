"""The gene-token baseline: what its tokens may know of each other, its files, its training, and the mean of 16."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_processing.phantom import PhantomTissue
from eval.baselines.gene_token import (
    GeneTokenConfig,
    GeneTokenForPreTraining,
    GeneTokenModel,
    embed_gene_tokens,
    load_gene_tokens,
    nearest_spots_mean,
)
from modeling_stimg import GeneVocabulary, SlideImage, STPatchProcessor

NUM_TOKENS = 24
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.fixture(scope="module")
def spots(vocabulary: GeneVocabulary) -> STPatchProcessor:
    """The processor of single spots."""
    return STPatchProcessor(vocabulary, window_size=1, num_channels=NUM_TOKENS, sample_unit="spot")


@pytest.fixture(scope="module")
def network(vocabulary: GeneVocabulary) -> GeneTokenForPreTraining:
    """Seeded random weights, larger than usual, so that differences show."""
    torch.manual_seed(0)
    network = GeneTokenForPreTraining(GeneTokenConfig(vocab_size=len(vocabulary) + 1, num_tokens=NUM_TOKENS, **SIZES))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        network.get_input_embeddings().weight[-1] = 0
    return network.eval()


@pytest.fixture
def batch(spots: STPatchProcessor, images: dict[str, SlideImage]) -> dict[str, torch.Tensor]:
    drawn = spots(images["square"], num_windows=5, seed=3, return_tensors="pt")
    return {key: drawn[key] for key in ("pixel_values", "gene_ids", "channel_mask", "pixel_mask", "coordinates")}


def hide(batch: dict[str, torch.Tensor], share: float = 0.3) -> torch.Tensor:
    return torch.rand(batch["pixel_values"].shape, generator=torch.Generator().manual_seed(1)) < share


# ---------------------------------------------------------------------------- what a token may know


def test_hidden_values_change_nothing_but_the_loss(network, batch):
    mask = hide(batch)
    other = {**batch, "pixel_values": torch.where(mask, 100 * torch.randn(mask.shape), batch["pixel_values"])}
    with torch.no_grad():
        before, after = (network(**inputs, bool_masked_entries=mask) for inputs in (batch, other))
        embedded = [network.encoder(**inputs, bool_masked_entries=mask).pooler_output for inputs in (batch, other)]
    assert torch.equal(before.reconstruction, after.reconstruction)
    assert torch.equal(before.spot_reconstruction, after.spot_reconstruction)
    assert torch.equal(*embedded)
    assert before.loss != after.loss


def test_visible_values_change_every_prediction(network, batch):
    mask = hide(batch)
    changed = batch["pixel_values"].clone()
    visible = (~mask[0, :, 0, 0]).nonzero()[0, 0]
    changed[0, visible] += 1
    with torch.no_grad():
        before, after = (
            network(**{**batch, "pixel_values": values}, bool_masked_entries=mask)
            for values in (batch["pixel_values"], changed)
        )
    for name in ("reconstruction", "spot_reconstruction"):
        moved = (before[name] - after[name]).abs().flatten(1)
        assert (moved[0] > 0).all()
        assert (moved[1:] == 0).all(), "spots do not know each other"


def test_how_many_genes_are_hidden_and_what_the_loss_is(network, batch):
    noise = torch.rand(batch["pixel_values"].shape, generator=torch.Generator().manual_seed(2))
    outputs = network(**batch, noise=noise)
    assert (outputs.mask.flatten(1).sum(-1) == round(0.3 * NUM_TOKENS)).all()
    highest_hidden = noise.masked_fill(~outputs.mask, -1).flatten(1).amax(-1)
    assert (highest_hidden < noise.masked_fill(outputs.mask, 2).flatten(1).amin(-1)).all()
    errors = [
        ((predicted - batch["pixel_values"])[outputs.mask] ** 2).mean()
        for predicted in (outputs.reconstruction, outputs.spot_reconstruction)
    ]
    torch.testing.assert_close(outputs.loss, sum(errors))


def test_order_of_genes_means_nothing(network, batch):
    order = torch.randperm(NUM_TOKENS, generator=torch.Generator().manual_seed(4))
    mask = hide(batch)
    moved = {k: v[:, order] if k in ("pixel_values", "gene_ids", "channel_mask") else v for k, v in batch.items()}
    with torch.no_grad():
        here, there = network(**batch, bool_masked_entries=mask), network(**moved, bool_masked_entries=mask[:, order])
        spot, spot_moved = network.encoder(**batch).pooler_output, network.encoder(**moved).pooler_output
    torch.testing.assert_close(here.reconstruction[:, order], there.reconstruction, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(spot, spot_moved, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(here.loss, there.loss)


def test_padding_is_invisible(network, batch, vocabulary):
    mask = hide(batch)
    wide = [torch.cat([t, torch.full_like(t[:, :7], fill)], 1) for t, fill in ((batch["pixel_values"], 9.0), (mask, 1))]
    ids = torch.cat([batch["gene_ids"], torch.full_like(batch["gene_ids"][:, :7], vocabulary.pad_id)], 1)
    with torch.no_grad():
        short = network(**batch, bool_masked_entries=mask)
        long = network(pixel_values=wide[0], gene_ids=ids, bool_masked_entries=wide[1])
        spot = network.encoder(**batch).pooler_output
        spot_long = network.encoder(pixel_values=wide[0], gene_ids=ids).pooler_output
    assert not long.mask[:, NUM_TOKENS:].any()
    torch.testing.assert_close(long.reconstruction[:, :NUM_TOKENS], short.reconstruction, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(long.loss, short.loss)
    torch.testing.assert_close(spot_long, spot, atol=1e-5, rtol=1e-4)


def test_both_amount_and_identity_of_a_gene_count(network, batch):
    with torch.no_grad():
        spot = network.encoder(**batch).pooler_output
        more = network.encoder(**{**batch, "pixel_values": 2 * batch["pixel_values"] + 1}).pooler_output
        others = network.encoder(**{**batch, "gene_ids": batch["gene_ids"].roll(1, dims=1)}).pooler_output
    assert (spot - more).abs().amax(-1).min() > 1e-3
    assert (spot - others).abs().amax(-1).min() > 1e-3


def test_loss_reaches_every_weight(network, batch):
    network.zero_grad()
    network(**batch, bool_masked_entries=hide(batch)).loss.backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A bias common to all keys changes no attention, up to rounding.
    assert [name for name in without if "k_proj.bias" not in name] == []
    network.zero_grad()


# ---------------------------------------------------------------------------- a slide


def test_every_spot_is_embedded_and_the_same_bits_come_again(network, spots, images):
    image = images["staggered"]
    first = embed_gene_tokens(network, spots, image, batch_size=7)
    assert first.shape == (image.num_spots, SIZES["hidden_size"])
    assert first.dtype == np.float32
    assert np.isfinite(first).all()
    assert len(np.unique(first, axis=0)) == image.num_spots
    assert np.array_equal(first, embed_gene_tokens(network, spots, image, batch_size=7))
    np.testing.assert_allclose(first, network.embed(image, spots, batch_size=50), atol=1e-5)
    assert not np.allclose(first, embed_gene_tokens(network, spots, image, seed=1), atol=1e-3)


def test_embedding_is_the_spot_token_over_the_draws(network, spots, images):
    image = images["square"]
    corners = list(zip(image.rows.tolist(), image.cols.tolist(), strict=True))
    draws = []
    for draw in range(3):
        drawn = spots(image, windows=corners, first_window=draw * len(corners), seed=5, return_tensors="pt")
        with torch.no_grad():
            draws.append(network.encoder(drawn["pixel_values"], drawn["gene_ids"]).pooler_output.numpy())
    ours = embed_gene_tokens(network, spots, image, num_gene_draws=3, seed=5)
    np.testing.assert_allclose(ours, np.mean(draws, axis=0), atol=1e-5)
    np.testing.assert_allclose(embed_gene_tokens(network, spots, image, seed=5), draws[0], atol=1e-5)


def test_other_rule_of_genes_takes_other_genes(network, spots, images):
    image = images["square"]
    weighted, variable = (
        embed_gene_tokens(network, spots, image, gene_selection=rule) for rule in ("weighted", "variable")
    )
    assert not np.allclose(weighted, variable, atol=1e-3)
    assert np.allclose(variable, embed_gene_tokens(network, spots, image, gene_selection="variable", seed=9), atol=1e-5)


# ---------------------------------------------------------------------------- files and training

CONFIG = """
slides: [{slides}/*.h5ad]
num_tokens: 24
hidden_size: 32
num_hidden_layers: 2
num_attention_heads: 4
intermediate_size: 48
per_device_train_batch_size: 16
max_spots: 640
learning_rate: 3.0e-3
logging_steps: 1
save_strategy: steps
save_steps: 10
use_cpu: true
num_cpu_threads: 1
disable_tqdm: true
"""


@pytest.fixture(scope="module")
def gene_token_config(tmp_path_factory: pytest.TempPathFactory, tissue: PhantomTissue) -> Path:
    folder = tmp_path_factory.mktemp("gene_token")
    (folder / "slides").mkdir()
    for number in range(2):
        slide = tissue.slide(number, array="square", height=10, width=10, median_counts=2000)
        slide.write_h5ad(folder / "slides" / f"s{number}.h5ad")
    (folder / "config.yaml").write_text(CONFIG.format(slides=folder / "slides"))
    return folder / "config.yaml"


def train_gene_token(config: Path, output: Path, **fields: object) -> Path:
    from small_pretraining import command_line

    from eval.baselines.train_gene_token import main

    threads = torch.get_num_threads()
    try:
        main(command_line(config, output, **fields))
    finally:
        torch.set_num_threads(threads)
    return output


@pytest.fixture(scope="module")
def trained(gene_token_config: Path) -> Path:
    return train_gene_token(gene_token_config, gene_token_config.parent / "model")


def test_training_lowers_the_loss_to_the_budget(trained: Path):
    from small_pretraining import logged_values

    losses = logged_values(trained, "loss")
    assert len(losses) == 40
    assert np.mean(losses[-8:]) < 0.6 * np.mean(losses[:8])
    told = json.loads((trained / "pretraining.json").read_text())
    assert [record["name"] for record in told["slides"]] == ["s0", "s1"]
    assert told["arguments"]["num_spots_seen"] == told["arguments"]["num_windows"] == 640
    assert told["arguments"]["model_type"] == "gene_token"
    assert not {"decoder_hidden_size", "mask_unit", "window_size"} & set(told["arguments"])


def test_checkpoint_gives_the_same_embedding_however_it_is_loaded(trained: Path, gene_token_config: Path):
    from small_pretraining import weights

    from modeling_stimg import read_slide

    model, processor = load_gene_tokens(trained)
    assert isinstance(model, GeneTokenModel)
    image = processor.slide_to_image(read_slide(gene_token_config.parent / "slides" / "s0.h5ad"))
    embedding = embed_gene_tokens(model, processor, image)
    by_hand = GeneTokenForPreTraining(GeneTokenConfig(**json.loads((trained / "config.json").read_text())))
    by_hand.load_state_dict(weights(trained))
    for again in (by_hand, GeneTokenForPreTraining.from_pretrained(trained), load_gene_tokens(trained)[0]):
        assert np.array_equal(embedding, embed_gene_tokens(again, processor, image))
    untrained, _ = load_gene_tokens(trained / "untrained")
    assert not np.allclose(embedding, embed_gene_tokens(untrained, processor, image), atol=1e-3)


def test_gene_embeddings_start_from_singular_vectors_and_stay_when_frozen(gene_token_config: Path, tmp_path: Path):
    from small_pretraining import weights

    output = train_gene_token(gene_token_config, tmp_path / "frozen", max_spots=32, freeze_gene_embeddings=True)
    key = "encoder.embeddings.gene_embeddings.weight"
    start, end = weights(output / "untrained")[key], weights(output)[key]
    assert torch.equal(start, end)
    assert start[:-1].square().sum(-1).mean().item() == pytest.approx(1, rel=0.05)


def test_interrupted_training_goes_on_to_the_same_bits(
    trained: Path, gene_token_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from small_pretraining import Interrupted, interrupt, logged_values, same_weights, stop

    with monkeypatch.context() as patched:
        interrupt(patched, 25, stop)
        with pytest.raises(Interrupted):
            train_gene_token(gene_token_config, tmp_path / "run")
    assert not (tmp_path / "run" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="num_tokens was 24 and is 20"):
        train_gene_token(gene_token_config, tmp_path / "run", num_tokens=20)
    train_gene_token(gene_token_config, tmp_path / "run")
    assert same_weights(tmp_path / "run", trained)
    assert logged_values(tmp_path / "run", "loss") == logged_values(trained, "loss")


# ---------------------------------------------------------------------------- bad input


def test_bad_input_is_told_in_one_sentence(network, batch, checkpoint, processor, images, gene_token_config, tmp_path):
    with pytest.raises(ValueError, match=r"reads single spots, \(B, C, 1, 1\)"):
        network.encoder(batch["pixel_values"].expand(-1, -1, 2, 2), batch["gene_ids"])
    with pytest.raises(ValueError, match=f"{checkpoint} holds st_image_mae: expected a gene-token model"):
        load_gene_tokens(checkpoint)
    with pytest.raises(ValueError, match='sample unit "spot" and the processor makes "patch"'):
        embed_gene_tokens(network, processor, images["square"])
    with pytest.raises(ValueError, match="holds a trained model already"):
        train_gene_token(gene_token_config, checkpoint)
    for fields, told in (({"mask_ratio": 1.5}, "mask_ratio is 1.5"), ({"num_tokens": 0}, "num_tokens is 0")):
        with pytest.raises(Exception, match=told):
            GeneTokenConfig(**fields)
    with pytest.raises(ValueError, match="decoder_hidden_size"):
        train_gene_token(gene_token_config, tmp_path / "out", decoder_hidden_size=8)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------- the mean of the 16 nearest


def plain_nearest_mean(features: np.ndarray, image: SlideImage, k: int) -> np.ndarray:
    means = []
    for spot in range(image.num_spots):
        others = sorted(
            ((image.rows[o] - image.rows[spot]) ** 2 + (image.cols[o] - image.cols[spot]) ** 2, image.rows[o], o)
            for o in range(image.num_spots)
            if o != spot
        )
        # Spots stand in grid order, so a lower number of the same row is further left.
        means.append(np.mean([features[o] for _, _, o in others[:k]], axis=0))
    return np.array(means)


def grid_image(occupied: np.ndarray, like: SlideImage) -> SlideImage:
    rows, cols = np.nonzero(occupied)
    fields = {k: v for k, v in vars(like).items() if not k.startswith("_") and k in SlideImage.__dataclass_fields__}
    return SlideImage(**{**fields, "rows": rows, "cols": cols, "height": occupied.shape[0], "width": occupied.shape[1]})


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_mean_of_the_nearest_is_that_of_a_plain_search(images: dict[str, SlideImage], data: st.DataObject):
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 9))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    occupied = rng.random((height, width)) < data.draw(st.sampled_from([0.2, 0.6, 1.0]))
    occupied[0, :2] = True
    image = grid_image(occupied, images["square"])
    k = data.draw(st.integers(1, min(16, image.num_spots - 1)))
    features = rng.normal(size=(image.num_spots, 3)).astype(np.float32)
    ours = nearest_spots_mean(features, image, k)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, plain_nearest_mean(features, image, k), atol=1e-6)


def test_mean_of_the_nearest_leaves_the_spot_itself_out(images: dict[str, SlideImage]):
    image = images["staggered"]
    features = np.eye(image.num_spots, dtype=np.float32)
    means = nearest_spots_mean(features, image)
    assert (np.diag(means) == 0).all()
    assert ((means > 0).sum(1) == 16).all()


def test_mean_of_the_nearest_on_too_small_a_slide(images: dict[str, SlideImage]):
    image = grid_image(np.ones((4, 4), dtype=bool), images["square"])
    with pytest.raises(ValueError, match="has 16 spots: a mean over the 16 nearest others needs at least 17"):
        nearest_spots_mean(np.zeros((16, 2)), image)
    with pytest.raises(ValueError, match=r"features has shape \(15, 2\): expected a row for each of 16 spots"):
        nearest_spots_mean(np.zeros((15, 2)), image)
    with pytest.raises(ValueError, match="k from 1"):
        nearest_spots_mean(np.zeros((16, 2)), image, k=0)
