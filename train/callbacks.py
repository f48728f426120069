"""What watches a training: that losses and weights are finite, and how well the embedding tells domains apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from data_processing.corpus import find_slides, read_slides, slide_images
from data_processing.window_dataset import WindowDataset
from modeling_stimg import SlideImage, STPatchProcessor
from train.arguments import ProbeArguments
from train.checkpoints import checkpoint_folders
from train.trainer import kept_randomness

MAX_NAMED_SLIDES = 12
NUM_NEIGHBOURS = 10


class NotFiniteError(ValueError):
    """Training came to a loss or to weights that are not finite."""


class FiniteWatch(TrainerCallback):
    """Ends a run whose loss or weights are no longer finite, before anything of it is logged or saved.

    Losses are kept on their device and looked at together, where the Trainer waits for the device anyway: when it logs
    or saves, and at least every `patience` steps. All processes decide alike, so none waits for another.

    Args:
        dataset: tells the slides of a step. windows_a_step: of all processes. forwards_a_step: of this process.
        output: folder in which a good checkpoint may be found.
    """

    def __init__(
        self, dataset: WindowDataset, windows_a_step: int, forwards_a_step: int, output: Path, patience: int = 100
    ):
        self.dataset = dataset
        self.windows_a_step = windows_a_step
        self.forwards_a_step = forwards_a_step
        self.output = output
        self.patience = patience
        self._losses: list[torch.Tensor] = []

    def on_loss(self, loss: torch.Tensor) -> None:
        """Keep the loss of a forward pass, float ()."""
        self._losses.append(loss)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        last = state.global_step >= state.max_steps
        waited = len(self._losses) >= self.patience * self.forwards_a_step
        if control.should_log or control.should_save or last or waited:
            self._check_losses(state.global_step)
        if control.should_save or last:
            self._check_weights(state.global_step, model)

    def _check_losses(self, step: int) -> None:
        bad = ~torch.stack(self._losses).isfinite().view(-1, self.forwards_a_step).all(-1)  # (steps,)
        self._losses.clear()
        bad_steps = reduce(bad.int(), "sum").tolist()
        if any(bad_steps):
            first = step - len(bad_steps) + 1 + next(i for i, count in enumerate(bad_steps) if count)
            self._stop(f"The loss is not finite at step {first}", first)

    def _check_weights(self, step: int, model: torch.nn.Module) -> None:
        # Of a sharded tensor each process looks at its own part.
        parts = (getattr(p, "_local_tensor", p).detach() for p in model.parameters())
        bad = torch.stack([~part.isfinite().all() for part in parts]).any()
        if reduce(bad.int(), "sum").item():
            self._stop(f"The weights are not finite after step {step}", step)

    def _stop(self, what: str, step: int) -> None:
        names = self.slides_of(step)
        named = ", ".join(names[:MAX_NAMED_SLIDES])
        more = f" and {len(names) - MAX_NAMED_SLIDES} more" if len(names) > MAX_NAMED_SLIDES else ""
        saved = checkpoint_folders(self.output)
        back = f"the last checkpoint with finite weights is {saved[-1]}" if saved else "there is no earlier checkpoint"
        raise NotFiniteError(
            f"{what}, with windows of {named}{more}: look at these slides or lower the learning rate; {back}."
        )

    def slides_of(self, step: int) -> list[str]:
        """Names of the slides from which step `step` (from 1) drew its windows."""
        windows = range((step - 1) * self.windows_a_step, step * self.windows_a_step)
        return sorted({self.dataset.slide_of(window).name for window in windows})


@dataclass(frozen=True)
class ProbeSlide:
    """A labelled slide. `labels`: int64 (n_obs,), -1 = unlabelled; `splits`: pairs of indices into them."""

    image: SlideImage
    labels: np.ndarray
    splits: Sequence[tuple[np.ndarray, np.ndarray]]


def read_probe_slides(arguments: ProbeArguments, processor: STPatchProcessor) -> list[ProbeSlide]:
    """Labelled slides with ten random splits each, 20 % of the labelled spots to train on, as in eval/.

    Raises:
        ImportError: no scikit-learn. ValueError: a slide without labels.
    """
    try:
        from data_processing.splits import encode_labels, slide_labels, spot_splits
    except ImportError as error:
        raise ImportError("probe_slides need scikit-learn: pip install 'stimg[eval]'.") from error
    found = []
    for name, adata in read_slides(find_slides(arguments.probe_slides)).items():
        try:
            names = slide_labels(adata, arguments.probe_label_key, tuple(arguments.probe_unlabelled))
            labels, _ = encode_labels(names)
            splits = spot_splits(labels)
        except ValueError as error:
            raise ValueError(f"The probe slide {name}: {error}") from error
        found.append(ProbeSlide(*slide_images({name: adata}, processor), labels, splits))
    return found


def probe_ari(model: Any, processor: STPatchProcessor, slides: Sequence[ProbeSlide]) -> float:
    """Adjusted Rand index of a 10-NN probe on a frozen model's embeddings, mean over splits and slides."""
    from sklearn.metrics import adjusted_rand_score
    from sklearn.neighbors import KNeighborsClassifier

    values = []
    for slide in slides:
        # A projection is fitted when the training is over.
        features = model.embed(slide.image, processor, projected=False)[slide.image.spot_of_obs]
        for train, test in slide.splits:
            probe = KNeighborsClassifier(NUM_NEIGHBOURS).fit(features[train], slide.labels[train])
            values.append(adjusted_rand_score(slide.labels[test], probe.predict(features[test])))
    return float(np.mean(values))


class ProbeCallback(TrainerCallback):
    """Logs `probe_ari` of the current model before the first step, every `steps` steps, and at the end.

    The main process alone computes; the others go on until they need its gradients. Nothing is drawn from the
    generators that training uses.

    Args:
        slides: from `read_probe_slides`. log: takes what is to be logged, as `Trainer.log`.
    """

    def __init__(
        self,
        slides: Sequence[ProbeSlide],
        processor: STPatchProcessor,
        steps: int,
        log: Callable[[dict[str, float]], None],
    ):
        self.slides = slides
        self.processor = processor
        self.steps = steps
        self.log = log

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._probe(state, control, model)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step % self.steps == 0 or state.global_step >= state.max_steps:
            self._probe(state, control, model)

    def _probe(self, state: TrainerState, control: TrainerControl, model: Any) -> None:
        if state.is_world_process_zero:
            due = control.should_log
            with kept_randomness():
                self.log({"probe_ari": probe_ari(model, self.processor, self.slides)})
            # To log anything counts as having logged the step. The loss is still to come, and the other processes,
            # which have not probed, are going to gather it.
            control.should_log = due
