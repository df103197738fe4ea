"""Whether a query asks about something the screen has shown: answered anyway, but flagged."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from cradle_pyro.data.encode import canonical_label
from cradle_pyro.errors import shown
from cradle_pyro.inference.posterior import Posterior, flag_column
from cradle_pyro.queries.interventions import CheckedIntervention

__all__ = ["support_notes"]


def support_notes(
    posterior: Posterior, checked: CheckedIntervention, labels: ArrayLike | None = None
) -> dict[str, list[str]]:
    """Return, for each label that cells end up with, in what the training cells do not support it.

    Parameters
    ----------
    posterior
        A fitted pair.
    checked
        The intervention.
    labels
        Labels of the factual cells, which they keep where the intervention names no perturbation;
        None where there are none.

    Returns
    -------
    dict
        Label to sentences; a label without any is supported.
    """
    table = posterior.labels.set_index("label")
    general = _dosage_notes(posterior, checked)
    if checked.design is not None:
        names = [posterior.schema.perturbations[k] for k in checked.design.nonzero().ravel()]
        ends = [canonical_label(names, posterior.schema.delimiter, posterior.schema.control)]
    else:
        ends = np.unique(np.asarray([] if labels is None else labels, dtype=str)).tolist()
    return {label: _label_notes(posterior, table, label, checked) + general for label in ends}


def _label_notes(
    posterior: Posterior, table: Any, label: str, checked: CheckedIntervention
) -> list[str]:
    schema = posterior.schema
    control = label == schema.control
    known = label in table.index
    if not known or (table.at[label, "train"] == 0 and not control):
        what = "was held out" if known else "was never screened"
        parts = label.split(schema.delimiter)
        unseen = [p for p in parts if p not in table.index or table.at[p, "train"] == 0]
        if len(parts) == 1:
            return [f"'{label}' {what}: its effect is the prior's"]
        alone = f", and {shown(unseen)} alone never trained" if unseen else ""
        return [f"the combination '{label}' {what}: predicted from its members{alone}"]
    if not isinstance(checked.flags, Tensor):
        return []
    carried = [f for f, on in zip(schema.artifacts, checked.flags.tolist(), strict=True) if on]
    absent = [f for f in carried if table.at[label, flag_column(f)] == 0] if known else carried
    return [f"no training cell with '{label}' carries {shown(absent)}"] if absent else []


def _dosage_notes(posterior: Posterior, checked: CheckedIntervention) -> list[str]:
    if checked.design is None:
        return []
    ranges = posterior.facts.get("dosages", {})
    notes = []
    for name, dosage in zip(posterior.schema.perturbations, checked.design.tolist(), strict=True):
        low, high = ranges.get(name, (1.0, 1.0))
        if dosage and not low <= dosage <= high:
            trained = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            notes.append(f"dosage {dosage:g} of '{name}' is outside the trained {trained}")
    return notes
