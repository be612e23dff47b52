"""The short check after each epoch: loss and accuracies of the raw logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from magsd.data import Loader
from magsd.distributed import ALONE, Team
from magsd.runtime import Runtime


def validate(
    model: nn.Module,
    loader: Loader,
    runtime: Runtime,
    *,
    each_batch: Callable[[], None] = lambda: None,
    team: Team = ALONE,
) -> dict[str, float]:
    """Mean cross entropy, accuracy, and the mean recall over the classes that occur.

    `each_batch` is called before every batch and may raise to leave. The processes of a team each
    bring a loader of other images; all get the figures over all of them. The model's mode is
    restored.
    """
    classes = len(loader.classes)
    loss = torch.zeros((), dtype=torch.float64, device=loader.device)
    confusion = torch.zeros(classes * classes, dtype=torch.float64, device=loader.device)
    with runtime.inference(model):
        for batch in loader.epoch(0):
            each_batch()
            logits = model(runtime.images(batch.images)).logits.double()
            loss += nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
            cells = batch.labels * classes + logits.argmax(1)
            # scatter_add_ needs no host synchronization, unlike bincount.
            confusion.scatter_add_(0, cells, torch.ones_like(cells, dtype=torch.float64))
    team.all_reduce(loss)
    table = team.all_reduce(confusion).reshape(classes, classes).cpu()
    count, per_class = table.sum(), table.sum(1)
    present = per_class > 0
    recalls = table.diagonal()[present] / per_class[present]
    return {
        "validation_loss": float(loss.cpu() / count),
        "validation_accuracy": float(table.trace() / count),
        "validation_balanced_accuracy": float(recalls.mean()),
    }
