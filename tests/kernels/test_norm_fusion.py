"""BatchNormAct, `fuse_batch_norms` and `norm_groups`: the same values, gradients and statistics."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import magsd_kernels as mk
from magsd_kernels import norm_fusion

from .support import random


@pytest.fixture(autouse=True)
def _by_definition() -> Iterator[None]:
    """How the operation is computed, its own tests see to."""
    with mk.use_backend("reference"):
        yield


in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def timm_model(name: str, **options: Any) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, pretrained=False, **options)


def torchvision_model(module: str, name: str, *arguments: Any, **options: Any) -> nn.Module:
    library = pytest.importorskip(f"torchvision.models.{module}")
    return getattr(library, name)(*arguments, **options)


def torchvision_resnet(block: str) -> nn.Module:
    resnet = pytest.importorskip("torchvision.models.resnet")
    return resnet.ResNet(getattr(resnet, block), [1, 1, 1, 1], num_classes=3, width_per_group=64)


def of_timm_blocks(kind: str, **options: Any) -> nn.Module:
    """A bottleneck of timm with what is seldom between its parts."""
    resnet = pytest.importorskip("timm.models.resnet")
    down = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8))
    block = getattr(resnet, kind)
    return block(3, 8 // block.expansion, downsample=down, **options)


def squeezed() -> nn.Module:
    timm = pytest.importorskip("timm")
    return of_timm_blocks("BasicBlock", attn_layer=timm.layers.get_attn("se"))


def hooked_features() -> nn.Module:
    features = pytest.importorskip("timm.models._features")
    return features.FeatureHookNet(timm_model("test_resnet"), out_indices=(0, 3))


DENSE = {"growth_rate": 4, "block_config": (2, 1, 1, 1)}

#: Models with the classes that are known, of three channels.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm resnet": lambda: timm_model("test_resnet", num_classes=3),
    "timm features": lambda: timm_model("test_resnet", features_only=True),
    "timm first features": lambda: timm_model("test_resnet", features_only=True, out_indices=(0,)),
    "timm hooked features": hooked_features,
    "timm BasicBlock": lambda: of_timm_blocks("BasicBlock"),
    "timm BasicBlock se": squeezed,
    "timm Bottleneck silu": lambda: of_timm_blocks("Bottleneck", act_layer=nn.SiLU),
    "timm Bottleneck hardswish": lambda: of_timm_blocks("Bottleneck", act_layer=nn.Hardswish),
    "timm Bottleneck dropping": lambda: of_timm_blocks(
        "Bottleneck", drop_path=nn.Dropout(0.5), drop_block=lambda: nn.Dropout(0.5)
    ),
    "timm efficientnet": lambda: timm_model("test_efficientnet", num_classes=3),
    "timm efficientnet features": lambda: timm_model("test_efficientnet", features_only=True),
    "timm mobilenet": lambda: timm_model("mobilenetv3_small_050", features_only=True),
    "timm densenet": lambda: timm_model("densenet121", features_only=True, **DENSE),
    "timm ConvNormAct": lambda: pytest.importorskip("timm").layers.ConvNormAct(3, 4),
    "torchvision BasicBlock": lambda: torchvision_resnet("BasicBlock").layer1,
    "torchvision Bottleneck": lambda: torchvision_resnet("Bottleneck").layer1,
    "torchvision densenet": lambda: torchvision_model(
        "densenet", "DenseNet", 4, (2, 1), 8, 2, 0.0, 3
    ),
    "torchvision BasicConv2d": lambda: torchvision_model(
        "inception", "BasicConv2d", 3, 4, kernel_size=3
    ),
    "torchvision vgg": lambda: torchvision_model("vgg", "make_layers", [4, "M", 8], True),
    "torchvision mobilenet": lambda: torchvision_model(
        "mobilenetv2", "InvertedResidual", 3, 3, 1, 4
    ),
    "Sequential": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(True)),
    "norm alone": lambda: nn.BatchNorm2d(3),
}
#: Layers of torchvision's ResNet take its 64 channels.
CHANNELS = {"torchvision BasicBlock": 64, "torchvision Bottleneck": 64}
#: What takes the most at 64 pixels.
SIZES = {"torchvision BasicBlock": 8, "torchvision Bottleneck": 8, "timm ConvNormAct": 8}
all_models = pytest.mark.parametrize("name", MODELS)


def images_of(name: str, batch: int = 4) -> Tensor:
    size = SIZES.get(name, 32)
    return random(batch, CHANNELS.get(name, 3), size, size, seed=5, dtype=torch.float64)


def twins(name: str) -> tuple[nn.Module, nn.Module]:
    """A fused model, and one with the same weights that is not."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    twin = copy.deepcopy(model)
    assert mk.fuse_batch_norms(model) == []
    return model, twin


