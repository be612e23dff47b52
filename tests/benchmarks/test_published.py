"""The published loops compute what our operations compute, and stop for the host as they do."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.contender import Contender, check, definition
from benchmarks.harness.sizes import RESNET50, Network
from benchmarks.harness.subject import PUBLISHED, Row, Subject
from benchmarks.operations import SUBJECT, SUBJECTS

all_subjects = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)


def small_row(subject: Subject, batch: int = 8, backward: bool | None = None) -> Row:
    network: Network = replace(
        subject.networks[0], side=30, features=((5, 12), (6, 6), (7, 3)), maps=5
    )
    if backward is None:
        backward = bool(subject.case.differentiable)
    return Row(subject, network, batch, "float32", "cpu", backward)


@all_subjects
@pytest.mark.parametrize("seed", [0, 1])
def test_published_and_ours_agree_on_the_same_draws(subject, seed):
    row = small_row(subject)
    arguments = row.draw(seed)
    wanted = definition(row, arguments)
    for name in (PUBLISHED, "auto"):
        check(Contender(name, row, [arguments]), wanted)


def test_norms_are_all_those_of_resnet50():
    timm = pytest.importorskip("timm", reason="needs the train extra")
    found: Counter[tuple[int, int]] = Counter()
    with torch.device("meta"):
        model = timm.create_model("resnet50", pretrained=False)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.register_forward_hook(lambda _, x, y: found.update([tuple(y.shape[1:3])]))
        model(torch.empty(2, 3, 224, 224))
    wanted: Counter[tuple[int, int]] = Counter()
    for norms in RESNET50.values():
        for network, count in norms.items():
            wanted[network.features[-1]] += count
    assert found == wanted


@pytest.mark.parametrize("name", [s.name for s in SUBJECTS if s.operation == "batch_norm_act"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_norms_are_channels_last_and_agree_with_their_gradients(name, precision):
    row = replace(small_row(SUBJECT[name]), precision=precision)
    arguments = row.draw(0)
    images = [x for x in arguments.values() if x.dim() == 4]
    assert len(images) == 1 + ("residual" in name)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in images)
    wanted = definition(row, arguments)
    for member in (PUBLISHED, "auto"):
        check(Contender(member, row, [arguments]), wanted)


@all_subjects
def test_different_seeds_draw_different_arguments(subject):
    row = small_row(subject, backward=False)
    results = [Contender("reference", row, [row.draw(seed)]).forward(0) for seed in range(2)]
    assert not torch.equal(*results)


@pytest.mark.parametrize(
    ("name", "per_image"),
    # Two boxes of four numbers; one box; at least one condition on a tensor.
    [("attention_views", 8), ("attention_crop", 4), ("soft_distance_loss", 1)],
)
def test_published_loops_read_numbers_back_for_every_image(name, per_image):
    row = small_row(SUBJECT[name], backward=False)
    arguments = row.draw(0)
    for competitor, least in ((PUBLISHED, per_image * row.batch), ("auto", 0)):
        call = Contender(competitor, row, [arguments]).calls()[0]
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            call()
        reads = sum(e.name == "aten::_local_scalar_dense" for e in profiler.events())
        assert reads >= least
        if competitor != PUBLISHED:
            assert reads <= 2  # on a CPU the loss looks at the range of its targets
