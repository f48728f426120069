"""PretrainTrainer: the Hugging Face Trainer, with an exact mean over processes and with checkpoints that are whole."""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import CommitInfo, HfApi
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import SAFE_WEIGHTS_NAME, logging
from transformers.utils.hub import PushInProgress

from data_processing.window_dataset import give_way
from modeling_stimg import STImageMAEConfig
from train.checkpoints import NotSavedError, finish_checkpoint, remove_older, saving
from train.pushing import (
    LAST_CHECKPOINT,
    MODEL_FILES,
    STAGING_PREFIX,
    TOLD_FILES,
    NotPushedError,
    link_files,
    pushing,
    reason_of,
    remove_staged,
    stage_checkpoint,
)

logger = logging.get_logger("stimg")

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
    """The Trainer with six differences.

    - The loss of a step is the mean over all windows of that step that have something masked, whatever processes and
      accumulation steps they are spread over. The mean of means would weigh the windows of a process higher where
      other windows of it do not count.
    - A checkpoint gets its name when it is whole, and older ones are removed only then; the model itself appears last
      in its folder. Arguments are not pickled.
    - Evaluation leaves the randomness of training alone.
    - Loader workers give way to a training on CPUs.
    - `create_model_card` writes the card that it was given.
    - A push holds a model that loads, with its processor, genes, code and card, and no pickled arguments; what else
      lies in the output folder stays there. One in the middle of a run is of a whole checkpoint, and if it fails the
      training goes on.

    Args:
        run: what the result depends on; kept in every checkpoint.
        describe: writes `README.md` and `pretraining.json` into a folder, from the log history and the steps done.
        on_loss: gets the loss of every forward pass, float (), on its device.
    """

    def __init__(
        self,
        *args: Any,
        run: dict[str, Any],
        describe: Callable[[Path, list[dict[str, Any]], int], None],
        on_loss: Callable[[torch.Tensor], None],
        **kwargs: Any,
    ):
        self.push_in_progress: PushInProgress | None = None
        super().__init__(*args, **kwargs)
        self.run = run
        self.describe = describe
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
                self._push_checkpoint(target)
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
        """Write `README.md` and `pretraining.json`."""
        if self.is_world_process_zero():
            self.describe(Path(self.args.output_dir), self.state.log_history, self.state.global_step)

    # ---------------------------------------------------------------- Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, and the branch of `hub_revision`, where they are not there yet."""
        if not self.is_world_process_zero():
            return
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        private = self.args.hub_private_repo if private is None else private
        api = self._hub_api(token)
        with pushing(f"The repository {name} cannot be pushed to"):
            self.hub_model_id = api.create_repo(name, private=private, exist_ok=True).repo_id
            if self.args.hub_revision is not None:
                api.create_branch(self.hub_model_id, branch=self.args.hub_revision, exist_ok=True)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """Upload the model of the output folder, which was saved before, and what tells of it.

        Raises:
            NotPushedError: it could not be.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self._finish_current_push()
        if not self.is_world_process_zero():
            return None
        self.create_model_card()
        output = Path(self.args.output_dir)
        remove_staged(output)
        by_hand = f'hf upload {self.hub_model_id} {output} . --exclude "checkpoint-*/*" --exclude "untrained/*"'
        with pushing(f"The model is in {output}, but not on the Hub, where `{by_hand}` takes it"):
            link_files(output, output / STAGING_PREFIX, MODEL_FILES + TOLD_FILES)
            return self._upload(output / STAGING_PREFIX, commit_message, blocking, token, revision)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing yet: `_push_checkpoint` comes when the checkpoint is whole."""

    def _push_checkpoint(self, checkpoint: Path) -> None:
        """Push a whole checkpoint in the background; while another push goes on, only with `hub_always_push`."""
        strategy, step = HubStrategy(self.args.hub_strategy), self.state.global_step
        if not self.args.push_to_hub or strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        if self.push_in_progress is not None:
            if self.push_in_progress.is_done():
                self._finish_current_push()
            elif not self.args.hub_always_push:
                return
        names = {HubStrategy.CHECKPOINT: LAST_CHECKPOINT, HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        staged = checkpoint.with_name(f"{STAGING_PREFIX}-{step}")
        try:
            with pushing(f"The checkpoint of step {step:,} is not on the Hub"):
                if not stage_checkpoint(checkpoint, staged, names.get(strategy)):
                    raise NotPushedError(f"{checkpoint} holds no whole model, so that it is not pushed.")
                self.describe(staged, self.state.log_history, step)
                job = self._upload(staged, f"Training in progress, step {step}", blocking=False)
            before = [] if self.push_in_progress is None else self.push_in_progress.jobs
            self.push_in_progress = PushInProgress([*before, job])
        except NotPushedError as error:
            shutil.rmtree(staged, ignore_errors=True)
            logger.warning(f"{error} Training goes on.")

    def _finish_current_push(self) -> None:
        """Wait for the push that goes on, and say so if it failed."""
        super()._finish_current_push()
        jobs, self.push_in_progress = ([] if self.push_in_progress is None else self.push_in_progress.jobs), None
        for job in jobs:
            error = job.exception()
            if error is not None:
                logger.warning(f"A checkpoint is not on the Hub: {reason_of(error)}. Training goes on.")

    def _upload(
        self,
        staged: Path,
        commit_message: str | None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
    ) -> CommitInfo | Future:
        """Upload a folder as it is, and remove it."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)

        def upload() -> CommitInfo:
            try:
                return api.upload_folder(
                    repo_id=self.hub_model_id,
                    folder_path=staged,
                    commit_message=commit_message,
                    revision=self.args.hub_revision if revision is None else revision,
                )
            finally:
                shutil.rmtree(staged, ignore_errors=True)

        api = self._hub_api(token)
        return upload() if blocking else api.run_as_future(upload)

    def _hub_api(self, token: str | None = None) -> HfApi:
        """The one that this run pushes with, a push after the other; or another one for another token."""
        return self._pushing_api if token is None else HfApi(token=token)

    @cached_property
    def _pushing_api(self) -> HfApi:
        return HfApi(token=self.args.hub_token)
