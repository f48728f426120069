"""The projection of outputs: fitted to what neighbours share, kept in the model, and what is done with it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from data_processing.corpus import read_slides, slide_images
from modeling_stimg import STImageMAEConfig, STImageMAEModel, STPatchProcessor
from modeling_stimg.embedding_stimg import neighbourhood_mean
from tests.small_pretraining import command_line
from train.projection import neighbours, noise_projection
from train.run_pretrain import main


@pytest.fixture(scope="module")
def projected_model(small_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("projected")
    defaults = '{"stride": 3, "smoothing": [1, 2], "centered": true}'
    main(command_line(small_config, output, projection_size=16, embedding_defaults=defaults))
    return output


def smooth_and_noise(image, seed: int, num_noise: int = 6) -> np.ndarray:
    """Outputs: two that change slowly over the slide, and louder ones that are drawn anew at every spot; all mixed."""
    rng = np.random.default_rng(seed)
    slow = np.stack([np.sin(image.rows / 4.0), np.cos(image.cols / 4.0)], axis=1)
    outputs = np.concatenate([slow, 3 * rng.standard_normal((image.num_spots, num_noise))], axis=1)
    return outputs @ np.linalg.qr(rng.standard_normal((2 + num_noise, 2 + num_noise)))[0]


@given(seed=st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_what_neighbours_share_is_found_under_louder_noise(images, seed: int):
    image = images["square"]
    outputs = smooth_and_noise(image, seed)
    projection = noise_projection([(image, outputs)], 2)
    kept = (outputs - outputs.mean(0)) @ projection.T
    slow = np.stack([np.sin(image.rows / 4.0), np.cos(image.cols / 4.0)], axis=1)
    predicted = kept @ np.linalg.lstsq(kept, slow - slow.mean(0), rcond=None)[0]
    explained = 1 - ((slow - slow.mean(0) - predicted) ** 2).sum() / ((slow - slow.mean(0)) ** 2).sum()
    principal = np.linalg.svd(outputs - outputs.mean(0), full_matrices=False)[0][:, :2]
    of_principal = (principal.T @ (slow - slow.mean(0))) ** 2
    assert explained > 0.5 > of_principal.sum() / ((slow - slow.mean(0)) ** 2).sum()


def test_all_outputs_have_one_variance_and_no_mixture_changes_it(images):
    """Whatever invertible map the encoder's outputs went through, distances after the projection are the same."""
    image, rng = images["staggered"], np.random.default_rng(1)
    outputs = rng.standard_normal((image.num_spots, 8)) * np.linspace(2, 6, 8)
    kept = (outputs - outputs.mean(0)) @ noise_projection([(image, outputs)], 8).T
    differences = np.concatenate([kept[a] - kept[b] for a, b in neighbours(image)])
    noise = differences.T @ differences / (2 * len(differences))
    assert noise.diagonal().max() / noise.diagonal().min() < 1.5  # the regularisation leaves a little
    np.testing.assert_allclose(kept.var(0), kept.var(0).mean(), rtol=0.25)
    assert outputs.var(0).max() / outputs.var(0).min() > 5
    rotation = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    turned = (outputs - outputs.mean(0)) @ rotation
    again = turned @ noise_projection([(image, turned)], 8).T
    np.testing.assert_allclose(again @ again.T, kept @ kept.T, atol=1e-2)


def test_neighbours_are_the_spots_one_site_away(images):
    image = images["staggered"]
    pairs = {frozenset(p) for here, there in neighbours(image) for p in zip(here.tolist(), there.tolist(), strict=True)}
    places = list(zip(image.rows.tolist(), image.cols.tolist(), strict=True))
    expected = {
        frozenset((i, j))
        for i, (r, c) in enumerate(places)
        for j, (s, d) in enumerate(places)
        if abs(r - s) + abs(c - d) == 1
    }
    assert pairs == expected


def test_slides_without_neighbours_are_refused(images):
    image = images["square"]
    alone = image.part((image.rows % 2 == 0) & (image.cols % 2 == 0))
    with pytest.raises(ValueError, match="side by side"):
        noise_projection([(alone, np.ones((alone.num_spots, 4)))], 2)


def test_training_fits_it_and_embeddings_are_projections_of_outputs(projected_model: Path, small_config: Path):
    model, processor = (cls.from_pretrained(projected_model) for cls in (STImageMAEModel, STPatchProcessor))
    paths = sorted((small_config.parent / "slides").glob("*.h5ad"))
    images = slide_images(read_slides(paths), processor)
    outputs = [model.embed(image, processor, projected=False, smoothing=0) for image in images]
    np.testing.assert_allclose(
        model.projection.numpy(), noise_projection(zip(images, outputs, strict=True), 16), rtol=1e-3, atol=1e-4
    )
    image = images[0]
    plain = outputs[0].astype(np.float64) @ model.projection.numpy().T.astype(np.float64)
    np.testing.assert_allclose(model.embed(image, processor, smoothing=0), plain - plain.mean(0), atol=1e-3)
    by_default = model.embed(image, processor)
    parts = [neighbourhood_mean(image, plain - plain.mean(0), radius) for radius in (1, 2)]
    parts = [part / np.sqrt((part**2).sum(1).mean()) for part in parts]
    np.testing.assert_allclose(by_default, np.concatenate(parts, axis=1), atol=1e-4)
    assert model.embed(image, processor, readout="context").shape[1] == 2 * model.config.hidden_size
    start = load_file(projected_model / "untrained" / "model.safetensors")["stimg.projection"]
    assert start.shape == (16, 32)
    assert not np.allclose(start, model.projection.numpy())


def test_it_goes_through_files_as_part_of_the_weights(projected_model: Path, tmp_path: Path):
    model = STImageMAEModel.from_pretrained(projected_model)
    model.save_pretrained(tmp_path)
    again = STImageMAEModel.from_pretrained(tmp_path)
    assert torch.equal(again.projection, model.projection)
    assert not any(name.endswith("projection") for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"projected": True}, "trained with a projection"),
        ({"smoothing": []}, "expected a radius in sites"),
        ({"smoothing": [1, -1]}, "expected a radius in sites"),
    ],
)
def test_options_that_a_model_cannot_follow_are_refused(images, processor, model, options: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        model.embed(images["square"], processor, **options)


@pytest.mark.parametrize("size", [-2, 3, 64])
def test_sizes_that_cannot_be_are_refused(size: int):
    with pytest.raises(Exception, match="power of two") as caught:
        STImageMAEConfig(hidden_size=32, num_attention_heads=4, projection_size=size)
    assert isinstance(caught.value.__cause__ or caught.value, ValueError)
