"""AdamW, and what it becomes where a step sees few of many effects: a cost that does not grow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cradle_pyro.config import TrainConfig

__all__ = ["AdamWByRow", "clip_gradients", "make_optimizer"]

_MATRIX = 2  # dimensions of a weight matrix


class AdamWByRow(torch.optim.AdamW):
    """AdamW; in groups with ``by_row`` a step moves only the rows that it saw.

    A row moves by all that Adam would move it in the steps to come, had it a gradient in this one
    only: the mean square of its gradients decays over all steps, and there is no mean gradient.
    (``torch.optim.SparseAdam`` lets neither decay where a row is not seen: rows seldom seen learn
    less.)

    Notes
    -----
    Rows that a step saw are those of a sparse gradient, or those of a dense one that are not zero.
    Source: Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the parameters, and return what the closure does, which computes the gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        of_rows = [
            (parameter, parameter.grad, group)
            for group in self.param_groups
            if group.get("by_row")
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        for parameter, _, _ in of_rows:
            parameter.grad = None
        super().step()
        for parameter, gradient, group in of_rows:
            self._move_rows(parameter, gradient, group)
            parameter.grad = gradient
        return loss

    def _move_rows(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            rows, slope = gradient.indices()[0], gradient.values()
        else:
            rows = gradient.flatten(1).any(1).nonzero()[:, 0]
            slope = gradient[rows]
        state, decay = self.state[parameter], group["betas"][1]
        if not state:
            state["step"] = torch.zeros(())
            state["mean_square"] = torch.zeros_like(parameter)
            state["last_step"] = parameter.new_zeros(len(parameter))
        state["step"] += 1
        step = state["step"].item()
        since = (step - state["last_step"][rows]).reshape(-1, *[1] * (slope.dim() - 1))
        mean_square = state["mean_square"][rows].mul_(decay**since)
        mean_square.addcmul_(slope, slope, value=1 - decay)
        state["mean_square"][rows] = mean_square
        state["last_step"][rows] = step
        scale = (mean_square / (1 - decay**step)).sqrt_().add_(group["eps"])
        parameter.index_add_(0, rows, slope / scale, alpha=-group["lr"])


def make_optimizer(
    model: nn.Module, guide: nn.Module, config: TrainConfig, *, by_row: bool = False
) -> AdamWByRow:
    """Return the optimiser of a pair, whose parameters fall into groups.

    Parameters
    ----------
    model, guide
        The pair. Free parameters of the global guide (``global_parameters``) learn at their own
        rate. Only weight matrices without a prior of their own (``parameters_with_prior``) decay.
    config
        Rates and decay.
    by_row
        Batches carry their effects, so that those of others (``row_parameters`` of the guide) are
        left as they are.
    """
    own_prior = _ids(model, "parameters_with_prior")
    of_rows = _ids(guide, "row_parameters") if by_row else set()
    fast = _ids(guide, "global_parameters") - of_rows
    groups: dict[str, list[nn.Parameter]] = {"decaying": [], "slow": [], "fast": [], "rows": []}
    for parameter in dict.fromkeys([*model.parameters(), *guide.parameters()]):
        if id(parameter) in of_rows:
            group = "rows"
        elif id(parameter) in fast:
            group = "fast"
        else:
            decays = parameter.dim() >= _MATRIX and id(parameter) not in own_prior
            group = "decaying" if decays else "slow"
        groups[group].append(parameter)
    slow, fast_rate = {"lr": config.learning_rate}, {"lr": config.effect_learning_rate}
    settings: dict[str, dict[str, Any]] = {
        "decaying": slow | {"weight_decay": config.weight_decay},
        "slow": slow,
        "fast": fast_rate,
        "rows": fast_rate | {"by_row": True},
    }
    found = [{"params": some} | settings[name] for name, some in groups.items() if some]
    return AdamWByRow(found, weight_decay=0.0, fused=True)


def clip_gradients(parameters: Iterable[Tensor], most: float) -> None:
    """Scale gradients to a total norm of at most `most`, sparse ones too.

    They may be sparse, of some rows of their parameter; torch's ``clip_grad_norm_`` takes none.
    """
    values = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad.values())
        else:
            values.append(parameter.grad)
    factor = (most / (nn.utils.get_total_norm(values) + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(values, factor)


def _ids(module: nn.Module, method: str) -> set[int]:
    return {id(parameter) for parameter in getattr(module, method, list)()}
