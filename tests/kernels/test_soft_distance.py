"""soft_distance_loss and its module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import magsd_kernels as mk
from magsd_kernels.backends import implementation

from . import oracles
from .support import (
    all_dtypes,
    all_layouts,
    assert_agrees,
    blocks,
    examples,
    gradcheck,
    identical,
    launches,
    make_strided,
    multiprocessors,
    poisoned_memory,
    random,
)

both_weightings = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])


def inputs_of(batch=7, classes=4, views=3, seed=1):
    """Raw logits of which some are right and confident, some right and unsure, some wrong."""
    logits = 2 * random(batch, classes, seed=seed)
    targets = logits.argmax(1)
    targets[::3] = (targets[::3] + 1) % classes
    if batch > 1:
        logits[1] *= 4
    return logits, random(views, batch, classes, seed=seed + 1), targets


def weights_of(classes: int) -> torch.Tensor:
    return torch.linspace(0.5, 2.0, classes, dtype=torch.float64)


def check(target, dtype, inputs=None, layout="contiguous", class_weights=None, **options):
    """The three scalars and the gradients of each, against the oracle."""
    logits, views, targets = inputs or inputs_of()
    leaves = [
        make_strided(x.to(target.device, dtype), layout).requires_grad_() for x in (logits, views)
    ]
    masters = [x.detach().cpu().double().contiguous().requires_grad_() for x in leaves]
    weights = None if class_weights is None else class_weights.to(dtype)
    found = target.call(
        mk.soft_distance_loss,
        *leaves,
        targets.to(target.device),
        class_weights=None if weights is None else weights.to(target.device),
        **options,
    )
    wanted = oracles.soft_distance_loss(
        *masters,
        targets,
        class_weights=None if weights is None else weights.double(),
        **options,
    )
    assert isinstance(found, mk.SoftDistance)
    assert found._fields == ("loss", "cross_entropy", "distance")
    for name, a, b in zip(found._fields, found, wanted, strict=True):
        assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert a.shape == ()
        assert_agrees(a, b, name)
    for name, a, b in zip(found._fields, found, wanted, strict=True):
        gradients = torch.autograd.grad(a, leaves, retain_graph=True, materialize_grads=True)
        oracle = torch.autograd.grad(b, masters, retain_graph=True, materialize_grads=True)
        for leaf, g, w in zip(leaves, gradients, oracle, strict=True):
            assert g.dtype == leaf.dtype
            assert_agrees(g, w, f"gradient of {name}")


@all_dtypes
@both_weightings
def test_values_and_gradients(target, dtype, weighted):
    check(target, dtype, class_weights=weights_of(4) if weighted else None)


@all_layouts
def test_any_strides(target, layout):
    check(target, torch.float32, layout=layout)


@pytest.mark.parametrize(
    ("batch", "classes", "views"), [(1, 2, 1), (5, 3, 3), (2, 101, 5), (3, 1, 2)]
)
@both_weightings
def test_sizes(target, batch, classes, views, weighted):
    inputs = inputs_of(batch, classes, views)
    smoothing = 0.01 if classes < 50 else 0.002
    weights = weights_of(classes) if weighted else None
    check(target, torch.float32, inputs, class_weights=weights, smoothing=smoothing)


@pytest.mark.parametrize("confidence", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.05])
def test_confidence_and_smoothing(target, confidence, smoothing):
    check(target, torch.float64, confidence=confidence, smoothing=smoothing)


def test_defaults_are_published(target):
    logits, views, targets = (x.to(target.device) for x in inputs_of())
    explicit = target.call(
        mk.soft_distance_loss, logits, views, targets, confidence=0.7, smoothing=0.01
    )
    found = target.call(mk.soft_distance_loss, logits, views, targets)
    assert all(torch.equal(a, b) for a, b in zip(found, explicit, strict=True))


@both_weightings
def test_cross_entropy_is_that_of_torch(target, weighted):
    logits, views, targets = (x.to(target.device) for x in inputs_of())
    weights = weights_of(4).to(target.device) if weighted else None
    found = target.call(mk.soft_distance_loss, logits, views, targets, class_weights=weights)
    wanted = F.cross_entropy(logits, targets, weight=weights)
    torch.testing.assert_close(found.cross_entropy, wanted)
    torch.testing.assert_close(found.loss, found.cross_entropy + found.distance)


def distance_of(target, logits, view, targets, **options):
    tensors = [torch.tensor(x, device=target.device) for x in (logits, [view], targets)]
    return float(target.call(mk.soft_distance_loss, *tensors, **options).distance)


def test_soft_target_rule_by_hand(target):
    """Three classes, uniform view: |p - 1/3| averaged over the classes."""
    sure, unsure = [[8.0, 0.0, 0.0]], [[0.5, 0.0, 0.0]]
    flat = [[0.0, 0.0, 0.0]]
    p = torch.tensor(sure[0], dtype=torch.float64).softmax(0)
    kept = float((p - 1 / 3).abs().mean())
    smoothed = (abs(0.97 - 1 / 3) + 2 * abs(0.01 - 1 / 3)) / 3
    assert distance_of(target, sure, flat, [0]) == pytest.approx(kept, rel=1e-5)
    assert distance_of(target, sure, flat, [1]) == pytest.approx(smoothed, rel=1e-5)
    assert distance_of(target, unsure, flat, [0]) == pytest.approx(smoothed, rel=1e-5)


def test_confidence_itself_is_kept(target):
    """Only a maximum *under* the confidence is replaced; both probabilities are exactly 0.5."""
    level = [[0.0, 0.0]]
    assert distance_of(target, level, level, [0], confidence=0.5) == 0.0
    assert distance_of(target, level, level, [0], confidence=0.51) == pytest.approx(0.485, rel=1e-5)


def test_views_equal_to_confident_logits_are_at_distance_zero(target):
    logits, _, _ = inputs_of()
    logits = (6 * logits).float().to(target.device)
    targets = logits.argmax(1)
    found = target.call(
        mk.soft_distance_loss, logits, logits.expand(3, -1, -1), targets, confidence=0.0
    )
    assert float(found.distance) == 0.0


def test_distance_has_no_gradient_for_the_raw_logits(target):
    logits, views, targets = (x.to(target.device) for x in inputs_of())
    logits.requires_grad_()
    views.requires_grad_()
    found = target.call(mk.soft_distance_loss, logits, views, targets)
    by_logits, by_views = torch.autograd.grad(found.distance, [logits, views], allow_unused=True)
    assert by_logits is None or not by_logits.any()
    assert by_views.any()
    wanted = torch.autograd.grad(F.cross_entropy(logits, targets), logits)[0]
    found = target.call(mk.soft_distance_loss, logits, views, targets)
    torch.testing.assert_close(torch.autograd.grad(found.loss, logits)[0], wanted)


def test_all_three_scalars_in_one_backward(target):
    leaves = [x.to(target.device).requires_grad_() for x in inputs_of()[:2]]
    targets = inputs_of()[2].to(target.device)
    found = target.call(mk.soft_distance_loss, *leaves, targets)
    total = 2 * found.loss + 3 * found.cross_entropy - 5 * found.distance
    gradients = torch.autograd.grad(total, leaves)
    masters = [x.detach().cpu().clone().requires_grad_() for x in leaves]
    loss, cross_entropy, distance = oracles.soft_distance_loss(*masters, targets.cpu())
    wanted = torch.autograd.grad(2 * loss + 3 * cross_entropy - 5 * distance, masters)
    for g, w in zip(gradients, wanted, strict=True):
        assert_agrees(g, w)


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_sequence_of_views(target, kind):
    logits, views, targets = (x.to(target.device) for x in inputs_of())
    stacked = views.clone().requires_grad_()
    entries = kind(view.clone().requires_grad_() for view in views)
    found = target.call(mk.soft_distance_loss, logits, entries, targets)
    wanted = target.call(mk.soft_distance_loss, logits, stacked, targets)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    gradients = torch.autograd.grad(found.loss, entries)
    torch.testing.assert_close(torch.stack(gradients), torch.autograd.grad(wanted.loss, stacked)[0])


def test_many_separate_views(target):
    """More than a CUDA kernel takes pointers of."""
    logits, views, targets = (x.to(target.device) for x in inputs_of(views=40))
    stacked = views.clone().requires_grad_()
    separate = [view.clone().requires_grad_() for view in views]
    found = target.call(mk.soft_distance_loss, logits, separate, targets)
    wanted = target.call(mk.soft_distance_loss, logits, stacked, targets)
    torch.testing.assert_close(found.loss, wanted.loss)
    gradients = torch.autograd.grad(found.loss, separate)
    assert all(g.is_contiguous() for g in gradients)
    torch.testing.assert_close(torch.stack(gradients), torch.autograd.grad(wanted.loss, stacked)[0])


@all_dtypes
def test_float32_weights_and_any_strides_of_vectors(target, dtype):
    logits, views, targets = (x.to(target.device) for x in inputs_of())
    logits, views = logits.to(dtype).requires_grad_(), views.to(dtype)
    weights = weights_of(4).float().to(target.device)
    apart = [torch.stack([x, x.flip(0)], 1)[:, 0] for x in (targets, weights)]
    assert not any(x.is_contiguous() for x in apart)
    found, wanted = (
        target.call(mk.soft_distance_loss, logits, views, t, class_weights=w).loss
        for t, w in (apart, (targets, weights.to(dtype)))
    )
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(x, logits)[0] for x in (found, wanted)]
    torch.testing.assert_close(*gradients)


@all_dtypes
def test_large_logits_stay_finite(target, dtype):
    logits = torch.tensor([[3e4, -3e4, 0.0], [-3e4, 0.0, 3e4]], dtype=torch.float64)
    inputs = (logits, torch.stack([-logits, logits]), torch.tensor([0, 0]))
    check(target, dtype, inputs)


@both_weightings
def test_gradcheck(target, weighted):
    """Away from p = softmax(view), where the absolute value has a corner."""
    logits, views, targets = (x.to(target.device) for x in inputs_of(5, 3, 2))
    weights = weights_of(3).to(target.device) if weighted else None
    views.requires_grad_()
    assert gradcheck(
        target,
        lambda v: (
            target.call(mk.soft_distance_loss, logits, v, targets, class_weights=weights).loss
        ),
        views,
    )
    logits.requires_grad_()
    assert gradcheck(
        target,
        lambda x: (
            target.call(
                mk.soft_distance_loss, x, views.detach(), targets, class_weights=weights
            ).cross_entropy
        ),
        logits,
    )


def test_empty_batch(target):
    """Means over nothing: NaN, as torch's own cross entropy gives; shapes and dtypes hold."""
    logits = torch.zeros(0, 4, device=target.device, requires_grad=True)
    views = torch.zeros(3, 0, 4, device=target.device, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.int64, device=target.device)
    found = target.call(mk.soft_distance_loss, logits, views, targets)
    assert all(x.shape == () and x.dtype == torch.float32 for x in found)
    gradients = torch.autograd.grad(found.loss, [logits, views])
    assert [g.shape for g in gradients] == [(0, 4), (3, 0, 4)]


