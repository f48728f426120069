"""A pretraining that is interrupted goes on to the very weights of one that is not, whatever interrupted it."""

import os
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from small_pretraining import (
    SCRIPT,
    Interrupted,
    command_line,
    interrupt,
    logged_values,
    same_weights,
    start,
    stop,
    train_here,
)

from train.checkpoints import checkpoint_folders, last_whole_checkpoint, read_manifest, remove_older

SAVING = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 2}


@pytest.fixture(scope="module")
def interrupted(small_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with the checkpoints of steps 4 and 8, left at step 10 of 12."""
    output = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt(monkeypatch, 10, stop)
        with pytest.raises(Interrupted):
            train_here(small_config, output, **SAVING)
    assert [folder.name for folder in checkpoint_folders(output)] == ["checkpoint-4", "checkpoint-8"]
    return output


@pytest.fixture
def unfinished(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


def test_interrupted_run_goes_on_to_the_same_bits_and_the_same_log(
    unfinished: Path, small_config: Path, small_model: Path, caplog: pytest.LogCaptureFixture
):
    train_here(small_config, unfinished, **SAVING)
    assert f"Goes on from {unfinished / 'checkpoint-8'}" in caplog.text
    assert same_weights(unfinished, small_model)
    assert logged_values(unfinished, "loss") == logged_values(small_model, "loss")
    names = {path.name for path in unfinished.iterdir()}
    assert {"checkpoint-8", "checkpoint-12"} <= names, "the newest two"
    assert not names & {"checkpoint-4", ".saving", ".saving-model", "training_args.bin"}
    assert not list(unfinished.rglob("training_args.bin"))


def test_killed_run_goes_on_with_workers_across_epochs(small_config: Path, tmp_path: Path):
    """SIGKILL at some step; an epoch, in which every spot is covered once, is a step or two long."""
    fields = {"max_steps": 40, "coverage": 1.0, "dataloader_num_workers": 2, **SAVING, "save_steps": 3}
    step = int(np.random.default_rng().integers(6, 30))
    output = tmp_path / "killed"
    process = start(SCRIPT, *command_line(small_config, output, **fields))
    seen = 0
    for line in process.stdout:
        seen += "'loss'" in line
        if seen == step:
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    assert not (output / "model.safetensors").exists()
    whole, _ = last_whole_checkpoint(output)
    assert int(whole.name.split("-")[1]) in range(step - 3, step + 10), f"killed at step {step}"
    train_here(small_config, output, **fields)
    plain = train_here(small_config, tmp_path / "plain", max_steps=40, coverage=1.0)
    assert same_weights(output, plain), f"killed at step {step}"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [
    ("model.safetensors", cut, "model.safetensors has"),
    ("optimizer.pt", cut, "optimizer.pt has"),
    ("optimizer.pt", change, "optimizer.pt is not what was written"),
    ("optimizer.pt", Path.unlink, "optimizer.pt is missing"),
    ("rng_state.pth", Path.unlink, "rng_state.pth is missing"),
    ("rng_state.pth", cut, "rng_state.pth has"),
    ("trainer_state.json", Path.unlink, "trainer_state.json is missing"),
    ("checkpoint.json", cut, "its checkpoint.json is damaged"),
    ("checkpoint.json", Path.unlink, "it has no checkpoint.json"),
]


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGES, ids=[f"{n}-{d.__name__}" for n, d, _ in DAMAGES])
def test_damaged_checkpoint_is_passed_over(unfinished: Path, name: str, damage, reason: str, caplog):
    damage(unfinished / "checkpoint-8" / name)
    folder, _ = last_whole_checkpoint(unfinished)
    assert folder.name == "checkpoint-4"
    assert f"{unfinished / 'checkpoint-8'} is passed over: {reason}" in caplog.text


def test_run_goes_on_from_the_checkpoint_before_a_damaged_one(unfinished: Path, small_config: Path, small_model: Path):
    cut(unfinished / "checkpoint-8" / "optimizer.pt")
    train_here(small_config, unfinished, **SAVING)
    assert same_weights(unfinished, small_model)
    read_manifest(unfinished / "checkpoint-8")  # it was written again


def test_run_without_any_whole_checkpoint_starts_anew(unfinished: Path, small_config: Path, small_model: Path):
    for folder in checkpoint_folders(unfinished):
        (folder / "checkpoint.json").unlink()
    train_here(small_config, unfinished, **SAVING)
    assert same_weights(unfinished, small_model)


@pytest.mark.parametrize(
    ("name", "value", "was"),
    [
        ("seed", 5, "seed was 42 and is 5"),
        ("learning_rate", 0.01, "learning_rate was 0.002 and is 0.01"),
        ("max_steps", 24, "max_steps was 12 and is 24"),
        ("per_device_train_batch_size", 4, "windows_a_step was 8 and is 4"),
        ("mask_ratio", 0.5, "mask_ratio was 0.3 and is 0.5"),
        ("exclude", "square", "training_slides was"),
        ("freeze_gene_embeddings", "true", "freeze_gene_embeddings was False and is True"),
    ],
)
def test_other_arguments_are_no_continuation(interrupted: Path, small_config: Path, name: str, value: object, was: str):
    before = {path: path.stat().st_mtime_ns for path in interrupted.rglob("*")}
    with pytest.raises(ValueError, match="is a checkpoint of another run") as caught:
        train_here(small_config, interrupted, **SAVING, **{name: value})
    assert was in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in interrupted.rglob("*")} == before


def test_resume_false_starts_anew_and_removes_what_was_there(unfinished: Path, small_config: Path, tmp_path: Path):
    train_here(small_config, unfinished, resume="false", seed=5, max_steps=2)
    assert not checkpoint_folders(unfinished)
    assert same_weights(unfinished, train_here(small_config, tmp_path / "other", seed=5, max_steps=2))


@pytest.mark.parametrize("part", ["model.safetensors", "optimizer.pt"])
def test_disk_that_is_full_during_a_save_costs_no_earlier_checkpoint(
    interrupted: Path,
    small_config: Path,
    small_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
):
    """No file may grow beyond a limit from step 8 on: what a full disk is to those that write."""
    room = (interrupted / "checkpoint-8" / part).stat().st_size - 1000
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    output = tmp_path / "full"
    with monkeypatch.context() as patch:
        interrupt(patch, 8, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard)))
        try:
            with pytest.raises(OSError, match="nothing that was saved before is lost") as caught:
                train_here(small_config, output, **SAVING)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert str(caught.value).startswith(f"{output / 'checkpoint-8'} could not be saved (")
    assert [path.name for path in sorted(output.iterdir())] == ["checkpoint-4", "untrained"]
    read_manifest(output / "checkpoint-4")
    train_here(small_config, output, **SAVING)
    assert same_weights(output, small_model)


def test_model_that_cannot_be_written_at_the_end_is_no_finished_model(
    small_config: Path, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "full"
    room = (small_model / "model.safetensors").stat().st_size - 1000
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        interrupt(patch, 12, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard)))
        try:
            with pytest.raises(OSError, match=r"The model in .* could not be saved"):
                train_here(small_config, output)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert not (output / "model.safetensors").exists()
    train_here(small_config, output)
    assert same_weights(output, small_model)


def test_older_checkpoints_go_and_so_do_those_that_were_passed_over(tmp_path: Path):
    for step in (10, 20, 30, 40, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-notes").mkdir()
    remove_older(tmp_path, step=40, limit=2, best=str(tmp_path / "checkpoint-10"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("checkpoint-10", "checkpoint-30", "checkpoint-40", "checkpoint-notes")
    ]
