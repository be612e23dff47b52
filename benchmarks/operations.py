"""Every operation that is measured, in order of worth."""

from __future__ import annotations

from benchmarks import (
    attention_augment,
    attention_sampling,
    bilinear_pool,
    multiscale_attention,
    soft_distance,
)

SUBJECTS = (
    *attention_augment.SUBJECTS,
    *bilinear_pool.SUBJECTS,
    *multiscale_attention.SUBJECTS,
    *soft_distance.SUBJECTS,
    *attention_sampling.SUBJECTS,
)
