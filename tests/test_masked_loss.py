"""Masked loss beside means: against plain loops, and as the command writes it; and the budget of spots of a run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_pretraining import train_here, write_config

from data_processing.window_dataset import WindowDataset
from eval.masked_loss import PREDICTORS, low_rank, masked_losses, window_mean
from eval.run_masked_loss import main
from modeling_stimg import STImageMAEForPreTraining, STPatchProcessor

UNITS = ("patch", "spot", "multi_spot", "slice")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, slides) -> Path:
    """A model that saw one slide of two and has learnt next to nothing."""
    folder = tmp_path_factory.mktemp("masked_loss")
    config = write_config(folder, slides)
    return train_here(config, folder / "model", exclude=["square"], max_steps=2)


def plain_losses(model, processor, image, num_windows: int, seed: int) -> dict[str, float]:
    """The same, window by window and entry by entry."""
    windows = WindowDataset([image], processor, num_windows, seed)
    errors = {name: [] for name in PREDICTORS[:3]}
    for i in range(num_windows):
        item = {key: value[None] for key, value in windows[i].items()}
        with torch.no_grad():
            outputs = model(**item)
        values, mask = item["pixel_values"][0].numpy(), outputs.mask[0].numpy()
        observed = item["pixel_mask"][0].numpy()
        if not mask.any():
            continue
        squares = {name: [] for name in PREDICTORS[:3]}
        for channel, row, col in np.argwhere(mask):
            truth = values[channel, row, col]
            seen = values[channel][observed & ~mask[channel]]
            mean = 0.0
            gene = item["gene_ids"][0, channel]
            if processor.normalization != "standardized":
                mean = processor.vocabulary.mean[gene]
            if processor.normalization == "centered":
                mean = (mean - image.gene_means[gene]) / processor.vocabulary.deviation[gene]
            squares["model"].append((outputs.reconstruction[0, channel, row, col].item() - truth) ** 2)
            squares["window mean"].append(((seen.mean() if seen.size else mean) - truth) ** 2)
            squares["corpus mean"].append((mean - truth) ** 2)
        for name in errors:
            errors[name].append(np.mean(squares[name]))
    return {name: float(np.mean(values)) for name, values in errors.items()}


@pytest.mark.parametrize("normalization", ["log1p", "standardized", "centered"])
def test_losses_are_those_of_plain_loops(images, processor, config, normalization: str):
    vocabulary = processor.vocabulary
    rng = np.random.default_rng(0)
    vocabulary = vocabulary.with_statistics(
        rng.random(len(vocabulary), dtype=np.float32), 1 + rng.random(len(vocabulary), dtype=np.float32)
    )
    processor = STPatchProcessor(vocabulary, window_size=4, num_channels=12, normalization=normalization)
    torch.manual_seed(0)
    model = STImageMAEForPreTraining(type(config)(**{**config.to_dict(), "mask_unit": "mixed"}))
    image = images["square"]
    found = masked_losses(model, processor, image, coverage=0.5, seed=3, batch_size=5)
    expected = plain_losses(model, processor, image, found.pop("samples"), seed=3)
    del found["low rank"]  # below
    assert found == pytest.approx(expected, rel=1e-5)
    assert found["window mean"] != found["corpus mean"]


def test_low_rank_completion_finds_a_pattern_and_looks_at_nothing_hidden():
    rng = np.random.default_rng(0)
    pattern = np.outer(rng.normal(size=40), rng.normal(size=36)).reshape(1, 40, 6, 6).astype(np.float32)
    batch = {"pixel_values": torch.from_numpy(pattern + 5), "pixel_mask": torch.ones(1, 6, 6, dtype=torch.bool)}
    batch["pixel_mask"][0, 0] = False
    mask = torch.from_numpy(rng.random(pattern.shape) < 0.3) & batch["pixel_mask"][:, None]
    means = window_mean(batch, mask, torch.zeros(1, 40))
    found = low_rank(batch, mask, means)
    error, of_mean = ((p - batch["pixel_values"])[mask].square().mean() for p in (found, means[:, :, None, None]))
    assert error < 0.5 * of_mean
    other = {**batch, "pixel_values": torch.where(mask, -99.0, batch["pixel_values"])}
    assert torch.equal(low_rank(other, mask, means), found)


def test_channels_of_which_nothing_is_seen_fall_back_on_the_corpus(images, processor, config):
    vocabulary = processor.vocabulary.with_statistics(np.full(len(processor.vocabulary), 0.5, np.float32))
    alone = STPatchProcessor(vocabulary, num_channels=12, sample_unit="spot")
    losses = masked_losses(STImageMAEForPreTraining(config), alone, images["square"])
    assert losses["window mean"] == losses["corpus mean"]


def test_the_command_tells_losses_budget_and_what_was_seen(run: Path, tmp_path: Path):
    main(
        ["--models", str(run), "--slides", str(run.parent / "slides" / "*.h5ad"), "--output_dir", str(tmp_path / "out")]
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    saw = {record["slide"]: record["seen"] for record in results["records"]}
    assert saw.pop("square") != "transductive"
    assert set(saw.values()) == {"transductive"}
    told = results["metadata"]["models"]["model"]["arguments"]
    table = (tmp_path / "out" / "table.md").read_text()
    assert f"| {told['num_windows']} | {told['num_spots_seen']:,} |" in table
    assert all(0 < record[name] < 10 for record in results["records"] for name in PREDICTORS)


def test_models_of_one_name_are_told_apart_or_refused(run: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="called the same"):
        main(["--models", str(run), str(run), "--slides", str(run), "--output_dir", str(tmp_path)])


@pytest.mark.parametrize("unit", UNITS)
def test_spots_are_counted_without_reading_them(images, processor, unit: str):
    of_unit = STPatchProcessor(processor.vocabulary, window_size=5, num_channels=4, sample_unit=unit)
    windows = WindowDataset(list(images.values()), of_unit, 30, seed=2, window_sizes=(3, 6), windows_a_step=5)
    counted = windows.spots_of_items(7, 30)
    assert counted.tolist() == [int(windows[i]["pixel_mask"].sum()) for i in range(7, 30)]
    assert windows.num_spots(at_a_time=11) == windows.spots_of_items(0, 30).sum()


@pytest.mark.parametrize("unit", ["patch", "multi_spot"])
def test_a_budget_of_spots_is_just_reached(slides, tmp_path: Path, unit: str):
    config = write_config(tmp_path, slides)
    fields = {"sample_unit": unit, "max_steps": -1, "max_spots": 900}
    trained = train_here(config, tmp_path / unit, **fields)
    told = json.loads((trained / "pretraining.json").read_text())["arguments"]
    assert told["num_windows"] == told["max_steps"] * 8
    assert told["num_spots_seen"] >= 900
    steps = [
        entry for entry in json.loads((trained / "trainer_state.json").read_text())["log_history"] if "loss" in entry
    ]
    assert len(steps) == told["max_steps"]
    shorter = train_here(config, tmp_path / "shorter", sample_unit=unit, max_steps=told["max_steps"] - 1)
    assert json.loads((shorter / "pretraining.json").read_text())["arguments"]["num_spots_seen"] < 900


@pytest.mark.parametrize("fields", [{"max_spots": 10}, {"max_spots": 0, "max_steps": -1}])
def test_a_budget_is_of_spots_or_of_steps(slides, tmp_path: Path, fields: dict):
    config = write_config(tmp_path, slides)
    with pytest.raises(ValueError, match=r"max_spots is \d+.*: expected a whole number from 1, or max_steps"):
        train_here(config, tmp_path / "out", **fields)
    assert not (tmp_path / "out").exists()
