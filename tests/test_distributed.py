"""Several processes, and several nodes, train what one process trains; and none of them is left waiting."""

import math
import re
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from small_pretraining import (
    command_line,
    finish,
    free_port,
    largest_difference,
    launch_words,
    logged_values,
    same_weights,
    start,
    train_here,
)

from modeling_stimg import STImageMAEConfig
from modeling_stimg.masking_stimg import draw_mask
from train.checkpoints import last_whole_checkpoint
from train.trainer import num_counting_windows

# Of 36 sites one is hidden and of 35 none: half of the windows do not count, and a mean of means would be another loss.
UNEVEN = {"mask_unit": "site", "mask_ratio": 0.0141, "window_size": 6}
STEPS = {"max_steps": 24, **UNEVEN}
SAVING = {"save_strategy": "steps", "save_steps": 3}
# Of weights of 0.01 to 2 after 24 steps: processes add gradients up in another order than a batch does.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def alone(small_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, batches of 8."""
    return train_here(small_config, tmp_path_factory.mktemp("alone") / "model", **STEPS)


@pytest.fixture(scope="module")
def pair(small_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes with batches of 4 each, saving now and then."""
    output = tmp_path_factory.mktemp("pair") / "model"
    fields = {**STEPS, **SAVING, "per_device_train_batch_size": 4}
    fields |= {"probe_slides": str(small_config.parent / "slides" / "square.h5ad"), "probe_steps": 10}
    told = finish(start(*launch_words(), *command_line(small_config, output, **fields)))
    assert re.search(r"24 steps, 192 windows with [\d,]+ spots in 2 processes\.", told)
    assert told.count("The model is in") == 1
    return output


def test_two_processes_train_what_one_does(alone: Path, pair: Path):
    assert np.allclose(logged_values(pair, "loss"), logged_values(alone, "loss"), rtol=1e-5)
    assert len(logged_values(pair, "probe_ari")) == 4, "the first process probed, the other did not wait for ever"
    assert np.allclose(logged_values(pair, "grad_norm"), logged_values(alone, "grad_norm"), rtol=1e-4)
    assert 0 < largest_difference(pair, alone) < TOLERANCE, "equal bits would mean that nothing was split"


def test_accumulated_batches_are_one_batch(alone: Path, small_config: Path, tmp_path: Path):
    fields = {**STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    accumulated = train_here(small_config, tmp_path / "model", **fields)
    assert np.allclose(logged_values(accumulated, "loss"), logged_values(alone, "loss"), rtol=1e-5)
    assert largest_difference(accumulated, alone) < TOLERANCE


def test_losses_of_windows_are_uneven_here(small_config: Path, alone: Path):
    """Else the two tests above could not tell the mean over windows from a mean of means."""
    from data_processing.corpus import find_slides, read_slides, slide_images
    from data_processing.window_dataset import WindowDataset
    from modeling_stimg import STPatchProcessor

    processor = STPatchProcessor.from_pretrained(alone)
    slides = read_slides(find_slides([str(small_config.parent / "slides" / "*.h5ad")]))
    windows = WindowDataset(slide_images(slides, processor), processor, 192, seed=42)
    config = STImageMAEConfig.from_pretrained(alone)
    counting = [
        int(num_counting_windows({k: v[None] for k, v in windows[i].items()}, config)) for i in range(len(windows))
    ]
    halves = np.array(counting).reshape(-1, 2, 4).sum(-1)  # (steps, processes)
    assert (halves[:, 0] != halves[:, 1]).any()


@pytest.mark.parametrize("mask_unit", ["entry", "site", "mixed"])
def test_windows_that_count_are_those_that_the_mask_hides_something_of(mask_unit: str):
    config = STImageMAEConfig(mask_unit=mask_unit, mask_ratio=0.1)
    generator = torch.Generator().manual_seed(0)
    told = []
    for sites in range(17):
        for genes in range(4):
            pixel_mask = (torch.arange(16) < sites).view(1, 4, 4)
            channel_mask = (torch.arange(3) < genes)[None]
            noise = torch.rand(1, 3, 4, 4, generator=generator)
            hidden = draw_mask(noise, channel_mask, pixel_mask, 0.1, mask_unit)
            count = num_counting_windows({"pixel_mask": pixel_mask, "channel_mask": channel_mask}, config)
            assert int(count) == int(hidden.any()), (sites, genes)
            told.append(int(count))
    assert 0 < sum(told) < len(told)


def kill_tree(root: int) -> None:
    """SIGKILL a launcher and its workers, which are in sessions of their own."""
    launcher = psutil.Process(root)
    family = [launcher, *launcher.children(recursive=True)]
    for process in family:
        process.suspend()
    for process in family:
        process.kill()


def test_killed_pair_goes_on_to_the_same_bits(pair: Path, small_config: Path, tmp_path: Path):
    words = [
        *launch_words(),
        *command_line(small_config, tmp_path / "model", **STEPS, **SAVING, per_device_train_batch_size=4),
    ]
    step = int(np.random.default_rng().integers(7, 18))
    process, seen = start(*words), 0
    for line in process.stdout:
        seen += "'loss'" in line
        if seen == step:
            kill_tree(process.pid)
            break
    process.stdout.close()
    assert process.wait() != 0
    assert not (tmp_path / "model" / "model.safetensors").exists(), f"killed at step {step}"
    whole, _ = last_whole_checkpoint(tmp_path / "model")
    told = finish(start(*words))
    assert f"in 2 processes. Goes on from {whole}" in told
    assert same_weights(tmp_path / "model", pair), f"killed at step {step}"


def test_two_nodes_train_what_one_process_does_and_the_first_alone_writes(
    alone: Path, small_config: Path, tmp_path: Path
):
    port = str(free_port())
    nodes = [
        start(
            *launch_words(
                *("--num_machines", "2", "--machine_rank", rank),
                *("--main_process_ip", "127.0.0.1", "--main_process_port", port),
            ),
            *command_line(small_config, tmp_path / f"node{rank}", **STEPS, per_device_train_batch_size=4),
        )
        for rank in "01"
    ]
    told = [finish(node) for node in nodes]
    assert "in 2 processes." in told[0]
    assert "The model is in" not in told[1]
    assert not (tmp_path / "node1").exists()
    assert np.allclose(logged_values(tmp_path / "node0", "loss"), logged_values(alone, "loss"), rtol=1e-5)
    assert largest_difference(tmp_path / "node0", alone) < TOLERANCE


def test_loss_that_is_not_finite_ends_all_processes_with_one_sentence(small_config: Path, tmp_path: Path):
    output = tmp_path / "model"
    fields = {"learning_rate": 1e30, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
    process = start(*launch_words(), *command_line(small_config, output, **fields))
    told, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    # The launcher ends the other process once one has ended, be it before that one could speak; and lines may mix.
    said = [words.split("\n")[0] for words in told.split("error: ")[1:]]
    sentences = [words for words in said if words.startswith("The loss is not finite")]
    assert len(set(sentences)) == 1, "the processes that speak say the same"
    assert "The loss is not finite at step 3, with windows of square, staggered" in sentences[0]
    assert sentences[0].endswith(f"the last checkpoint with finite weights is {output / 'checkpoint-2'}.")
    assert not (output / "model.safetensors").exists()
    assert all(math.isfinite(value) for value in logged_values(output / "checkpoint-2", "loss"))
