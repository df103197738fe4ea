"""The scale of effects, whatever the likelihood of an edited model is called."""

from __future__ import annotations

import math
from typing import Final

from torch import Tensor

from cradle_pyro.inference.posterior import Posterior
from cradle_pyro.types import SCALE

__all__ = ["SCALES", "is_log_normalised", "log2_expression"]

SCALES: Final = {
    "rate": "difference of log2(1 + 1e4 rate)",
    "counts": "difference of log2(1 + 1e4 counts / library)",
}
"""What effects are differences of, in words."""


def is_log_normalised(posterior: Posterior) -> bool:
    """Return whether the model's rate is a log-normalised value, not a fraction of the library."""
    return posterior.config.model.likelihood == "normal"


def log2_expression(posterior: Posterior, rate: Tensor) -> Tensor:
    """Return log2(1 + 1e4 rate); of log-normalised values, natural logs, the value over log 2."""
    if is_log_normalised(posterior):
        return rate / math.log(2)
    return (SCALE * rate).add_(1).log2_()