def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    torch.manual_seed(1)  # of what drops
    found = model(images)
    return list(found) if isinstance(found, (list, tuple)) else [found]


def gradients(model: nn.Module, found: list[Tensor], *leaves: Tensor) -> list[Tensor | None]:
    total = sum((random(*y.shape, seed=i, dtype=y.dtype) * y).sum() for i, y in enumerate(found))
    wanted = [*leaves, *model.parameters()]
    return list(torch.autograd.grad(total, wanted, allow_unused=True))


def assert_same(found: list[Any], wanted: list[Any]) -> None:
    """Equal but for rounding, beside the largest of all: gradients of what cancels are 0."""
    largest = max(float(x.detach().abs().max()) for x in wanted if x is not None)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * max(largest, 1))


def assert_same_state(model: nn.Module, twin: nn.Module) -> None:
    found, wanted = model.state_dict(), twin.state_dict()
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-11, atol=1e-13, msg=key)


class Counter(torch.utils._python_dispatch.TorchDispatchMode):
    """How many batch norms of torch, and of ours, run within."""

    def __init__(self) -> None:
        super().__init__()
        self.torch, self.ours = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        name = str(function)
        self.torch += "native_batch_norm." in name or "_batch_norm_with_update" in name
        self.ours += "batch_norm_act." in name and "backward" not in name
        return function(*args, **(kwargs or {}))


@in_both_modes
@all_models
def test_a_fused_model_is_the_same(name, training):
    model, twin = (each.train(training) for each in twins(name))
    leaf, other = images_of(name).requires_grad_(), images_of(name).requires_grad_()
    found, wanted = outputs(model, leaf), outputs(twin, other)
    assert_same(found, wanted)
    assert_same(gradients(model, found, leaf), gradients(twin, wanted, other))
    assert_same_state(model, twin)


def passes(model: nn.Module, images: Tensor, groups: int) -> list[Tensor]:
    """Each part of the batch by itself."""
    parts = [outputs(model, part) for part in images.chunk(groups)]
    return [torch.cat(each) for each in zip(*parts, strict=True)]


@all_models
def test_groups_are_passes_of_their_own(name):
    model, twin = twins(name)
    if "dropping" in name:  # its draws differ
        for each in (model, twin):
            [drop.eval() for drop in each.modules() if isinstance(drop, nn.Dropout)]
    images = images_of(name, batch=6)
    leaf, other = images.clone().requires_grad_(), images.clone().requires_grad_()
    with mk.norm_groups(3):
        found = outputs(model, leaf)
    wanted = passes(twin, other, 3)
    assert_same(found, wanted)
    assert_same(gradients(model, found, leaf), gradients(twin, wanted, other))
    assert_same_state(model, twin)


@all_models
def test_every_norm_runs_in_one_operation(name):
    """With its activation, where the operation has it; none is torch's any more."""
    model, twin = twins(name)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    with torch.no_grad(), Counter() as counter:
        outputs(model, images_of(name))
    assert 0 < counter.ours <= norms  # timm's extractors may have layers after the last map
    assert counter.torch == 0
    with torch.no_grad(), Counter() as other:
        outputs(twin, images_of(name))
    assert (other.torch, other.ours) == (counter.ours, 0)


