"""Several runs as one model: the mean of what theirs predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from magsd.config import Config
from magsd.data import BatchLoader, ImageCache
from magsd.data.run_data import plain_loader, preprocessing_of, shard_loader
from magsd.data.shards import ShardLoader, open_shards
from magsd.errors import DataError
from magsd.evaluation import Ensemble, EvaluationReport, Member, evaluate_ensemble
from magsd.evaluation.ensemble import TTA, Form
from magsd.training.run import LoadedRun


def ensemble_of(runs: Sequence[LoadedRun]) -> Ensemble:
    """The models of runs as one. Raises RunError where they have other classes."""
    return Ensemble(
        [
            Member(
                run.model,
                run.classes,
                preprocessing_of(run.config),
                run.runtime,
                name=str(run.folder.root),
            )
            for run in runs
        ]
    )


def evaluate_runs(
    runs: Sequence[LoadedRun], images: Sequence[tuple[ImageCache, list[int]]], *, tta: TTA = None
) -> EvaluationReport:
    """Metrics of the mean of several runs' models over the same images.

    images: of each run, a cache and rows in it. Raises DataError where they are not the same: the
    mean would be measured on images that some of the models were trained on.
    """
    ensemble = ensemble_of(runs)
    cache, rows = images[0]
    keys = [cache.records[row].key for row in rows]
    loaders: dict[Form, BatchLoader] = {}
    for run, member, (own, indices) in zip(runs, ensemble.members, images, strict=True):
        by_key = {own.records[row].key: row for row in indices}
        if by_key.keys() != set(keys):
            both = len(by_key.keys() & set(keys))
            raise DataError(
                f"{runs[0].folder.root} and {run.folder.root} are measured on other images "
                f"({len(keys)} and {len(by_key)}, {both} of them the same): on each other's they "
                "may have been trained. Name images that neither knows: --data SOURCE"
            )
        if member.form not in loaders:
            loaders[member.form] = plain_loader(
                _batched_as(runs[0], run), own, [by_key[key] for key in keys], runs[0].classes
            )
    return evaluate_ensemble(ensemble, loaders, cache, tta=tta)


def evaluate_runs_on_shards(
    runs: Sequence[LoadedRun], spec: str, *, tta: TTA = None
) -> EvaluationReport:
    """Metrics of the mean of several runs' models over all images of shards."""
    ensemble = ensemble_of(runs)
    index = open_shards(spec, classes=ensemble.classes)
    loaders: dict[Form, ShardLoader] = {}
    for run, member in zip(runs, ensemble.members, strict=True):
        loaders[member.form] = shard_loader(_batched_as(runs[0], run), index)
    return evaluate_ensemble(ensemble, loaders, tta=tta)


def _batched_as(first: LoadedRun, run: LoadedRun) -> Config:
    """A run's configuration with the first one's size of batches."""
    size = first.config.train.eval_batch_size
    return replace(run.config, train=replace(run.config.train, eval_batch_size=size))
