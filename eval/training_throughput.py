"""How fast a training step is beside ViTMAE's, how long it waits for data, and how much memory it takes."""

import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import ViTMAEConfig, ViTMAEForPreTraining, default_data_collator

from data_processing.phantom import PhantomTissue
from data_processing.window_dataset import WindowDataset, give_way
from eval.throughput import PeakMemory, anonymous_memory
from modeling_stimg import GeneVocabulary, SlideImage, STImageMAEConfig, STImageMAEForPreTraining, STPatchProcessor

NUM_HEADS = 8
VIT_MAE = "vit_mae"
PHANTOM_SIDE, PHANTOM_COUNTS = 40, 5_000.0


@dataclass(frozen=True)
class StepSizes:
    """What a step works on. The decoder is half as wide as the encoder, with two layers."""

    batch_size: int = 32
    window_size: int = 16
    num_channels: int = 512
    num_genes: int = 20_000
    hidden_size: int = 256
    num_layers: int = 6
    mask_ratio: float = 0.3

    def transformer(self) -> dict[str, Any]:
        """The fields that the configs of both models share."""
        return {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": NUM_HEADS,
            "intermediate_size": 4 * self.hidden_size,
            "decoder_hidden_size": self.hidden_size // 2,
            "decoder_num_hidden_layers": 2,
            "decoder_num_attention_heads": NUM_HEADS,
            "decoder_intermediate_size": 2 * self.hidden_size,
            "num_channels": self.num_channels,
            "mask_ratio": self.mask_ratio,
        }


@dataclass(frozen=True)
class StepSetting:
    """How a step is computed, the same for every model. dtype: `"float32"`, or `"bfloat16"` for autocast."""

    dtype: str = "float32"
    attention: str = "sdpa"
    compiled: bool = False
    device: str = "cpu"

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def build_model(name: str, sizes: StepSizes, attention: str) -> nn.Module:
    """ViTMAE, or ours: a mask unit, and behind a plus a reconstruction other than the default."""
    if name == VIT_MAE:
        image = {"image_size": sizes.window_size, "patch_size": 1}
        return ViTMAEForPreTraining(ViTMAEConfig(**sizes.transformer(), **image, attn_implementation=attention))
    unit, _, reconstruction = name.partition("+")
    config = STImageMAEConfig(
        **sizes.transformer(),
        window_size=sizes.window_size,
        vocab_size=sizes.num_genes + 1,
        mask_unit=unit,
        reconstruction=reconstruction or STImageMAEConfig.reconstruction,
        attn_implementation=attention,
    )
    return STImageMAEForPreTraining(config)


def full_windows(sizes: StepSizes, seed: int) -> dict[str, torch.Tensor]:
    """A ready-made batch without empty sites, as the collator would give it."""
    generator = torch.Generator().manual_seed(seed)
    batch, channels, side = sizes.batch_size, sizes.num_channels, sizes.window_size
    shape = (batch, channels, side, side)
    ids = torch.rand(batch, sizes.num_genes, generator=generator).argsort(-1)[:, :channels].sort(-1).values
    return {
        "pixel_values": torch.rand(shape, generator=generator).mul(8).sub(4).relu(),
        "gene_ids": ids,
        "channel_mask": torch.ones(batch, channels, dtype=torch.bool),
        "pixel_mask": torch.ones(batch, side, side, dtype=torch.bool),
        "noise": torch.rand(shape, generator=generator),
    }


class TrainingStep:
    """One model with the Trainer's optimiser, and the time its parts took: lists of seconds."""

    def __init__(self, name: str, sizes: StepSizes, setting: StepSetting, fused: bool, seed: int):
        torch.manual_seed(seed)
        self.name, self.setting = name, setting
        model = build_model(name, sizes, setting.attention).to(setting.device).train()
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW((p for p in self.parameters if p.requires_grad), lr=1e-5, fused=fused)
        self.model = torch.compile(model) if setting.compiled else model
        self.forward_backward: list[float] = []
        self.forward_backward_cpu: list[float] = []
        self.optimizing: list[float] = []

    def __call__(self, batch: dict[str, torch.Tensor]) -> None:
        self.setting.wait()
        start, start_cpu = time.perf_counter(), time.process_time()
        with torch.autocast(self.setting.device, torch.bfloat16, enabled=self.setting.dtype == "bfloat16"):
            loss = self.model(**batch).loss
        loss.backward()
        self.setting.wait()
        computed, computed_cpu = time.perf_counter(), time.process_time()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.setting.wait()
        self.forward_backward.append(computed - start)
        self.forward_backward_cpu.append(computed_cpu - start_cpu)
        self.optimizing.append(time.perf_counter() - computed)

    def step_seconds(self) -> list[float]:
        return [a + b for a, b in zip(self.forward_backward, self.optimizing, strict=True)]