@all_models
def test_what_fusion_leaves_as_it_was(name):
    model, twin = twins(name)
    for (key, mine), (other, theirs) in zip(
        model.named_modules(), twin.named_modules(), strict=True
    ):
        assert key == other
        assert isinstance(mine, type(theirs))
        assert repr(mine.extra_repr()) == repr(theirs.extra_repr())
    classes = [type(m) for m in model.modules()]
    assert mk.fuse_batch_norms(model) == []
    assert [type(m) for m in model.modules()] == classes
    twin.load_state_dict(model.state_dict(), strict=True)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in copied.modules()] == classes
        with torch.no_grad(), Counter() as counter:
            assert_same(outputs(copied, images_of(name)), outputs(twin, images_of(name)))
        assert counter.ours == counter.torch > 0


def residual_block() -> tuple[nn.Module, nn.Module]:
    return twins("timm BasicBlock")


def calls_of(module: nn.Module) -> list[Tensor]:
    """What a hook on the module sees as its result."""
    seen: list[Tensor] = []
    module.register_forward_hook(lambda module, args, result: seen.append(result.detach().clone()))
    return seen


@pytest.mark.parametrize("place", ["", "conv1", "bn1", "act1", "bn2", "act2", "downsample.1"])
def test_hooks_see_what_they_saw(place):
    model, twin = residual_block()
    seen = [calls_of(each.get_submodule(place)) for each in (model, twin)]
    images = images_of("timm BasicBlock")
    assert_same(*(outputs(each, images) for each in (model, twin)))
    assert_same(*seen)


@in_both_modes
def test_a_replaced_norm_is_the_one_that_runs(training):
    model, twin = residual_block()
    for each in (model, twin):
        each.bn1, each.downsample[1] = nn.GroupNorm(2, 8).double(), nn.Identity()
        each.train(training)
    images = images_of("timm BasicBlock")
    assert_same(*(outputs(each, images) for each in (model, twin)))


def odd(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, **options), nn.ReLU()).double()


@in_both_modes
@pytest.mark.parametrize(
    "options", [{"affine": False}, {"momentum": None}, {"track_running_stats": False}], ids=str
)
def test_norms_that_the_operation_lacks_run_unfused_by_groups(options, training):
    model = odd(**options).train(training)
    twin = copy.deepcopy(model)
    assert mk.fuse_batch_norms(model) == []
    images = images_of("norm alone", batch=6)
    with mk.norm_groups(2):
        found = model(images)
    assert_same([found], [torch.cat([twin(part) for part in images.chunk(2)])])
    assert_same_state(model, twin)


@pytest.mark.parametrize("name", ["timm resnet", "timm efficientnet", "Sequential"])
def test_synchronized_norms_run_unfused_by_groups(name):
    """Without a process group SyncBatchNorm computes ordinary batch statistics."""
    convert = (
        pytest.importorskip("timm").layers.convert_sync_batchnorm
        if "timm" in name
        else nn.SyncBatchNorm.convert_sync_batchnorm
    )
    model, twin = twins(name)
    before, after = convert(copy.deepcopy(model)), convert(copy.deepcopy(twin))
    assert mk.fuse_batch_norms(before) == mk.fuse_batch_norms(after) == []
    images = images_of(name, batch=6)
    with torch.no_grad(), mk.norm_groups(2):
        wanted = outputs(model, images)
        for each in (before, after):
            assert any(isinstance(m, nn.SyncBatchNorm) for m in each.modules())
            with Counter() as counter:
                assert_same(outputs(each, images), wanted)
            assert counter.ours == 0
            assert_same_state(each, model)


