"""PretrainTrainer: the Hugging Face Trainer, with an exact mean over processes and with checkpoints that are whole."""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from data_processing.window_dataset import give_way
from modeling_stimg import STImageMAEConfig
from train.checkpoints import NotSavedError, finish_checkpoint, remove_older, saving

STAGING_FOLDER = ".saving"


def num_counting_windows(batch: dict[str, torch.Tensor], config: STImageMAEConfig) -> torch.Tensor:
    """int64 (): windows of a batch in which anything will be masked; the others do not count in the loss.

    Follows from the sizes alone, as in `draw_mask`: `round(mask_ratio * n)` of n are masked.

    Args:
        batch: with `pixel_mask` bool (B, S, S) and `channel_mask` bool (B, C).
    """
    sites = batch["pixel_mask"].flatten(1).sum(-1).double()  # (B,)
    genes = batch["channel_mask"].sum(-1).double()
    if config.mask_unit == "entry":
        masked = torch.round(sites * genes * config.mask_ratio)
    else:
        masked_sites = torch.round(sites * config.mask_ratio)
        masked = masked_sites * genes
        if config.mask_unit == "mixed":
            masked = masked + torch.round((sites - masked_sites) * genes * config.mask_ratio)
    return (masked > 0).sum()


@contextmanager
def kept_randomness() -> Iterator[None]:
    """Whatever is drawn from the global generators inside, training goes on as if it had not been."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - what it guards is just that
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


class PretrainTrainer(Trainer):
    """The Trainer with five differences.

    - The loss of a step is the mean over all windows of that step that have something masked, whatever processes and
      accumulation steps they are spread over. The mean of means would weigh the windows of a process higher where
      other windows of it do not count.
    - A checkpoint gets its name when it is whole, and older ones are removed only then; the model itself appears last
      in its folder. Arguments are not pickled.
    - Evaluation leaves the randomness of training alone.
    - Loader workers give way to a training on CPUs.
    - `create_model_card` writes the card that it was given.

    Args:
        run: what the result depends on; kept in every checkpoint.
        model_card: writes `README.md` into the output folder from the log history.
        on_loss: gets the loss of every forward pass, float (), on its device.
    """

    def __init__(
        self,
        *args: Any,
        run: dict[str, Any],
        model_card: Callable[[list[dict[str, Any]]], None],
        on_loss: Callable[[torch.Tensor], None],
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.run = run
        self.model_card = model_card
        self.on_loss = on_loss
        self._staging: Path | None = None

    # ---------------------------------------------------------------- loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The batches of one step, and how many windows of all processes count in them."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counting = sum(num_counting_windows(batch, self.model.config) for batch in batches)
        return batches, self.accelerator.reduce(torch.as_tensor(counting, device=device), "sum").clamp(min=1)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The model's loss, in training weighted by the share of the step's windows that this batch holds."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if num_items_in_batch is not None:
            share = outputs["mask"].flatten(1).any(-1).sum() / num_items_in_batch
            # Gradients are averaged over processes, and the Trainer divides by the accumulation steps.
            loss = loss * (share * self.accelerator.num_processes * self.current_gradient_accumulation_steps)
        return (loss, outputs) if return_outputs else loss

    def get_train_dataloader(self) -> DataLoader:
        """The loader, whose workers leave the cores to a training on CPUs."""
        loader = super().get_train_dataloader()
        if self.args.device.type == "cpu" and loader.num_workers:
            loader.worker_init_fn = partial(give_way, before=loader.worker_init_fn)
        return loader

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass."""
        loss = super().training_step(*args, **kwargs)
        self.on_loss(loss)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without touching the generators that training draws from."""
        with kept_randomness():
            return super().evaluate(*args, **kwargs)

    # ---------------------------------------------------------------- files

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save a checkpoint under another name; rename it when every process has written its part."""
        output, step = Path(self.args.output_dir), self.state.global_step
        target, staging = output / f"{PREFIX_CHECKPOINT_DIR}-{step}", output / STAGING_FOLDER
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging, failure = staging, None
        try:
            with saving(str(target)):
                super()._save_checkpoint(model, trial)
        except NotSavedError as error:
            failure = error
        finally:
            self._staging = None
        if not self._any_process(failure is not None) and self.args.should_save:
            try:
                with saving(str(target)):
                    self._name_best_checkpoint(output, staging / target.name)
                    finish_checkpoint(staging / target.name, target, self.run)
            except NotSavedError as error:
                failure = error
        failed = self._any_process(failure is not None)
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            if not failed:
                remove_older(output, step, self.args.save_total_limit, self.state.best_model_checkpoint)
        if failed:
            raise failure or NotSavedError(f"{target} could not be saved by another process, which says why.")

    def _any_process(self, flag: bool) -> bool:
        """Whether `flag` holds in any process; all have to ask."""
        told = torch.tensor(int(flag), device=self.args.device)
        return bool(self.accelerator.reduce(told, "sum").item())

    def _name_best_checkpoint(self, output: Path, staged: Path) -> None:
        """Put the final name of the best checkpoint into the state, where the Trainer saw the temporary one."""
        if self.state.best_global_step:
            best = output / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best)
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save model and processor so that the weights appear last, and without the Trainer's pickled arguments."""
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        output = Path(self.args.output_dir if output_dir is None else output_dir)
        staging = output / f"{STAGING_FOLDER}-model"
        shutil.rmtree(staging, ignore_errors=True)
        try:
            # As part of a checkpoint, a failure is told of the checkpoint.
            with saving(f"The model in {output}") if self._staging is None else nullcontext():
                super()._save(str(staging), state_dict)
                (staging / TRAINING_ARGS_NAME).unlink(missing_ok=True)
                for path in sorted(staging.iterdir(), key=lambda p: p.name == SAFE_WEIGHTS_NAME):
                    os.replace(path, output / path.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write `README.md`; the Trainer asks for it when it pushes a model."""
        if self.is_world_process_zero():
            self.model_card(self.state.log_history)
