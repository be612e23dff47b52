"""Random numbers that depend on the place in training alone, so that a resumed run sees them."""

from __future__ import annotations

import hashlib

import torch


def step_seed(seed: int, epoch: int, step: int, stream: str) -> int:
    """A 63-bit seed for one use (`stream`) of randomness at one step of one epoch."""
    text = f"magsd/{seed}/{epoch}/{step}/{stream}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def step_generator(
    seed: int, epoch: int, step: int, stream: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator on `device` whose draws are a function of the four arguments only.

    stream: names the use ("augment", "views"), so that uses do not share their draws.
    """
    generator = torch.Generator(device=device)
    generator.manual_seed(step_seed(seed, epoch, step, stream))
    return generator
