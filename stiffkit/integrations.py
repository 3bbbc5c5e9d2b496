"""Stiffness in other people's training loops: a callback for the Trainer of Hugging Face."""

import inspect
from typing import Any

from torch import nn

from stiffkit._torchvision import import_transformers
from stiffkit.alignment import class_stiffness, stiffness, within_between
from stiffkit.gradients import gradient_gram
from stiffkit.regimes import MEASURES

transformers = import_transformers()
LABELS = ("labels", "label", "label_ids")


class StiffnessCallback(transformers.TrainerCallback):
    """Measure fixed examples before training and every n steps, and log it with the Trainer's own metrics.

    Args:
        trainer: that trains a classifier.
        examples: as the Trainer's own data sets hold them, with labels of at least two classes; a few hundred, since
            their Gram matrix is computed each time.
        every: steps.
        loss: one loss a sample, of logits and labels; cross-entropy if left out.

    Raises:
        ValueError: examples without labels, or of one class alone; `every` below one.

    Logged are `stiffness_within_sign`, `stiffness_between_sign`, `stiffness_within_cos` and `stiffness_between_cos`:
    macro averages over the class matrix, pairs of an example with itself left out. Dropout is off meanwhile; weights,
    gradients and generators stay as they are, so that training ends with the weights that it would have had.

    >>> trainer.add_callback(StiffnessCallback(trainer, dataset.select(range(200))))  # doctest: +SKIP

    """

    def __init__(
        self, trainer: transformers.Trainer, examples: Any, *, every: int = 100, loss: nn.Module | None = None
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be a number of steps, 1 or more: got {every}")
        self.trainer, self.every, self.loss = trainer, every, loss or nn.CrossEntropyLoss(reduction="none")
        known = {*inspect.signature(trainer.model.forward).parameters, *LABELS}
        rows = [{k: v for k, v in examples[n].items() if k in known} for n in range(len(examples))]
        batch = dict(trainer.data_collator(rows))
        found = [name for name in LABELS if name in batch]
        if not found:
            raise ValueError(f"examples need labels, as {', '.join(LABELS)}: got columns {', '.join(batch)}")
        labels = batch.pop(found[0])
        if len(labels.unique()) < 2:
            raise ValueError(f"all {len(labels)} examples are of class {labels[0]}: draw them from a shuffled data set")
        self.points = batch, labels

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Measure before the first step."""
        self._log(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Measure every so many steps."""
        if state.global_step % self.every == 0:
            self._log(model)

    def _log(self, model: nn.Module) -> None:
        mode, y = model.training, self.points[1].cpu()
        try:
            gram = gradient_gram(model.eval(), self.loss, self.points)
        finally:
            model.train(mode)
        found = {}
        for measure in MEASURES:
            means = within_between(class_stiffness(stiffness(gram, measure), y))
            found |= {f"stiffness_{kind}_{measure}": float(means[kind]) for kind in ("within", "between")}
        wanted = self.trainer.control.should_log  # logging puts it off, and the Trainer's own loss would not be logged
        self.trainer.log(found)
        self.trainer.control.should_log = wanted
