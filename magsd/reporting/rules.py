"""Rules by which thresholds are chosen; settings are checked by them, so they import no library."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, cast

from magsd.errors import ConfigError

RuleName = Literal["argmax", "youden", "sensitivity", "specificity", "cost"]
_COST = re.compile(r"([^:]+):([^:]+)")


@dataclass(frozen=True)
class Rule:
    """How thresholds are chosen.

    name: "argmax" chooses none: the likeliest class is the prediction. "youden": the highest
    sensitivity + specificity. "sensitivity", "specificity": at least `value` of it, and as much of
    the other as that allows. "cost": the lowest cost where a false negative costs `value` times a
    false positive.
    """

    name: RuleName = "argmax"
    value: float | None = None

    @classmethod
    def parse(cls, text: str) -> Rule:
        """`argmax`, `youden`, `sensitivity=0.95`, `specificity=0.9`, `cost=5:1` (false negative to
        false positive), or ConfigError.
        """
        name, _, value = (part.strip() for part in text.partition("="))
        if name in ("argmax", "youden") and "=" not in text:
            return cls(cast(RuleName, name))
        if name in ("sensitivity", "specificity"):
            share = _positive(value)
            if share <= 1:
                return cls(cast(RuleName, name), share)
        if name == "cost" and (costs := _COST.fullmatch(value)):
            ratio = _positive(costs[1]) / _positive(costs[2])
            if math.isfinite(ratio):
                return cls("cost", ratio)
        raise ConfigError(
            f"{text!r} is no rule for thresholds; expected argmax, youden, sensitivity=0.95,"
            " specificity=0.9 or cost=5:1 (of a false negative to a false positive)"
        )

    def __str__(self) -> str:
        if self.value is None:
            return self.name
        number = repr(self.value).removesuffix(".0")
        return f"{self.name}={number}" + (":1" if self.name == "cost" else "")


def _positive(text: str) -> float:
    """A number above 0, or NaN."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if 0 < value < math.inf else math.nan