@pytest.mark.parametrize("bad", [4, -1, -100, 2**40])
@both_weightings
def test_target_outside_the_classes(target, bad, weighted):
    """An IndexError on the CPU, a NaN loss on a GPU; never a wrong number."""
    logits, views, targets = (x.to(target.device) for x in inputs_of())
    targets[3] = bad
    weights = weights_of(4).to(target.device) if weighted else None
    if target.device == "cpu":
        with pytest.raises(IndexError, match="targets") as caught:
            target.call(mk.soft_distance_loss, logits, views, targets, class_weights=weights)
        assert "soft_distance_loss" in str(caught.value)
        assert str(bad) in str(caught.value)
    else:
        found = target.call(mk.soft_distance_loss, logits, views, targets, class_weights=weights)
        assert bool(found.loss.isnan())


@pytest.mark.parametrize("bad", [4, -1, 2**40])
def test_kernels_answer_a_target_outside_the_classes_with_nan(target, bad):
    """Below the check that reads CPU memory, for gradients as for the loss."""
    logits, views, targets = (x.to(target.device) for x in inputs_of())
    targets[3] = bad
    inputs = (logits, [views], targets, None, 0.7, 0.01)
    kernels = implementation(target.backend, "soft_distance")
    loss, cross_entropy, distance = kernels.soft_distance_loss(*inputs)
    assert bool(loss.isnan())
    assert bool(cross_entropy.isnan())
    assert bool(distance.isfinite())
    one = torch.ones((), dtype=logits.dtype, device=target.device)
    grad, (grad_views,) = kernels.soft_distance_loss_backward(one, None, None, *inputs)
    assert grad.isnan().all(1).tolist() == [i == 3 for i in range(len(grad))]
    assert bool(grad_views.isfinite().all())


