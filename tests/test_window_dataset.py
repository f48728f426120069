"""Training windows: each a function of (seed, index), drawn in proportion to tissue area."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data_processing.window_dataset import WindowDataset, windows_per_epoch
from modeling_stimg.noise_stimg import mask_noise


@pytest.fixture
def dataset(images, processor) -> WindowDataset:
    return WindowDataset(list(images.values()), processor, num_windows=400, seed=4)


def test_item_is_the_same_draw_as_the_processors(dataset: WindowDataset, processor):
    for index in (0, 1, 57, 399):
        item = dataset[index]
        expected = processor(dataset.slide_of(index), num_windows=1, first_window=index, seed=4, return_tensors="pt")
        for key in ("pixel_values", "gene_ids", "channel_mask", "pixel_mask", "coordinates"):
            assert torch.equal(item[key], expected[key][0])
        np.testing.assert_array_equal(item["noise"], mask_noise(4, index, (32, 6, 6)))
        assert "spot_index" not in item


def test_single_slide_dataset_is_the_processors_sequence(images, processor):
    dataset = WindowDataset([images["square"]], processor, num_windows=5, seed=9)
    batch = processor(images["square"], num_windows=5, seed=9, return_tensors="pt")
    for index in range(5):
        assert torch.equal(dataset[index]["pixel_values"], batch["pixel_values"][index])


def test_order_and_workers_do_not_matter(dataset: WindowDataset):
    alone = [dataset[i] for i in range(8)][::-1]
    loaded = list(DataLoader(dataset, batch_size=None, sampler=list(range(8))[::-1], num_workers=2))
    for a, b in zip(alone, loaded, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_slides_are_drawn_in_proportion_to_tissue_area(slides, images, processor):
    half = processor.slide_to_image(slides["square"][: len(slides["square"]) // 3].copy(), name="part")
    dataset = WindowDataset([images["staggered"], half], processor, num_windows=4000)
    drawn = np.mean([dataset.slide_of(i) is half for i in range(4000)])
    expected = half.num_spots / (half.num_spots + images["staggered"].num_spots)
    assert drawn == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 4000))


def test_seeds_give_other_windows_and_noise(images, processor):
    a, b = (WindowDataset(list(images.values()), processor, 4, seed=s)[0] for s in (0, 1))
    assert not torch.equal(a["noise"], b["noise"])
    assert not torch.equal(a["gene_ids"], b["gene_ids"])


def test_length_and_its_ends(dataset: WindowDataset, images, processor):
    assert len(dataset) == 400
    with pytest.raises(IndexError):
        dataset[400]
    with pytest.raises(ValueError, match="at least one slide"):
        WindowDataset([], processor, 4)
    spots = sum(i.num_spots for i in images.values())
    assert windows_per_epoch(list(images.values()), [6]) == round(2 * spots / 36)
