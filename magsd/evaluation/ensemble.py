"""Several models as one, and an image together with its mirror: means over their outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from magsd.errors import RunError
from magsd.models.classifier import Classifier, ClassifierOutput
from magsd.models.config import Preprocessing
from magsd.runtime import CPU, Runtime

#: Test-time augmentation: "flip" adds the horizontal mirror of each image; None adds nothing.
TTA = Literal["flip"] | None
#: How an image is prepared for a model, and its channels.
Form = tuple[Preprocessing, int]


class Outputs(NamedTuple):
    """Of a batch: logits (B, K), the same of the refined prediction or None, saliency (B, 1, h, w).

    Means over several have the logarithm of the mean probability as logits, float32.
    """

    logits: Tensor
    refined: Tensor | None
    saliency: Tensor


def run_model(
    model: Classifier, images: Tensor, *, refine: bool = True, tta: TTA = None
) -> Outputs:
    """Outputs of images (B, C, H, W) on the model's device, within `Runtime.inference`.

    tta="flip": the mean with those of the mirrored images, whose maps are mirrored back.
    """
    outputs = _run(model, images, refine)
    if tta is None:
        return outputs
    mirrored = _run(model, images.flip(-1), refine)
    return mean_outputs([outputs, mirrored._replace(saliency=mirrored.saliency.flip(-1))])


def _run(model: Classifier, images: Tensor, refine: bool) -> Outputs:
    output: ClassifierOutput = model(images)
    saliency = model.saliency(output)
    refined = refined_logits(model, images, output, saliency) if refine else None
    return Outputs(output.logits, refined, saliency)


def refined_logits(
    model: Classifier, images: Tensor, output: ClassifierOutput, saliency: Tensor
) -> Tensor:
    """Mean of the logits of `images` (B, C, H, W) and of the model's refined view, (B, K)."""
    view = model.refined_view(images, saliency)
    viewed: ClassifierOutput = model(view)
    return (output.logits + viewed.logits) / 2


def mean_outputs(parts: Sequence[Outputs]) -> Outputs:
    """Mean of several outputs of the same images: of probabilities, and of maps.

    One alone stays as it is. All come to the device of the first.
    """
    if len(parts) == 1:
        return parts[0]
    refined = [part.refined for part in parts if part.refined is not None]
    return Outputs(
        log_mean_probability([part.logits for part in parts]),
        log_mean_probability(refined) if len(refined) == len(parts) else None,
        mean_saliency([part.saliency for part in parts]),
    )


def log_mean_probability(logits: Sequence[Tensor]) -> Tensor:
    """Logarithm of the mean of the softmax of logits, each (B, K); float32, or float64 of that."""
    device = logits[0].device
    wide = [torch.promote_types(each.dtype, torch.float32) for each in logits]
    logs = [each.to(device, kind).log_softmax(1) for each, kind in zip(logits, wide, strict=True)]
    return torch.stack(logs).logsumexp(0) - math.log(len(logs))


def mean_saliency(maps: Sequence[Tensor]) -> Tensor:
    """Mean of maps (B, 1, h, w), float32, each divided by its own mean, so that all weigh alike.

    Maps of several sizes are resized to the largest. A map that is zero everywhere adds nothing.
    """
    size = max((each.shape[-2:] for each in maps), key=math.prod)
    alike = []
    for each in maps:
        each = each.to(maps[0].device, torch.float32)
        if each.shape[-2:] != size:
            each = F.interpolate(each, size, mode="bilinear", align_corners=False)
        mean = each.mean(dim=(1, 2, 3), keepdim=True)
        alike.append(each / torch.where(mean > 0, mean, 1.0))
    return torch.stack(alike).mean(0)


@dataclass(frozen=True)
class Member:
    """A model of an ensemble, its classes, what its images need, and how it runs.

    name: what errors call it.
    """

    model: Classifier
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    runtime: Runtime = CPU
    name: str = "the model"

    @property
    def form(self) -> Form:
        """What its images must be; members of the same form share them."""
        return self.preprocessing, self.model.in_channels


class Ensemble:
    """Models whose mean is the prediction, all of them in memory.

    Classes have the order of the first member. Raises RunError where another has other classes.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        if not members:
            raise ValueError("members: expected at least one")
        self.members = tuple(members)
        self.classes = members[0].classes
        self._orders = [_order(member, members[0]) for member in members]

    @property
    def forms(self) -> tuple[Form, ...]:
        """Each form of images that a member needs, once."""
        return tuple(dict.fromkeys(member.form for member in self.members))

    def __call__(
        self, images: Mapping[Form, Tensor], *, refine: bool = True, tta: TTA = None
    ) -> Outputs:
        """Mean over the members of what `run_model` gives, of one batch in all forms."""
        parts = []
        for member, order in zip(self.members, self._orders, strict=True):
            runtime = member.runtime
            with runtime.inference(member.model):
                prepared = runtime.images(images[member.form])
                part = run_model(member.model, prepared, refine=refine, tta=tta)
                parts.append(part if order is None else _in_order(part, order))
        with torch.no_grad():
            return mean_outputs(parts)


def _order(member: Member, first: Member) -> list[int] | None:
    """Where the first member's classes are among a member's; None where they are the same."""
    if member.classes == first.classes:
        return None
    if sorted(member.classes) != sorted(first.classes):
        raise RunError(
            f"{member.name} has the classes {', '.join(member.classes)}, {first.name} has "
            f"{', '.join(first.classes)}: a mean needs models of the same classes"
        )
    return [member.classes.index(name) for name in first.classes]


def _in_order(part: Outputs, order: list[int]) -> Outputs:
    refined = None if part.refined is None else part.refined[:, order]
    return part._replace(logits=part.logits[:, order], refined=refined)
