"""What the classifiers with attention share: where they look, and the view that evaluation adds."""

from __future__ import annotations

import torch
from torch import Tensor

from magsd.models.classifier import Classifier, ClassifierOutput

# The pooled vector has unit length; the published classifiers see it 100 times as long.
POOLED_LENGTH = 100.0


class AttentiveClassifier(Classifier):
    """A classifier whose output has attention maps."""

    @torch.no_grad()
    def saliency(self, output: ClassifierOutput) -> Tensor:
        """Mean of the attention maps, (B, 1, h, w) float32."""
        if output.attention is None:
            raise ValueError("saliency: expected this model's output, got one without attention")
        return output.attention.float().mean(dim=1, keepdim=True)