def measure_steps(
    units: Sequence[str], sizes: StepSizes, setting: StepSetting, fused: bool, num_rounds: int, seed: int
) -> list[dict[str, Any]]:
    """A record for ViTMAE and each mask unit: medians, and of the ratios to ViTMAE's time in the same round.

    Models take turns within a round, so that whatever else the machine does meets all of them. Two rounds warm up.
    """
    batch = {key: value.to(setting.device) for key, value in full_windows(sizes, seed).items()}
    steps = [TrainingStep(name, sizes, setting, fused, seed) for name in (VIT_MAE, *units)]
    for number in tqdm(range(num_rounds + 2), desc="rounds"):
        for step in steps if number % 2 else reversed(steps):
            step({"pixel_values": batch["pixel_values"]} if step.name == VIT_MAE else batch)
    return [_step_record(step, steps[0], sizes) for step in steps]


def _step_record(step: TrainingStep, reference: TrainingStep, sizes: StepSizes) -> dict[str, Any]:
    def ratio(ours: list[float], theirs: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(ours[2:], theirs[2:], strict=True))

    per_window = 1e3 / sizes.batch_size
    return {
        "model": step.name,
        "parameters": sum(p.numel() for p in step.parameters),
        "forward_backward_ms": statistics.median(step.forward_backward[2:]) * per_window,
        "optimizer_ms": statistics.median(step.optimizing[2:]) * per_window,
        "step_ms": statistics.median(step.step_seconds()[2:]) * per_window,
        "forward_backward_ratio": ratio(step.forward_backward, reference.forward_backward),
        # Of processor time, which other programs on the same cores disturb less; says nothing of a GPU.
        "forward_backward_cpu_ratio": ratio(step.forward_backward_cpu, reference.forward_backward_cpu),
        "step_ratio": ratio(step.step_seconds(), reference.step_seconds()),
    }


# ---------------------------------------------------------------------------- data


def phantom_image(sizes: StepSizes, seed: int) -> tuple[SlideImage, STPatchProcessor]:
    """A phantom slide of `num_genes` genes, a quarter of a Visium slide, and the processor for its windows."""
    tissue = PhantomTissue.create(num_genes=sizes.num_genes, seed=seed)
    adata = tissue.slide(seed, height=PHANTOM_SIDE, width=PHANTOM_SIDE, median_counts=PHANTOM_COUNTS)
    processor = STPatchProcessor(
        GeneVocabulary(list(adata.var_names)), window_size=sizes.window_size, num_channels=sizes.num_channels
    )
    return processor.slide_to_image(adata, name="phantom"), processor


def loaded_windows(
    image: SlideImage, processor: STPatchProcessor, sizes: StepSizes, num_batches: int, num_workers: int, seed: int
) -> DataLoader:
    """Batches as the Trainer draws them."""
    dataset = WindowDataset([image], processor, num_batches * sizes.batch_size, seed)
    return DataLoader(
        dataset,
        batch_size=sizes.batch_size,
        collate_fn=default_data_collator,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=None if torch.cuda.is_available() else give_way,
    )


