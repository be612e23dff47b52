"""The runtime: one table of precisions, one context, and what it refuses."""

from __future__ import annotations

import contextlib
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn

import magsd_kernels
from magsd.config import Config, TrainConfig
from magsd.errors import ConfigError
from magsd.runtime import CPU, PRECISIONS, Runtime
from magsd_kernels.backends import asked_for

MATMUL: Any = torch.backends.cuda.matmul


def test_the_configuration_knows_the_precisions_of_the_runtime() -> None:
    assert get_args(get_type_hints(TrainConfig)["precision"]) == tuple(PRECISIONS)
    for precision in PRECISIONS:
        train = Config().train
        train.precision, train.device, train.kernels = precision, "cpu", "reference"
        expected = Runtime(torch.device("cpu"), precision, kernels="reference")
        assert Runtime.from_config(train) == expected


def test_the_context_nests_and_is_left_after_an_error() -> None:
    runtime = Runtime(precision="tf32", kernels="reference")
    for again in (runtime, CPU, Runtime(precision="float16", kernels="reference")):
        with runtime:
            with contextlib.suppress(KeyError), again:
                assert asked_for() == "reference"
                assert MATMUL.allow_tf32
                raise KeyError
            assert asked_for() == "reference"
            assert MATMUL.allow_tf32
        assert asked_for() == "auto"
        assert not MATMUL.allow_tf32


def test_kernels_that_cannot_run_leave_nothing_entered() -> None:
    with (
        pytest.raises(ConfigError, match=r"train\.kernels=fast: no such backend"),
        Runtime(kernels="fast", precision="tf32"),
    ):
        pytest.fail("entered")
    assert not MATMUL.allow_tf32
    assert asked_for() == "auto"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_inference_computes_in_the_precision_and_restores_the_mode(precision: str) -> None:
    model = nn.Linear(2, 2)
    for training in (True, False):
        model.train(training)
        with Runtime(precision=precision, kernels="reference").inference(model):
            assert not model.training
            assert asked_for() == "reference"
            result = model(torch.ones(1, 2))
        assert result.dtype == (PRECISIONS[precision] or torch.float32)
        assert not result.requires_grad
        assert model.training == training


def test_images_and_models_take_the_memory_format() -> None:
    runtime = Runtime(channels_last=True)
    images = torch.rand(2, 3, 4, 4)
    assert runtime.images(images).is_contiguous(memory_format=torch.channels_last)
    assert CPU.images(images) is images
    weight = runtime.model(nn.Conv2d(3, 4, 3)).weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_kernels_in_use_names_what_the_context_chose() -> None:
    with Runtime(kernels="reference") as runtime:
        assert runtime.kernels_in_use() == "reference (PyTorch) for all operations, on cpu"
    assert magsd_kernels.backends()["reference"] == "available"
