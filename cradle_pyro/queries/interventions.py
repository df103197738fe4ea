"""Interventions in the words of the screen: written by name, checked against a fitted model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from cradle_pyro import sites
from cradle_pyro.errors import QueryError, near, shown
from cradle_pyro.inference.pair import empty_cells
from cradle_pyro.inference.posterior import Posterior
from cradle_pyro.model.intervene import run_world
from cradle_pyro.seeding import seeded
from cradle_pyro.types import Batch, Schema

__all__ = ["FACTUAL", "TYPICAL", "CheckedIntervention", "Intervention", "check", "do", "parse_do"]

FACTUAL = "factual"
TYPICAL = "typical"
_OWN_STREAM = 0x7E57  # typical flags share no random numbers with what else a draw draws
_KEYWORDS = (sites.PERTURBATION, sites.ARTIFACT, sites.LIBRARY)

Levels = str | float | Mapping[str, float]


@dataclass(frozen=True)
class Intervention:
    """What is done to cells; made by :func:`do`, joined by ``|``.

    Parameters
    ----------
    perturbation, artifact, library, sites
        As in :func:`do`; None where nothing is done.

    Examples
    --------
    >>> print(do(perturbation="KLF1") | do(artifact=0))
    do(perturbation=KLF1, artifact=0)
    """

    perturbation: Levels | None = None
    artifact: Levels | None = None
    library: str | float | None = None
    sites: Mapping[str, Any] = field(default_factory=dict)

    def __or__(self, other: Intervention) -> Intervention:
        """Return both interventions as one.

        Raises
        ------
        QueryError
            If both act on the same site.
        """
        own, others = self._named(), other._named()
        twice = sorted(set(own) & set(others))
        if twice:
            raise QueryError(
                f"Both {self} and {other} act on {shown(twice)}. Leave one of them out: a site has "
                "one value in a world."
            )
        joined = own | others
        keywords = {name: joined.pop(name) for name in _KEYWORDS if name in joined}
        return Intervention(**keywords, sites=joined)

    def __str__(self) -> str:
        named = ", ".join(f"{name}={_spelled(value)}" for name, value in self._named().items())
        return f"do({named})"

    def _named(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in _KEYWORDS}
        return {name: value for name, value in values.items() if value is not None} | dict(
            self.sites
        )


def do(
    *,
    perturbation: str | Mapping[str, float] | None = None,
    artifact: float | str | Mapping[str, float] | None = None,
    library: float | Literal["factual"] | None = None,
    sites: Mapping[str, Tensor | float] | None = None,
) -> Intervention:
    """Return an intervention, to be asked about by the queries; names are checked there.

    What is not named follows its causes: a cell's own noise (of its flags, its library, its
    counts) is kept, and the site takes the value that this noise gives it in the other world.

    Parameters
    ----------
    perturbation
        A label ("KLF1", "KLF1+CEBPA", the control's) or dosages ({"KLF1": 0.5}); "factual" for the
        cell's own, which is also what cells keep if nothing is named.
    artifact
        0 for none; names of flags ("high_mito", "high_mito+doublet") or severities in [0, 1]
        ({"high_mito": 0.5}); "typical" for flags as failing training cells have; "factual" to hold
        the cell's own. 1 is a flag only where the model has a single one.
    library
        Total counts; "factual" to hold the cell's own.
    sites
        For modellers: values of other sites of the model, numbers or tensors that fit the site.

    Returns
    -------
    Intervention
        Several are joined by ``|``.

    Raises
    ------
    QueryError
        If a value is of a kind that cannot be.

    Examples
    --------
    >>> print(do(perturbation={"KLF1": 0.5}, library=5000))
    do(perturbation=KLF1=0.5, library=5000)
    """
    _check_kind("sites", sites, Mapping)
    given = dict(sites or {})
    wrong = [name for name in _KEYWORDS if name in given]
    if wrong:
        raise QueryError(f"Give {shown(wrong)} as a keyword of do, not among the sites.")
    _check_kind("perturbation", perturbation, str | Mapping)
    _check_kind("artifact", artifact, str | Mapping | Real)
    _check_kind("library", library, str | Real)
    if isinstance(library, str) and library != FACTUAL:
        raise QueryError(f"library is a number of counts or '{FACTUAL}', found {library!r}.")
    if isinstance(library, Real) and not 0 < float(library) < float("inf"):
        raise QueryError(f"library is a positive number of counts, found {library}.")
    for name, value in given.items():
        _check_kind(name, value, Tensor | Real)
        if not torch.isfinite(torch.as_tensor(value)).all():
            raise QueryError(f"{name} must be finite, found nan or inf in {value}.")
    for name, levels in (("perturbation", perturbation), ("artifact", artifact)):
        if isinstance(levels, Mapping):
            for part, level in levels.items():
                _check_kind(f"{name} of '{part}'", level, Real)
    return Intervention(perturbation, artifact, library, given)


def parse_do(settings: Iterable[str]) -> Intervention:
    """Return the intervention that ``site=value`` texts describe, as on the command line.

    Parameters
    ----------
    settings
        For example ``perturbation=KLF1+CEBPA``, ``perturbation=KLF1=0.5``, ``artifact=0``,
        ``artifact=high_mito``, ``library=5000``, ``z_basal=0``.

    Raises
    ------
    QueryError
        For a text without ``=`` or with an impossible value.

    Examples
    --------
    >>> print(parse_do(["perturbation=A=0.5+B", "artifact=0"]))
    do(perturbation=A=0.5+B=1, artifact=0)
    """
    result = Intervention()
    for setting in settings:
        name, equals, text = (part.strip() for part in setting.partition("="))
        if not (name and equals and text):
            raise QueryError(
                f"Expected site=value, found '{setting}'. Example: --do perturbation=KLF1+CEBPA "
                "--do artifact=0"
            )
        number = _number(text)
        if name == sites.PERTURBATION:
            one = do(perturbation=_levels(name, text))
        elif name == sites.ARTIFACT:
            one = do(artifact=_levels(name, text) if number is None else number)
        elif name == sites.LIBRARY:
            one = do(library=text if number is None else number)  # type: ignore[arg-type]
        elif number is None:
            raise QueryError(f"Site '{name}' is set to a number, found '{text}'.")
        else:
            one = do(sites={name: number})
        result = result | one
    return result


@dataclass(frozen=True)
class CheckedIntervention:
    """An intervention whose names the model knows; made by :func:`check`.

    Parameters
    ----------
    intervention
        As it was asked.
    design
        Row of the design, shape (perturbations,); None where cells keep their own.
    flags
        Row of flags or severities, shape (artifacts,), or "factual", "typical", None.
    pool
        Flag vectors of failing training cells, shape (cells, artifacts).
    local
        Further sites that have a value for each cell.
    n_cells
        Number of all cells that are asked about, if they come in chunks.
    """

    intervention: Intervention
    design: Tensor | None
    flags: Tensor | str | None
    pool: Tensor
    local: frozenset[str] = frozenset()
    n_cells: int | None = None

    def acts(
        self, batch: Batch, values: dict[str, Tensor], rows: slice | None = None
    ) -> dict[str, Tensor]:
        """Return the full-shape value of every intervened site, for the cells of `batch`.

        Typical flags depend on the seed of torch's random state alone, so that all worlds of a
        draw meet the same ones.

        Parameters
        ----------
        batch
            The factual cells, missing flags drawn.
        values
            Factual value of every site: what further sites are expanded to.
        rows
            Which of all cells the batch holds, where it does not hold all: values of further sites
            may be given for each of them.
        """
        n_cells = len(batch)
        acts: dict[str, Tensor] = {}
        if self.design is not None:
            acts[sites.PERTURBATION] = self.design.to(batch.perturbation).expand(n_cells, -1)
        elif self.intervention.perturbation == FACTUAL:
            acts[sites.PERTURBATION] = batch.perturbation
        if isinstance(self.flags, Tensor):
            acts[sites.ARTIFACT] = self.flags.to(batch.artifact).expand(n_cells, -1)
        elif self.flags == FACTUAL:
            acts[sites.ARTIFACT] = batch.artifact
        elif self.flags == TYPICAL:
            generator = torch.Generator().manual_seed(torch.initial_seed() ^ _OWN_STREAM)
            chosen = torch.randint(len(self.pool), (n_cells,), generator=generator)
            acts[sites.ARTIFACT] = self.pool[chosen].to(batch.artifact)
        library = self.intervention.library
        if library == FACTUAL:
            acts[sites.LIBRARY] = batch.library
        elif library is not None:
            acts[sites.LIBRARY] = torch.full_like(batch.library, float(library))
        for name, value in self.intervention.sites.items():
            tensor = torch.as_tensor(value).to(values[name])
            if name in self.local and self.n_cells is not None and rows is not None:
                tensor = _of_cells(name, tensor, values[name], rows, self.n_cells)
            acts[name] = _expanded(name, tensor, values[name])
        return acts


def check(
    posterior: Posterior, intervention: Intervention, n_cells: int | None = None
) -> CheckedIntervention:
    """Return `intervention` with its names looked up in the fitted model.

    Parameters
    ----------
    posterior
        A fitted pair.
    intervention
        From :func:`do`.
    n_cells
        Number of cells that are asked about, where they come in chunks.

    Raises
    ------
    QueryError
        If it names a perturbation, flag or site that the model does not have, or a value that
        cannot be.
    """
    schema = posterior.schema
    if not isinstance(intervention, Intervention):
        raise QueryError(
            f"Expected an intervention such as do(perturbation='KLF1', artifact=0), found "
            f"{type(intervention).__name__}."
        )
    local = _check_sites(posterior, intervention.sites) if intervention.sites else frozenset()
    flags = _flags(schema, intervention.artifact)
    if flags == TYPICAL and not len(posterior.failing_artifacts):
        raise QueryError("artifact='typical' needs failing training cells, and there were none.")
    return CheckedIntervention(
        intervention,
        _design(schema, intervention.perturbation),
        flags,
        posterior.failing_artifacts,
        local,
        n_cells,
    )


def label_design(schema: Schema, label: str) -> Tensor:
    """Return the design row of a label, shape (perturbations,).

    Raises
    ------
    QueryError
        If it names a perturbation the schema lacks.
    """
    if not isinstance(label, str):
        raise QueryError(
            f"A label is a text such as 'KLF1' or 'KLF1{schema.delimiter}CEBPA', found {label!r}."
        )
    names = [part.strip() for part in label.split(schema.delimiter)]
    return _design_row(schema, dict.fromkeys(names, 1.0), label)


def _design(schema: Schema, perturbation: Levels | None) -> Tensor | None:
    if perturbation is None or perturbation == FACTUAL:
        return None
    if isinstance(perturbation, str):
        return label_design(schema, perturbation)
    assert isinstance(perturbation, Mapping)
    return _design_row(schema, perturbation, _spelled(perturbation))


def _design_row(schema: Schema, dosages: Mapping[str, float], label: str) -> Tensor:
    position = {name: index for index, name in enumerate(schema.perturbations)}
    row = torch.zeros(schema.n_perturbations)
    for name, dosage in dosages.items():
        if name not in position and name != schema.control:
            raise QueryError(
                f"The model knows no perturbation '{name}' (in '{label}')"
                f"{near(name, schema.perturbations) or '.'} Known: {shown(schema.perturbations)}, "
                f"and '{schema.control}' for none."
            )
        if not 0 <= dosage < float("inf"):
            raise QueryError(f"A dosage is a number >= 0, found {dosage} for '{name}'.")
        if name != schema.control:
            row[position[name]] = dosage
    return row


def _flags(schema: Schema, artifact: Levels | None) -> Tensor | str | None:
    if artifact is None or artifact == FACTUAL:
        return artifact
    if not schema.n_artifacts:
        if artifact == 0:
            return torch.zeros(0)
        raise QueryError(
            f"artifact={_spelled(artifact)} asks for an artifact, but the model was trained without"
            " artifact flags; only 0 and 'factual' are possible."
        )
    if artifact == TYPICAL:
        return TYPICAL
    if isinstance(artifact, str):
        artifact = {name.strip(): 1.0 for name in artifact.split("+")}
    if isinstance(artifact, Real):
        if artifact == 0:
            return torch.zeros(schema.n_artifacts)
        if schema.n_artifacts > 1:
            raise QueryError(
                f"artifact={artifact:g} does not say which of the flags {shown(schema.artifacts)}. "
                "Name one, or use artifact='typical' for flags as failing cells have."
            )
        artifact = {schema.artifacts[0]: float(artifact)}
    assert isinstance(artifact, Mapping)
    row = torch.zeros(schema.n_artifacts)
    for name, severity in artifact.items():
        if name not in schema.artifacts:
            raise QueryError(
                f"The model knows no artifact flag '{name}'{near(name, schema.artifacts) or '.'} "
                f"Known: {shown(schema.artifacts, 10)}; or 0, '{FACTUAL}', '{TYPICAL}'."
            )
        if not 0 <= severity <= 1:
            raise QueryError(f"A severity lies in [0, 1], found {severity} for '{name}'.")
        row[schema.artifacts.index(name)] = severity
    return row


def _check_sites(posterior: Posterior, given: Mapping[str, Any]) -> frozenset[str]:
    """Return which sites have a value for each cell, by runs on two and on three empty cells.

    Raises unless the model has all sites and their values fit.
    """
    with seeded(0):
        values, more = (
            run_world(posterior.model, empty_batch(posterior, n), {}, {}) for n in (2, 3)
        )
    for name, value in given.items():
        if name not in values:
            raise QueryError(
                f"The model has no site '{name}'{near(name, list(values)) or '.'} Its sites: "
                f"{shown(values, len(values))}."
            )
        shape = values[name].shape
        if isinstance(value, Tensor) and value.dim() > len(shape):
            raise QueryError(
                f"Site '{name}' has {len(shape)} dimensions, found a value of shape "
                f"{tuple(value.shape)}."
            )
    return frozenset(name for name in given if values[name].shape != more[name].shape)


def empty_batch(posterior: Posterior, n_cells: int) -> Batch:
    """Return control cells without counts or artifact, at the mean library of the training set."""
    return to_pair(posterior, empty_cells(posterior.schema, posterior.statistics, n_cells))


def to_pair(posterior: Posterior, batch: Batch) -> Batch:
    """Return the batch on the pair's device and in its floating-point type (float32, if none)."""
    parameters = getattr(posterior.model, "parameters", lambda: iter(()))()
    floats = (parameter.dtype for parameter in parameters if parameter.is_floating_point())
    dtype = next(floats, torch.float32)
    values = {
        name: value.to(dtype)
        for name, value in vars(batch).items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    return batch.replace(**values).to(posterior.device)


def _of_cells(name: str, value: Tensor, like: Tensor, rows: slice, n_cells: int) -> Tensor:
    """Return the values of the cells at `rows`, where there is one for each of `n_cells`."""
    if value.dim() < like.dim() or len(value) == 1:
        return value
    if len(value) != n_cells:
        raise QueryError(
            f"Site '{name}' has a value for each of {n_cells} cells, which a value of shape "
            f"{tuple(value.shape)} does not fit."
        )
    return value[rows]


def _expanded(name: str, value: Tensor, like: Tensor) -> Tensor:
    try:
        return value.expand(like.shape)
    except RuntimeError:
        raise QueryError(
            f"Site '{name}' has shape {tuple(like.shape)}, which a value of shape "
            f"{tuple(value.shape)} does not fit."
        ) from None


def _check_kind(name: str, value: object, kinds: Any) -> None:
    if value is not None and not isinstance(value, kinds):
        raise QueryError(
            f"{name} cannot be a {type(value).__name__}: {value!r}. See help(cradle_pyro.do)."
        )


def _levels(name: str, text: str) -> str | dict[str, float]:
    """Return a label as it is, or ``A=0.5+B`` as levels."""
    if "=" not in text:
        return text
    levels = {}
    for part in text.split("+"):
        key, equals, level = (piece.strip() for piece in part.partition("="))
        value = _number(level) if equals else 1.0
        if value is None or not key:
            raise QueryError(f"Expected {name} levels such as A=0.5+B=1, found '{text}'.")
        if key in levels:
            raise QueryError(f"Expected one {name} level of each, found '{key}' twice in '{text}'.")
        levels[key] = value
    return levels


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _spelled(value: Any) -> str:
    if isinstance(value, Mapping):
        return "+".join(f"{name}={level:g}" for name, level in value.items()) or "{}"
    if isinstance(value, Tensor):
        return f"{value.item():g}" if value.numel() == 1 else f"tensor{tuple(value.shape)}"
    return f"{value:g}" if isinstance(value, Real) else str(value)
