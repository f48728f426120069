"""Sample units: which sites a sample holds, that every spot is covered, and that training and embedding work alike."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_pretraining import train_here

from data_processing.window_dataset import WindowDataset, collate_windows, windows_per_epoch
from modeling_stimg import STImageMAEForPreTraining, STPatchProcessor
from modeling_stimg.sample_units_stimg import covering_samples, sample_side, sample_spots

UNITS = ("patch", "spot", "multi_spot", "slice")


def of_unit(processor: STPatchProcessor, unit: str) -> STPatchProcessor:
    options = {"window_size": processor.window_size, "num_channels": processor.num_channels}
    return STPatchProcessor(processor.vocabulary, sample_unit=unit, **options)


def model_of_unit(config, unit: str) -> STImageMAEForPreTraining:
    torch.manual_seed(0)
    return STImageMAEForPreTraining(type(config)(**{**config.to_dict(), "sample_unit": unit})).eval()


@pytest.mark.parametrize("unit", UNITS)
def test_samples_hold_the_sites_of_their_unit(images, processor, unit: str):
    image = images["staggered"]
    batch = of_unit(processor, unit)(image, num_windows=12, seed=3)
    side = {"spot": 1, "slice": max(image.height, image.width)}.get(unit, processor.window_size)
    assert batch["pixel_values"].shape == (12, processor.num_channels, side, side)
    spots = batch["spot_index"].reshape(12, -1)
    counts = (spots >= 0).sum(1)
    if unit == "spot":
        assert (counts == 1).all()
        assert len(set(spots[:, 0])) > 6, "different spots"
    elif unit == "slice":
        assert all(sorted(row[row >= 0]) == list(range(image.num_spots)) for row in spots)
    elif unit == "multi_spot":
        assert counts.max() == 17
    assert not batch["pixel_values"].transpose(0, 2, 3, 1)[batch["spot_index"] < 0].any()


@settings(max_examples=40, deadline=None)
@given(side=st.integers(1, 9), seed=st.integers(0, 2**20))
def test_multi_spot_is_the_spot_and_its_nearest(images, side: int, seed: int):
    image = images["square"]
    centre = np.random.default_rng(seed).integers(image.num_spots)
    row, col = image.rows[centre], image.cols[centre]
    corner = (int(row) - side // 2, int(col) - side // 2)
    found = sample_spots(image, "multi_spot", [corner], side)[0]
    assert found[side // 2, side // 2] == centre
    chosen = found[found >= 0]
    inside = [
        spot
        for spot in range(image.num_spots)
        if 0 <= image.rows[spot] - corner[0] < side and 0 <= image.cols[spot] - corner[1] < side
    ]
    distance = {s: (image.rows[s] - row) ** 2 + (image.cols[s] - col) ** 2 for s in inside}
    assert set(chosen) <= set(inside)
    assert len(chosen) == min(17, len(inside))
    others = [distance[s] for s in set(inside) - set(chosen)]
    assert max(distance[s] for s in chosen) <= min(others, default=np.inf)


@pytest.mark.parametrize("unit", UNITS)
def test_covering_samples_hold_every_spot(images, processor, unit: str):
    for image in images.values():
        side = sample_side(image, unit, processor.window_size)
        spots = sample_spots(image, unit, covering_samples(image, unit, side, 3), side)
        assert set(spots[spots >= 0]) == set(range(image.num_spots))


def test_genes_of_single_spots_are_drawn_by_their_variance_over_the_slide(images, processor):
    image = images["square"]
    dense = np.zeros((image.num_spots, len(processor.vocabulary)))
    for spot in range(image.num_spots):
        genes, values, _ = image.expression(np.array([spot]))
        dense[spot, genes] = values
    np.testing.assert_allclose(image.gene_variances, dense.var(0), rtol=1e-9, atol=1e-12)
    batch = of_unit(processor, "spot")(image, num_windows=3, gene_selection="variable")
    highest = np.sort(np.argsort(-dense.var(0)[image.measured], kind="stable")[: processor.num_channels])
    for genes in batch["gene_ids"]:
        np.testing.assert_array_equal(genes, image.measured[highest])


@pytest.mark.parametrize("unit", UNITS)
def test_every_unit_trains_on_mixed_slides_and_embeds_by_the_same_call(images, processor, config, unit: str):
    unit_processor, model = of_unit(processor, unit), model_of_unit(config, unit)
    windows = WindowDataset(list(images.values()), unit_processor, num_windows=6, seed=1)
    batch = collate_windows([windows[i] for i in range(6)])
    model(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    image = images["staggered"]
    embedding = model.embed(image, unit_processor)
    assert embedding.shape == (image.num_spots, config.hidden_size)
    assert np.isfinite(embedding).all()


def test_a_single_spot_is_embedded_without_its_surroundings(slides, processor, config):
    """Changed counts elsewhere change nothing but the genes' weights, which a fixed choice leaves alone."""
    adata = slides["square"].copy()
    changed = adata.copy()
    counts = changed.X.toarray()
    counts[1:] = counts[1:][:, ::-1]
    changed.X = type(changed.X)(counts)
    unit_processor, model = of_unit(processor, "spot"), model_of_unit(config, "spot")
    results = []
    for each in (adata, changed):
        image = unit_processor.slide_to_image(each)
        spot = image.spot_of_obs[0]
        site = (int(image.rows[spot]), int(image.cols[spot]))
        batch = unit_processor(image, windows=[site], genes=list(range(20)), return_tensors="pt")
        assert batch.pop("spot_index").item() == spot
        results.append(model.stimg(**batch).last_hidden_state)
    assert torch.equal(*results)


