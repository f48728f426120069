"""A small pretraining for tests: its config, and ways to run it in this process, in another, and in several."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from anndata import AnnData
from safetensors.torch import load_file

from train import callbacks
from train.run_pretrain import main

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "train" / "run_pretrain.py")
CONFIG = """
slides: [{slides}/*.h5ad]
window_size: 6
num_channels: 32
hidden_size: 32
num_hidden_layers: 2
num_attention_heads: 4
intermediate_size: 48
decoder_hidden_size: 16
decoder_num_hidden_layers: 1
decoder_num_attention_heads: 4
decoder_intermediate_size: 24
mask_unit: mixed
normalization: standardized
embedding_defaults: {{stride: 3}}
per_device_train_batch_size: 8
max_steps: 12
learning_rate: 2.0e-3
logging_steps: 1
save_strategy: "no"
use_cpu: true
num_cpu_threads: 1
disable_tqdm: true
"""


def write_config(folder: Path, slides: dict[str, AnnData]) -> Path:
    """The slides as files, and `config.yaml` that names them."""
    (folder / "slides").mkdir()
    for name, adata in slides.items():
        adata.write_h5ad(folder / "slides" / f"{name}.h5ad")
    (folder / "config.yaml").write_text(CONFIG.format(slides=folder / "slides"))
    return folder / "config.yaml"


def command_line(config: Path, output: Path, **fields: object) -> list[str]:
    """Arguments of the script; a list becomes several words."""
    words = ["--config", str(config), "--output_dir", str(output)]
    for name, value in fields.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def train_here(config: Path, output: Path, **fields: object) -> Path:
    """Pretrain in this process; returns the output folder. The number of threads stays what it was."""
    threads = torch.get_num_threads()
    try:
        main(command_line(config, output, **fields))
    finally:
        torch.set_num_threads(threads)
    return output


def train_corpus(config: Path, output: Path, **fields: object) -> Path:
    """The same on a corpus, which stands in for the config's slides."""
    of_corpus = config.with_name("corpus.yaml")
    of_corpus.write_text("".join(line for line in config.open() if not line.startswith("slides:")))
    return train_here(of_corpus, output, **fields)


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Have something happen at the end of a step, before it is logged or saved."""
    original = callbacks.FiniteWatch.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            action()
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(callbacks.FiniteWatch, "on_step_end", on_step_end)


class Interrupted(Exception):
    """What a test stops a training with."""


def stop() -> None:
    """An action for `interrupt`."""
    raise Interrupted


def environment() -> dict[str, str]:
    """Of a run in another process: one thread, and this checkout's packages."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def start(*words: str) -> subprocess.Popen:
    """A Python command in a process group of its own, its output in one pipe."""
    return subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,
    )


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_words(*options: str, processes: int = 2) -> list[str]:
    """`accelerate launch` over several processes, with its options written out, so that no user's config counts."""
    options = options or ("--num_machines", "1", "--main_process_port", str(free_port()))
    return [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)),
        *("--mixed_precision", "no", "--dynamo_backend", "no", *options),
        SCRIPT,
    ]


def finish(process: subprocess.Popen) -> str:
    """The whole output of a run that has to succeed, and to end."""
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output[-3000:]
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of a saved model by name."""
    return load_file(folder / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    """Whether two models are equal bit for bit."""
    ours, others = weights(a), weights(b)
    return ours.keys() == others.keys() and all(torch.equal(ours[key], others[key]) for key in ours)


def largest_difference(a: Path, b: Path) -> float:
    """Largest absolute difference between the weights of two models."""
    ours, others = weights(a), weights(b)
    assert ours.keys() == others.keys()
    return max(float((ours[key] - others[key]).abs().max()) for key in ours)


def logged_values(folder: Path, key: str) -> list[float]:
    """Every value of a name in the run's log."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]
