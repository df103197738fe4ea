"""Read the grid of a benchmark from TOML; every name, kind, setting and file in it is checked."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from cradle_pyro.errors import ConfigError, near, shown
from cradle_pyro.evaluation.grid import (
    CEILING_KIND,
    Benchmark,
    GridScreen,
    Part,
    candidates_of,
)
from cradle_pyro.evaluation.outside import check_cell_eval

__all__ = ["check_grid", "read_benchmark"]


def read_benchmark(path: str | Path, *, screens: str | Path | None = None) -> Benchmark:
    """Return the benchmark that a TOML file describes, with all of its names and settings checked.

    Parameters
    ----------
    path
        The file. Configurations are looked for one folder above and beside it; screens beside it,
        in ``$CRADLE_SCREENS`` and in `screens`.
    screens
        Folder with the files of the screens.

    Raises
    ------
    ConfigError
        If the file is missing or is not TOML, a key, kind, name or setting is unknown, or a file
        that it names is missing. No screen is read.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"Expected a TOML file with a benchmark, found nothing at '{path}'.")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is not a valid TOML file: {error}.") from None
    folders = {"folder": path.resolve().parent, "screens_folder": screens}
    own = [key for key in folders if key in values]
    if own:
        raise ConfigError(f"In '{path}': unknown key {shown(own)}; use --screens.")
    try:
        benchmark = Benchmark.model_validate(values | folders)
        check_grid(benchmark)
    except ValidationError as error:
        raise ConfigError(f"In '{path}': {_readable(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"In '{path}': {error}") from None
    return benchmark


def check_grid(benchmark: Benchmark) -> None:
    """Raise a ConfigError for names, kinds, settings or files of a grid that cannot be."""
    from cradle_pyro.baselines.learned import CANDIDATES
    from cradle_pyro.baselines.scvi_tools import check_scvi_tools

    predictors = benchmark.all_predictors
    _check_unique("screen", [one.name for one in benchmark.screens])
    _check_unique("predictor", [one.name for one in predictors])
    _check_unique("seed", [str(seed) for seed in benchmark.seeds])
    names = [one.name for one in predictors]
    if benchmark.ours not in names:
        raise ConfigError(
            f"ours = '{benchmark.ours}' is none of the predictors{near(benchmark.ours, names)}; "
            f"found {shown(names, 20)}."
        )
    known = [one.name for one in benchmark.screens]
    for predictor in predictors:
        unknown = [name for name in predictor.screens or () if name not in known]
        if unknown:
            raise ConfigError(
                f"predictor '{predictor.name}' names an unknown screen '{unknown[0]}'"
                f"{near(unknown[0], known)}; found {shown(known, 20)}."
            )
        if predictor.candidates == "default" and predictor.kind not in CANDIDATES:
            raise ConfigError(
                f"predictor '{predictor.name}': kind '{predictor.kind}' has no default "
                f"candidates; known for {shown(CANDIDATES, 20)}. List them."
            )
    budgets = {p.name: len(candidates_of(p)) for p in predictors if p.candidates}
    if len(set(budgets.values())) > 1 and not benchmark.unequal_budget:
        raise ConfigError(
            f"tuned predictors must have equally many candidates, found {budgets}. Give each as "
            "many, or set unequal_budget = true."
        )
    for screen in benchmark.screens:
        _check_unique(f"split of '{screen.name}'", [one.name for one in screen.splits])
        if screen.path is not None:
            benchmark.screen_path(screen)
        _check_tuning(benchmark, screen)
    if benchmark.cell_eval:
        check_cell_eval()
    if any(one.kind == "scvi" for one in predictors):
        check_scvi_tools()
    _check_cells(benchmark)


def _check_tuning(benchmark: Benchmark, screen: GridScreen) -> None:
    """Raise a ConfigError unless every tuned predictor of a screen is tuned somewhere."""
    if screen.tuned_on is None:
        return
    places = {one.name: one for one in benchmark.screens if one.tuned_on is None}
    if screen.tuned_on not in places:
        raise ConfigError(
            f"screen '{screen.name}': tuned_on = '{screen.tuned_on}' is no screen that is tuned "
            f"itself{near(screen.tuned_on, list(places))}; found {shown(places, 20)}."
        )
    there = benchmark.predictors_of(places[screen.tuned_on])
    missing = [p.name for p in benchmark.predictors_of(screen) if p.candidates and p not in there]
    if missing:
        raise ConfigError(
            f"screen '{screen.name}': predictor '{missing[0]}' has candidates but is not tried on "
            f"'{screen.tuned_on}', where they are to be chosen."
        )


def _check_cells(benchmark: Benchmark) -> None:
    first = benchmark.seeds[0]
    for cell in benchmark.cells():
        if cell.seed != first:
            continue  # seeds are whole numbers: one stands for all
        try:
            for chosen in candidates_of(cell.predictor) or ((),):
                if cell.predictor.kind == CEILING_KIND:
                    benchmark.screen_config(cell.screen, cell.split, cell.seed)
                else:
                    benchmark.predictor(cell, chosen)
        except ConfigError as error:
            where = f"screen '{cell.screen.name}', split '{cell.split.name}'"
            raise ConfigError(f"predictor '{cell.predictor.name}' on {where}: {error}") from None


def _check_unique(what: str, names: Iterable[str]) -> None:
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise ConfigError(f"each {what} needs a name of its own, found twice: {shown(twice)}.")


def _parts_of(annotation: Any) -> Iterator[type[Part]]:
    if isinstance(annotation, type) and issubclass(annotation, Part):
        yield annotation
    for inner in get_args(annotation):
        yield from _parts_of(inner)


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Return the keys beside the unknown one at `location`."""
    part: type[Part] = Benchmark
    for key in location[:-1]:
        if key in part.model_fields:
            part = next(_parts_of(part.model_fields[str(key)].annotation), part)
    return [key for key in part.model_fields if key not in ("folder", "screens_folder")]


def _readable(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        location = problem["loc"]
        key = ".".join(str(part) for part in location)
        if problem["type"] == "extra_forbidden":
            known = _known_keys(location)
            hint = near(str(location[-1]), known) or f"; known here: {', '.join(known)}."
            lines.append(f"unknown key '{key}'{hint}")
        elif problem["type"] == "missing":
            lines.append(f"'{key}' is missing.")
        else:
            reason = problem["msg"].removeprefix("Value error, ")
            value = problem.get("input")
            lines.append(f"'{key}': {reason}, found {_short(value)}.")
    return " ".join(lines)


def _short(value: object, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
