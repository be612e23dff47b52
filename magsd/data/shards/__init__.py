"""Data sets in tar shards (WebDataset): read as a stream, and written from any source."""

from __future__ import annotations

from magsd.data.shards.index import ShardIndex, is_shards, open_shards
from magsd.data.shards.loader import ShardLoader
from magsd.data.shards.writer import write_shards

__all__ = ["ShardIndex", "ShardLoader", "is_shards", "open_shards", "write_shards"]