@both_weightings
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "separate"])
def test_one_launch_each_way(target, weighted, stacked):
    logits, views, targets = (x.to(target.device) for x in inputs_of())
    weights = weights_of(4).to(target.device) if weighted else None
    inputs = (logits, [views] if stacked else list(views), targets, weights, 0.7, 0.01)
    kernels = implementation(target.backend, "soft_distance")
    one = torch.ones((), dtype=logits.dtype, device=target.device)
    assert launches(target, lambda: kernels.soft_distance_loss(*inputs)) == 1
    assert (
        launches(target, lambda: kernels.soft_distance_loss_backward(one, None, one, *inputs)) == 1
    )


ROWS_OF_MANY_BLOCKS = ((67, 37, 3), (1100, 4, 2), (9, 1500, 2))


@pytest.mark.parametrize(("batch", "classes", "views"), ROWS_OF_MANY_BLOCKS)
@both_weightings
def test_rows_of_many_blocks(target, batch, classes, views, weighted):
    """More rows than one block takes; as many blocks as a GPU has, and as few as a small one."""
    inputs = inputs_of(batch, classes, views)
    weights = weights_of(classes) if weighted else None
    for count in (1, 132) if target.backend == "cuda" else (1,):
        with multiprocessors(target, count):
            check(target, torch.float32, inputs, class_weights=weights, smoothing=1e-4)


