"""The grid of a benchmark: screens x splits x predictors x seeds, read from TOML and checked.

Nothing here reads a screen or trains; see :mod:`cradle_pyro.evaluation.benchmark`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from cradle_pyro.config import Config
from cradle_pyro.data.public import PUBLIC_SCREENS
from cradle_pyro.errors import ConfigError, near, shown
from cradle_pyro.simulate.perturbseq import ARTIFACT_KINDS, simulate_perturbseq

if TYPE_CHECKING:
    from cradle_pyro.baselines.predictor import Predictor

__all__ = [
    "BASELINE_KINDS",
    "CEILING_KIND",
    "Benchmark",
    "Cell",
    "Corruption",
    "GridPredictor",
    "GridScreen",
    "GridSplit",
    "Kept",
    "Part",
    "candidates_of",
]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+=-]*$")]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Cells = Literal["all", "passing"]

CEILING_KIND = "ceiling"
"""Kind of the row that every block of a table has: how well the reference agrees with itself."""

_BASELINES: tuple[tuple[str, str, Cells], ...] = (
    ("no_change", "no_change", "passing"),
    ("global_mean", "global_mean", "passing"),
    ("training_mean_all", "training_mean", "all"),
    ("training_mean_passing", "training_mean", "passing"),
    ("additive", "additive", "passing"),
    ("empirical_bayes", "empirical_bayes", "passing"),
)
BASELINE_KINDS = tuple(dict.fromkeys(kind for _, kind, _ in _BASELINES))
"""Kinds of the predictors that are always there, and fit in a moment."""

_LEARNED_SECTIONS = ("model", "guide", "objective", "train")
_SCREENS = "CRADLE_SCREENS"


class Part(BaseModel):
    """A part of a benchmark: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class GridSplit(Part):
    """A way to divide a screen: a name and settings, for example of each left-out pair."""

    name: Name = "default"
    settings: tuple[str, ...] = ()


class Corruption(Part):
    """Known artifacts added to passing cells that are learned from; test cells stay as they are.

    `kinds`, `share` and `degree` as in :func:`~cradle_pyro.simulate.corrupt.corrupt`; columns with
    whole-transcriptome totals come from the configuration of the screen.
    """

    share: Share
    kinds: Annotated[tuple[str, ...], Field(min_length=1)] = ARTIFACT_KINDS
    degree: tuple[float, float] = (0.5, 0.95)

    @model_validator(mode="after")
    def _knows_its_kinds(self) -> Corruption:
        wrong = [kind for kind in self.kinds if kind not in ARTIFACT_KINDS]
        if wrong:
            hint = near(wrong[0], ARTIFACT_KINDS) or f"; known: {', '.join(ARTIFACT_KINDS)}"
            raise ValueError(f"no kind of artifact '{wrong[0]}'{hint}")
        return self


class Kept(Part):
    """What is left of a screen to learn from, chosen by the seed.

    `cells_per_perturbation`: most training cells of a label (controls stay), and validation cells
    in proportion. `train_pairs`: share of all combinations that stay in training; test
    combinations stay the same ones, and those in neither are gone.
    """

    cells_per_perturbation: PositiveInt | None = None
    train_pairs: Share | None = None


class GridScreen(Part):
    """A screen: simulated with these arguments, or read from a file.

    `tuned_on` names another screen whose choices of settings are taken over here. `judged_on`
    validation cells (to choose defaults by): test cells are left out, validation cells are in their
    place, and as many training cells as those were are in the place of validation cells.
    """

    name: Name
    simulate: dict[str, int | float] | None = None
    path: str | None = None
    public: str | None = None
    config: str | None = None
    settings: tuple[str, ...] = ()
    splits: Annotated[tuple[GridSplit, ...], Field(min_length=1)] = (GridSplit(),)
    corrupt: Corruption | None = None
    keep: Kept = Kept()
    tuned_on: str | None = None
    judged_on: Literal["test", "validation"] = "test"

    @property
    def tuning(self) -> str:
        """The screen on which settings are chosen."""
        return self.tuned_on or self.name

    @model_validator(mode="after")
    def _has_one_source(self) -> GridScreen:
        if (self.simulate is None) == (self.path is None):
            raise ValueError("a screen needs either simulate = {...} or path = 'FILE.h5ad'")
        known = [name for name in signature(simulate_perturbseq).parameters if name != "seed"]
        wrong = [name for name in self.simulate or () if name not in known]
        if wrong:
            hint = near(wrong[0], known) or f"; known: {', '.join(known)}"
            raise ValueError(f"no argument '{wrong[0]}' of simulate_perturbseq{hint}")
        if self.public is not None and self.public not in PUBLIC_SCREENS:
            raise ValueError(
                f"no published screen '{self.public}'; known: {', '.join(PUBLIC_SCREENS)}"
            )
        return self


