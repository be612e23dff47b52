"""Images, labels, masks, splits and batches."""

from __future__ import annotations

from magsd.data.augment import AugmentConfig, Part, augment_images, z_score
from magsd.data.cache import ImageCache, load_cache
from magsd.data.loader import Batch, BatchLoader, Loader, shard_bounds
from magsd.data.random import step_generator, step_seed
from magsd.data.record import Record
from magsd.data.sources import Source, open_source
from magsd.data.splits import (
    Split,
    choose_split,
    hold_out,
    read_split,
    split_by_patient,
    split_of_rest,
    write_split,
)

__all__ = [
    "AugmentConfig",
    "Batch",
    "BatchLoader",
    "ImageCache",
    "Loader",
    "Part",
    "Record",
    "Source",
    "Split",
    "augment_images",
    "choose_split",
    "hold_out",
    "load_cache",
    "open_source",
    "read_split",
    "shard_bounds",
    "split_by_patient",
    "split_of_rest",
    "step_generator",
    "step_seed",
    "write_split",
    "z_score",
]