def test_what_is_not_known_is_listed():
    class Own(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.ModuleDict(
        {
            "own": nn.Sequential(Own(3), nn.ReLU()),
            "plain": nn.BatchNorm2d(3),
            "rows": nn.BatchNorm1d(3),
            "instance": nn.InstanceNorm2d(3, track_running_stats=True),
            "group": nn.GroupNorm(1, 3),
            "attention": mk.MultiscaleAttention((3,), 2),
            "layer": mk.BatchNormAct(3),
        }
    )
    assert mk.fuse_batch_norms(model) == ["own.0", "rows", "instance"]
    assert type(model["own"][0]) is Own
    assert type(model["attention"].norms[0]) is nn.BatchNorm2d
    x = random(2, 3, 4, 4, dtype=torch.float32)
    torch.testing.assert_close(model["own"](x), 2 * F.relu(nn.BatchNorm2d(3)(x)))


@pytest.mark.parametrize("name", ["timm features", "timm efficientnet features", "Sequential"])
def test_a_fused_model_compiles(name):
    """In one graph for a number of groups."""
    model, twin = twins(name)
    images = images_of(name, batch=6)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(
            lambda x: model(x), backend="aot_eager", fullgraph=True, dynamic=False
        )
        for groups in (1, 3):
            wanted = passes(twin, images, groups)
            with mk.norm_groups(groups):
                assert_same(outputs(compiled, images), wanted)
    finally:
        torch._dynamo.reset()
    assert_same_state(model, twin)


def test_a_fused_model_is_exported():
    model, twin = twins("timm resnet")
    images = images_of("timm resnet")
    program = torch.export.export(model.eval(), (images,))
    assert_same([program.module()(images)], [twin.eval()(images)])


def test_a_block_computed_again_opens_its_groups_again():
    """In activation checkpointing, whose second forward runs in the backward."""
    from torch.utils.checkpoint import checkpoint

    model, twin = twins("timm BasicBlock")
    images = images_of("timm BasicBlock", batch=6)

    def in_groups(x: Tensor) -> Tensor:
        with mk.norm_groups(3):
            return model(x)

    found = gradients(model, [checkpoint(in_groups, images, use_reentrant=False)])
    wanted = gradients(twin, [torch.cat([twin(x) for x in images.chunk(3)])])
    assert_same(found, wanted)


def test_groups_nest_and_end():
    counts = []
    with mk.norm_groups(2):
        counts.append(norm_fusion.current_groups())
        with mk.norm_groups(3):
            counts.append(norm_fusion.current_groups())
        counts.append(norm_fusion.current_groups())
        with pytest.raises(ValueError, match="inside"), mk.norm_groups(5):
            raise ValueError("inside")
        counts.append(norm_fusion.current_groups())
    assert counts == [2, 3, 2, 2]
    assert norm_fusion.current_groups() == 1


@pytest.mark.parametrize("groups", [0, -1, 1.0, True, None])
def test_wrong_groups_are_refused(groups):
    with pytest.raises((ValueError, TypeError), match="norm_groups: groups must be"):
        mk.norm_groups(groups)


@pytest.mark.parametrize("name", ["Sequential", "norm alone"])
def test_groups_must_divide_the_batch(name):
    model, _ = twins(name)
    with mk.norm_groups(3), pytest.raises(ValueError, match="groups must divide the batch of 4"):
        model(images_of(name))
    layer = mk.MultiscaleAttention((3,), 2).double()
    with mk.norm_groups(3), pytest.raises(ValueError, match="groups must divide the batch of 4"):
        layer([images_of(name)])


def new_layer(**options: Any) -> mk.BatchNormAct:
    torch.manual_seed(3)
    layer = mk.BatchNormAct(4, **options).double()
    nn.init.uniform_(layer.norm.weight, 0.5, 1.5)
    nn.init.normal_(layer.norm.bias)
    return layer


ACTS = {"relu": F.relu, "silu": F.silu, "none": lambda x: x}


@in_both_modes
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("groups", [1, 2])
def test_the_layer_is_the_composition_of_torch_layers(act, groups, with_residual, training):
    layer = new_layer(act=act, groups=groups, eps=1e-3, momentum=0.4).train(training)
    norm = copy.deepcopy(layer.norm)
    x = random(4, 4, 5, 3, seed=1, dtype=torch.float64).requires_grad_()
    residual = random(4, 4, 5, 3, seed=2, dtype=torch.float64) if with_residual else None
    wanted = torch.cat([norm(part) for part in x.chunk(groups)])
    wanted = ACTS[act](wanted if residual is None else wanted + residual)
    found = layer(x, residual)
    parameters = ([*layer.parameters()], [*norm.parameters()])
    assert_same([found], [wanted])
    assert_same(
        *(gradients_of(y, [x, *own]) for y, own in zip((found, wanted), parameters, strict=True))
    )
    assert_same_state(layer.norm, norm)
    assert int(layer.norm.num_batches_tracked) == groups * training


def gradients_of(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(y, leaves, random(*y.shape, seed=4, dtype=y.dtype)))


def test_the_layer_takes_the_groups_around_it_unless_it_has_its_own():
    x = random(6, 4, 3, 3, dtype=torch.float64)
    apart = torch.cat([new_layer()(part) for part in x.chunk(2)])
    with mk.norm_groups(2):
        assert_same([new_layer()(x)], [apart])
    with mk.norm_groups(3):
        assert_same([new_layer(groups=2)(x)], [apart])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("how", ["sync", "hook", "dtype", "shape", "fused"])
def test_the_layer_runs_unfused_with_the_same_meaning(how, groups):
    layer, twin = new_layer(groups=groups), new_layer(groups=groups)
    x = random(4, 4, 3, 3, seed=1, dtype=torch.float64)
    residual = random(4, 4, 3, 3, seed=2, dtype=torch.float64)
    given = residual
    if how == "sync":
        layer = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    elif how == "hook":
        layer.norm.register_forward_hook(lambda module, args, result: None)
    elif how == "dtype":
        residual, given = residual.float().double(), residual.float()
    elif how == "shape":
        given = residual[:, :, :1, :1]
        residual = given.expand_as(x).contiguous()
    else:
        mk.fuse_batch_norms(layer.norm)
    with Counter() as counter:
        found = layer(x, given)
    assert counter.ours == (how == "fused")
    assert_same([found], [twin(x, residual)])
    assert_same_state(layer, twin)


def test_the_layer_holds_a_plain_batch_norm():
    layer = mk.BatchNormAct(4, eps=0.1, momentum=0.2)
    assert type(layer.norm) is nn.BatchNorm2d
    assert (layer.norm.eps, layer.norm.momentum) == (0.1, 0.2)
    assert list(layer.state_dict()) == [f"norm.{key}" for key in nn.BatchNorm2d(4).state_dict()]


@pytest.mark.parametrize(("options", "match"), [({"act": "gelu"}, "act"), ({"groups": 0}, "group")])
def test_the_layer_refuses(options, match):
    with pytest.raises(ValueError, match=f"BatchNormAct: {match}"):
        mk.BatchNormAct(4, **options)


@in_both_modes
@pytest.mark.parametrize("converted", [False, True], ids=["plain", "sync"])
def test_multiscale_attention_by_groups(converted, training):
    torch.manual_seed(3)
    layer = mk.MultiscaleAttention((6, 4), 5).double().train(training)
    twin = copy.deepcopy(layer)
    if converted:
        layer = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    features = [
        random(6, 6, 8, 8, seed=1, dtype=torch.float64),
        random(6, 4, 4, 4, seed=2, dtype=torch.float64),
    ]
    with mk.norm_groups(3):
        found = layer(features)
    wanted = torch.cat([twin([x[i : i + 2] for x in features]) for i in (0, 2, 4)])
    assert_same([found], [wanted])
    assert_same(*(gradients(each, [y]) for each, y in
                  ((layer, found), (twin, wanted))))  # fmt: skip
    assert_same_state(layer, twin)