def test_collation_fills_up_with_empty_sites(images, processor):
    windows = WindowDataset(list(images.values()), of_unit(processor, "slice"), num_windows=8, seed=0)
    items = [windows[i] for i in range(8)]
    sides = {item["pixel_mask"].shape[0] for item in items}
    assert len(sides) == 2, "both slides were drawn"
    batch = collate_windows(items)
    for number, item in enumerate(items):
        side = item["pixel_mask"].shape[0]
        assert torch.equal(batch["pixel_values"][number, :, :side, :side], item["pixel_values"])
        assert batch["pixel_mask"][number].sum() == item["pixel_mask"].sum()
        assert not batch["pixel_values"][number, :, side:].any()
        assert not batch["pixel_values"][number, :, :, side:].any()


def test_mixed_window_sizes_are_one_a_step_and_independent_of_who_asks(images, processor):
    options = {"num_windows": 4000, "seed": 5, "window_sizes": (3, 5, 8), "windows_a_step": 4}
    windows = WindowDataset(list(images.values()), processor, **options)
    sizes = [windows.window_size_of(i) for i in range(4000)]
    steps = np.array(sizes).reshape(-1, 4)
    assert (steps == steps[:, :1]).all()
    shares = [np.mean(steps[:, 0] == size) for size in (3, 5, 8)]
    np.testing.assert_allclose(shares, 1 / 3, atol=0.06)
    for index in (0, 5, 11):
        assert windows[index]["pixel_mask"].shape == (sizes[index],) * 2


def test_an_epoch_is_as_many_spots_with_every_unit(images):
    slides = list(images.values())
    spots = sum(image.num_spots for image in slides)
    counts = {unit: windows_per_epoch(slides, [6], 3.0, unit) for unit in UNITS}
    expected = {"patch": 3 * spots / 36, "spot": 3 * spots, "multi_spot": 3 * spots / 17, "slice": 3 * len(slides)}
    assert counts == {unit: round(number) for unit, number in expected.items()}


def test_model_and_processor_of_different_units_are_refused(images, processor, config):
    with pytest.raises(ValueError, match='trained on the sample unit "spot"'):
        model_of_unit(config, "spot").embed(images["square"], processor)
    with pytest.raises(ValueError, match="sample_unit is 'cell'"):
        of_unit(processor, "cell")


@pytest.mark.parametrize("unit", UNITS)
def test_every_unit_is_pretrained_by_the_command(small_config: Path, tmp_path: Path, unit: str):
    sizes = {"window_sizes": [4, 7]} if unit == "patch" else {}
    folder = train_here(small_config, tmp_path / "model", sample_unit=unit, max_steps=3, **sizes)
    processor = STPatchProcessor.from_pretrained(folder)
    model = STImageMAEForPreTraining.from_pretrained(folder)
    assert processor.sample_unit == model.config.sample_unit == unit
    state = json.loads((folder / "trainer_state.json").read_text())
    assert all(np.isfinite(entry["loss"]) for entry in state["log_history"] if "loss" in entry)