def test_many_blocks_leave_nothing_for_the_next_call(target):
    """Sums over blocks that end in any order: the same bits, however many blocks came before."""
    with multiprocessors(target, 132):
        results = []
        for batch in (67, 400, 67, 2000, 67):
            logits, views, targets = (x.to(target.device).float() for x in inputs_of(batch, 37, 3))
            found = target.call(mk.soft_distance_loss, logits, views, targets.long())
            results.append(torch.stack(found))
    assert identical(results[0], results[2])
    assert identical(results[0], results[4])


def test_many_rows_take_many_blocks_and_one_launch(target):
    logits, views, targets = (x.to(target.device) for x in inputs_of(256, 200, 3))
    logits, views = logits.float(), views.float()

    def run():
        target.call(mk.soft_distance_loss, logits, views, targets, smoothing=1e-4)

    with multiprocessors(target, 132):
        assert launches(target, run) == 1
        assert blocks(target, run) == 4 * 256 * 32 // 256
        few = [x[..., :4, :4] for x in (logits, views)]

        def run_few():
            target.call(mk.soft_distance_loss, *few, targets[:4] % 4)

        assert blocks(target, run_few) == 1


@pytest.mark.parametrize("bad", [-1, 37])
def test_a_target_outside_the_classes_among_many_rows(target, bad):
    logits, views, targets = (x.to(target.device) for x in inputs_of(300, 37, 2))
    targets[201] = bad
    kernels = implementation(target.backend, "soft_distance")
    loss, _, distance = kernels.soft_distance_loss(logits, [views], targets, None, 0.7, 0.01)
    assert bool(loss.isnan())
    assert bool(distance.isfinite())