def resident_windows(
    image: SlideImage, processor: STPatchProcessor, sizes: StepSizes, num_batches: int, device: str, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches made where the slide lies; the model draws their noise."""
    for number in range(num_batches):
        first = number * sizes.batch_size
        options = {"first_window": first, "seed": seed, "device": device, "return_tensors": "pt"}
        batch = processor(image, num_windows=sizes.batch_size, **options)
        yield {key: value for key, value in batch.items() if key != "spot_index"}


def measure_data(
    unit: str,
    windows: Callable[[int], Any],
    source: str,
    sizes: StepSizes,
    setting: StepSetting,
    fused: bool,
    num_batches: int,
    seed: int,
) -> dict[str, Any]:
    """Training on real windows: the share of the time in which the step had no batch, and windows a second.

    Args:
        windows: from a number of batches to an iterable of them.
        source: what the windows come from, for the record.
    """
    step = TrainingStep(unit, sizes, setting, fused, seed)
    batches = iter(windows(num_batches + 2))
    for _ in range(2):  # warms up, and starts the workers
        step({key: value.to(setting.device) for key, value in next(batches).items()})
    waited, start = 0.0, time.perf_counter()
    for _ in tqdm(range(num_batches), desc=source):
        asked = time.perf_counter()
        batch = {key: value.to(setting.device, non_blocking=True) for key, value in next(batches).items()}
        setting.wait()
        waited += time.perf_counter() - asked
        step(batch)
    seconds = time.perf_counter() - start
    return {
        "source": source,
        "mask_unit": unit,
        "wait_share": waited / seconds,
        "windows_per_second": num_batches * sizes.batch_size / seconds,
    }


def measure_loading(
    unit: str,
    sizes: StepSizes,
    setting: StepSetting,
    fused: bool,
    num_batches: int,
    num_workers: Sequence[int],
    peak_tflops: float,
    seed: int,
) -> list[dict[str, Any]]:
    """A record for ready-made batches, for each number of loader workers, and on a GPU for windows made there."""
    image, processor = phantom_image(sizes, seed)
    ready = next(iter(loaded_windows(image, processor, sizes, 1, 0, seed)))
    ready = {key: value.to(setting.device) for key, value in ready.items()}
    sources: dict[str, Callable[[int], Any]] = {"ready-made": lambda number: itertools.repeat(ready, number)}
    for workers in num_workers:
        name = f"the slide, {workers} worker{'' if workers == 1 else 's'}"
        sources[name] = lambda number, w=workers: loaded_windows(image, processor, sizes, number, w, seed)
    if setting.device == "cuda":
        sources["the slide, on the GPU"] = lambda n: resident_windows(image, processor, sizes, n, "cuda", seed)
    records = [
        measure_data(unit, windows, source, sizes, setting, fused, num_batches, seed)
        for source, windows in sources.items()
    ]
    flops = 2 * step_multiplications(sizes, unit)  # of a full window
    for record in records:
        record["of_ready_made"] = record["windows_per_second"] / records[0]["windows_per_second"]
        record["utilisation"] = None
        if setting.device == "cuda":
            record["utilisation"] = record["windows_per_second"] * flops / (peak_tflops * 1e12)
    return records


def step_multiplications(sizes: StepSizes, unit: str) -> float:
    """Multiplications of matrix products for one full window, forward and backward.

    A backward pass takes two products for each of the forward's; the window's values need no gradient.
    """
    sites, genes, width = sizes.window_size**2, sizes.num_channels, sizes.hidden_size
    encoded = sites - round(sizes.mask_ratio * sites) if unit == "site" else sites

    def layers(number: int, tokens: int, wide: int) -> int:
        return number * (12 * tokens * wide**2 + 2 * tokens**2 * wide)  # projections and feed-forward; attention

    decoder = 2 * sites * width * (width // 2) + layers(2, sites, width // 2)
    tokens = sites * genes * width
    return 3 * (layers(sizes.num_layers, encoded, width) + decoder + tokens) + 2 * tokens


# ---------------------------------------------------------------------------- memory


def measure_step_memory(unit: str, sizes: StepSizes, attention: str, seed: int) -> dict[str, Any]:
    """Anonymous memory of two training steps, of which the second meets the optimiser's state. Linux alone."""
    before = anonymous_memory()
    with PeakMemory() as memory:
        step = TrainingStep(unit, sizes, StepSetting(attention=attention), fused=True, seed=seed)
        batch = full_windows(sizes, seed)
        for _ in range(2):
            step(batch)
    return {
        "mask_unit": unit,
        "batch_size": sizes.batch_size,
        "window_size": sizes.window_size,
        "growth_gb": (memory.peak - before) / 1e9,
        "peak_gb": memory.peak / 1e9,
    }


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, from a process that has not run anything before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