class GridPredictor(Part):
    """A predictor: `kind` as in ``make_predictor``, and what distinguishes it from others.

    `config`: a file whose sections model, guide, objective and train replace the screen's.
    `candidates`: lists of settings to choose from on validation cells, or "default".
    `diagnostics`: as in `Benchmark`, whose value it overrides. `assisted`: predictions for
    observed cells are corrected by what training cells show beyond the model.
    """

    name: Name
    kind: str
    config: str | None = None
    settings: tuple[str, ...] = ()
    cells: Cells | None = None
    candidates: tuple[tuple[str, ...], ...] | Literal["default"] = ()
    screens: tuple[str, ...] | None = None
    diagnostics: bool | None = None
    assisted: bool = False


class Cell(NamedTuple):
    """One cell of the grid."""

    screen: GridScreen
    split: GridSplit
    seed: int
    predictor: GridPredictor

    def __str__(self) -> str:
        return f"{self.screen.name}/{self.split.name}/{self.seed}/{self.predictor.name}"


class Benchmark(Part):
    """A grid and how it is compared.

    `ours` names the predictor that is compared with every other. With `baselines` the simple
    predictors are added, unless the grid names them itself; ceilings always are. Predictors with
    candidates must have equally many of them unless `unequal_budget`. With `diagnostics`, models
    are checked beside their effects: density, leakage, soundness, calibration. With `effects`,
    predicted and reference effects of every cell are kept for other scorers. `cell_eval` names the
    seeds under which that program scores generated cells, too.
    """

    name: Name
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0, 1, 2, 3, 4)
    tune_seed: NonNegativeInt | None = None
    ours: str = "cradle"
    baselines: bool = True
    unequal_budget: bool = False
    diagnostics: bool = True
    effects: bool = False
    cell_eval: tuple[NonNegativeInt, ...] = ()
    screens: Annotated[tuple[GridScreen, ...], Field(min_length=1)]
    predictors: tuple[GridPredictor, ...] = ()
    folder: Path = Path()
    screens_folder: Path | None = None

    @cached_property
    def all_predictors(self) -> tuple[GridPredictor, ...]:
        """The ceiling, simple baselines and the predictors of the grid, in the order of tables."""
        named = {one.name for one in self.predictors}
        simple = [
            GridPredictor(name=name, kind=kind, cells=cells)
            for name, kind, cells in (_BASELINES if self.baselines else ())
            if name not in named
        ]
        ceiling = GridPredictor(name=CEILING_KIND, kind=CEILING_KIND)
        return (ceiling, *simple, *self.predictors)

    @property
    def tuning_seed(self) -> int:
        """The seed on which settings are chosen."""
        return self.seeds[0] if self.tune_seed is None else self.tune_seed

    def predictors_of(self, screen: GridScreen) -> list[GridPredictor]:
        """Return the predictors that are tried on a screen."""
        return [p for p in self.all_predictors if p.screens is None or screen.name in p.screens]

    def cells(self) -> Iterator[Cell]:
        """Yield the cells of the grid, screen by screen, split by split, seed by seed."""
        for screen in self.screens:
            for split in screen.splits:
                for seed in self.seeds:
                    for predictor in self.predictors_of(screen):
                        yield Cell(screen, split, seed, predictor)

    def is_diagnosed(self, predictor: GridPredictor) -> bool:
        """Return whether a predictor is checked beside its effects."""
        return self.diagnostics if predictor.diagnostics is None else predictor.diagnostics

    def screen_config(self, screen: GridScreen, split: GridSplit, seed: int) -> Config:
        """Return the configuration of a screen under a split and a seed.

        Raises
        ------
        ConfigError
            If its file is missing, or a setting is unknown or impossible.
        """
        start = (
            Config() if screen.config is None else Config.from_toml(self.config_file(screen.config))
        )
        seeds = (f"split.seed={seed}", f"train.seed={seed}")
        return start.with_settings([*screen.settings, *split.settings, *seeds])

    def predictor(self, cell: Cell, chosen: Iterable[str] = ()) -> tuple[Predictor, Config]:
        """Return a cell's predictor, not fitted, and the configuration that it is fitted with.

        Parameters
        ----------
        cell
            A cell of this grid, no ceiling.
        chosen
            Settings that tuning chose.

        Raises
        ------
        ConfigError
            As in `screen_config`; if there is no such kind, or the settings of the predictor would
            change the screen.
        """
        from cradle_pyro.baselines.learned import make_predictor

        base = self.screen_config(cell.screen, cell.split, cell.seed)
        config, spec = base, cell.predictor
        if spec.config is not None:
            other = Config.from_toml(self.config_file(spec.config))
            config = config.model_copy(
                update={name: getattr(other, name) for name in _LEARNED_SECTIONS}
            )
        settings = [*spec.settings, *chosen, f"train.seed={cell.seed}"]
        _check_screen_kept(base, config.with_settings(settings))
        cells = {} if spec.cells is None else {"cells": spec.cells}
        predictor = make_predictor(
            spec.kind, name=spec.name, config=config, settings=settings, assisted=spec.assisted,
            **cells,
        )  # fmt: skip
        return predictor, getattr(predictor, "config", config.with_settings(settings))

    def screen_path(self, screen: GridScreen) -> Path:
        """Return the file of a screen that is not simulated.

        Raises
        ------
        ConfigError
            If it is in none of the folders; the message says which, and where to get the file.
        """
        assert screen.path is not None
        folders = [self.folder]
        if self.screens_folder is not None:
            folders.insert(0, self.screens_folder)
        if os.environ.get(_SCREENS):
            folders.append(Path(os.environ[_SCREENS]))
        for folder in folders:
            if (folder / screen.path).exists():
                return folder / screen.path
        hint = ""
        if screen.public is not None:
            source = PUBLIC_SCREENS[screen.public].source
            hint = (
                f" Get it from {source}, read it with cradle_pyro.read_public("
                f"'{screen.public}', PATH) and write it there with write_h5ad."
            )
        raise ConfigError(
            f"Screen '{screen.name}': no file '{screen.path}' in "
            f"{' or '.join(map(str, folders))} (see --screens and {_SCREENS}).{hint}"
        )

    def config_file(self, name: str) -> Path:
        """Return a configuration file, in the folder above this one's or beside it.

        Raises
        ------
        ConfigError
            If it is in neither.
        """
        places = [self.folder.parent / name, self.folder / name]
        found = [place for place in places if place.is_file()]
        if not found:
            raise ConfigError(
                f"no configuration file '{name}' in {' or '.join(str(p.parent) for p in places)}."
            )
        return found[0]


def candidates_of(predictor: GridPredictor) -> tuple[tuple[str, ...], ...]:
    """Return the lists of settings that tuning chooses from; none without tuning."""
    from cradle_pyro.baselines.learned import CANDIDATES

    if predictor.candidates == "default":
        return tuple(tuple(settings) for settings in CANDIDATES[predictor.kind])
    return predictor.candidates


def _check_screen_kept(base: Config, config: Config) -> None:
    data = config.data.model_copy(update={"artifact": base.data.artifact})
    fixed = {"data": data, "qc": config.qc, "split": config.split}
    moved = [name for name, value in fixed.items() if value != getattr(base, name)]
    if moved:
        raise ConfigError(
            f"settings may not change the screen, found changes of {shown(moved)}. Only "
            "data.artifact may differ between predictors; make it another screen or split."
        )