def test_does_not_read_uninitialized_memory(target):
    def run():
        logits, views, targets = (x.to(target.device) for x in inputs_of())
        leaves = [logits.float().requires_grad_(), views.float().requires_grad_()]
        found = target.call(mk.soft_distance_loss, *leaves, targets)
        return [*(x.detach() for x in found), *torch.autograd.grad(found.loss, leaves)]

    clean = run()
    with poisoned_memory():
        poisoned = run()
    for a, b in zip(clean, poisoned, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@examples(10)
@given(st.permutations(range(7)), st.permutations(range(3)))
def test_order_of_images_and_views_does_not_matter(target, images, views):
    logits, view_logits, targets = (x.to(target.device) for x in inputs_of())
    found = target.call(
        mk.soft_distance_loss, logits[images], view_logits[views][:, images], targets[images]
    )
    wanted = target.call(mk.soft_distance_loss, logits, view_logits, targets)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@examples(10)
@given(st.integers(0, 10**6), st.floats(-50, 50))
def test_a_constant_added_to_logits_changes_nothing(target, seed, shift):
    logits, views, targets = (x.to(target.device) for x in inputs_of(seed=seed))
    found = target.call(mk.soft_distance_loss, logits + shift, views - shift, targets)
    wanted = target.call(mk.soft_distance_loss, logits, views, targets)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_module_is_the_function():
    logits, views, targets = inputs_of()
    weights = weights_of(4)
    options = {"confidence": 0.4, "smoothing": 0.03}
    module = mk.SoftDistanceLoss(**options, class_weights=weights)
    assert isinstance(module, torch.nn.Module)
    assert not list(module.parameters())
    found = module(logits, views, targets)
    wanted = mk.soft_distance_loss(logits, views, targets, **options, class_weights=weights)
    assert isinstance(found, mk.SoftDistance)
    assert all(identical(a, b) for a, b in zip(found, wanted, strict=True))
    default = mk.SoftDistanceLoss()(logits, views, targets)
    wanted = mk.soft_distance_loss(logits, views, targets)
    assert all(identical(a, b) for a, b in zip(default, wanted, strict=True))


def test_module_moves_its_class_weights():
    module = mk.SoftDistanceLoss(class_weights=weights_of(4)).to("meta")
    assert module.class_weights.device.type == "meta"


L, V, T = torch.zeros(2, 4), torch.zeros(3, 2, 4), torch.zeros(2, dtype=torch.int64)
W = torch.ones(4)
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str, str]] = {
    "logits not a tensor": ({"logits": [[0.0]]}, TypeError, "logits", "list"),
    "logits integers": ({"logits": L.int()}, TypeError, "logits", "int32"),
    "logits dimensions": ({"logits": L[0]}, ValueError, "logits", r"\(4,\)"),
    "no classes": ({"logits": L[:, :0]}, ValueError, "logits", r"\(2, 0\)"),
    "views not tensors": ({"view_logits": [1.0]}, TypeError, "view_logits", "float"),
    "views not a sequence": ({"view_logits": 1.0}, TypeError, "view_logits", "float"),
    "views integers": ({"view_logits": V.int()}, TypeError, "view_logits", "int32"),
    "views shape": ({"view_logits": V[:, :, :3]}, ValueError, "view_logits", r"\(3, 2, 3\)"),
    "views dimensions": ({"view_logits": L}, ValueError, "view_logits", r"\(2, 4\)"),
    "views entries": ({"view_logits": [L, L[:1]]}, ValueError, "view_logits", r"\(1, 4\)"),
    "views device": ({"view_logits": V.to("meta")}, ValueError, "view_logits", "meta"),
    "targets not a tensor": ({"targets": [0, 1]}, TypeError, "targets", "list"),
    "targets floats": ({"targets": T.float()}, TypeError, "targets", "float32"),
    "targets int32": ({"targets": T.int()}, TypeError, "targets", "int32"),
    "targets shape": ({"targets": T[:1]}, ValueError, "targets", r"\(1,\)"),
    "targets dimensions": ({"targets": T[:, None]}, ValueError, "targets", r"\(2, 1\)"),
    "targets device": ({"targets": T.to("meta")}, ValueError, "targets", "meta"),
    "weights shape": ({"class_weights": W[:3]}, ValueError, "class_weights", r"\(3,\)"),
    "weights integers": ({"class_weights": W.int()}, TypeError, "class_weights", "int32"),
    "weights not a tensor": ({"class_weights": [1.0]}, TypeError, "class_weights", "list"),
    "weights device": ({"class_weights": W.to("meta")}, ValueError, "class_weights", "meta"),
    "confidence type": ({"confidence": "high"}, TypeError, "confidence", "str"),
    "confidence nan": ({"confidence": float("nan")}, ValueError, "confidence", "nan"),
    "smoothing type": ({"smoothing": None}, TypeError, "smoothing", "NoneType"),
    "smoothing negative": ({"smoothing": -0.1}, ValueError, "smoothing", "-0.1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    changes, kind, argument, came = ERRORS[name]
    valid = {"logits": L, "view_logits": V, "targets": T}
    with pytest.raises(kind, match=came) as caught:
        mk.soft_distance_loss(**(valid | changes))
    assert "soft_distance_loss" in str(caught.value)
    assert argument in str(caught.value)
