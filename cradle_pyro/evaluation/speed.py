"""How fast and how large: all cases of the speed benchmark, each in a process of its own.

So its memory is its own, and the naive way is not served by what ours asks of the C library.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import pandas as pd
import torch

from cradle_pyro.data.fields import write_text_atomic
from cradle_pyro.errors import CradleError, DataWarning
from cradle_pyro.evaluation import timings
from cradle_pyro.evaluation.timings import NAIVE, ROUNDS, VARIANTS
from cradle_pyro.seeding import seeded
from cradle_pyro.simulate.perturbseq import DEMO_SETTINGS

__all__ = ["PARTS", "Case", "Figure", "cases_of", "run_case", "run_speed"]

_GIGA: Final = 1e9
_NAIVE_EPOCHS: Final = 100
_PATIENCE: Final = 30


class Case(NamedTuple):
    """One process's work: a part, a name within it, and what the part is told."""

    part: str
    name: str
    options: dict[str, Any]


class Figure(NamedTuple):
    """A measured figure, in the unit that its name ends with."""

    part: str
    case: str
    figure: str
    value: float


PARTS: Final[dict[str, Callable[..., dict[str, float]]]] = {
    "published step": timings.published_steps,
    "published memory": timings.published_memory,
    "default step": timings.default_step,
    "time to loss": timings.time_to_loss,
    "screen": timings.query_screen,
    "annotation": timings.annotation,
    "evaluation": timings.evaluation,
    "effects": timings.many_effects,
    "roofline": timings.roofline,
}


def cases_of(folder: Path, *, smoke: bool = False, device: str = "cpu") -> list[Case]:
    """Return all cases, or small ones that only show that everything runs.

    Parameters
    ----------
    folder
        Where simulated screens are kept.
    smoke
        Small sizes.
    device
        Of steps. On another than ``"cpu"`` nothing else is measured.
    """
    steps = _step_cases(device, smoke=smoke)
    return steps if device != "cpu" else [*steps, *_screen_cases(folder, smoke=smoke)]


def _step_cases(device: str, *, smoke: bool) -> list[Case]:
    n_genes, rounds = (60, 1) if smoke else (5000, ROUNDS)
    published: dict[str, Any] = {"n_genes": n_genes, "device": device}
    if smoke:
        published |= {"n_cells": 64, "n_perturbations": 5, "n_latents": 4, "hidden": 8}
    cases = [
        Case("published memory", name, published | {"variant": name}) for name in (NAIVE, *VARIANTS)
    ]
    cases.append(Case("published step", "side by side", published | {"rounds": rounds}))
    default = {"n_cells": 128, "rounds": rounds, "device": device}
    for genes in (30, 60) if smoke else (1000, 5000, 20000):
        options = default | {"n_genes": genes, "n_perturbations": 100}
        cases.append(Case("default step", f"{genes} genes", options))
    for perturbations in (5, 300) if smoke else (25, 100, 2000):
        options = default | {"n_genes": n_genes, "n_perturbations": perturbations}
        cases.append(Case("default step", f"{perturbations} perturbations", options))
    return [*cases, Case("roofline", "published sizes", published)]


def _screen_cases(folder: Path, *, smoke: bool) -> list[Case]:
    kept: dict[str, Any] = {"folder": str(folder), "n_genes": 5000, "n_perturbations": 100}
    smallest, *larger = 50_000, 200_000, 1_000_000
    annotated = {"n_cells": 100_000, "naive_cells": 500}
    many = {"n_cells": 50_000, "n_perturbations": 2000, "draws": 10, "query_cells": 100}
    loss: dict[str, Any] = {"epochs": _NAIVE_EPOCHS, "patience": _PATIENCE, "screen": {"seed": 0}}
    if smoke:
        kept |= {"n_genes": 60, "n_perturbations": 5}
        smallest, *larger = 300, 600
        annotated = {"n_cells": 300, "naive_cells": 20}
        many = {"n_cells": 300, "n_perturbations": 6, "draws": 2, "query_cells": 5}
        demo = {"n_cells": 300, "n_genes": 40, "n_perturbations": 4, "n_pairs": 2, "seed": 0}
        loss = {"epochs": 2, "patience": 2, "screen": demo}
        loss |= {"n_latents": 4, "hidden": 8, "n_cells": 64}
    one = kept | {"n_cells": smallest}
    on_disk = [
        Case("screen", f"{n:,} cells on disk", kept | {"n_cells": n, "backed": True})
        for n in (smallest, *larger)
    ]
    return [
        Case("screen", f"{smallest:,} cells in memory", one | {"backed": False}),
        *on_disk,
        Case("annotation", f"{annotated['n_cells']:,} cells", kept | annotated),
        Case("evaluation", f"{smallest:,} cells, evaluated", one),
        Case("effects", f"{many['n_perturbations']:,} perturbations", kept | many),
        Case("time to loss", "demo screen", loss | {"settings": [*DEMO_SETTINGS]}),
    ]


def run_case(case: Case) -> list[Figure]:
    """Measure a case in this process; the most memory it took comes last."""
    torch.set_num_threads(os.cpu_count() or 1)
    before = _peak_memory()
    with seeded(0), warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # simulated screens are what they are
        found = PARTS[case.part](**case.options)
    peak = _peak_memory()
    figures = found | {"peak memory, GB": peak, "above the imports, GB": peak - before}
    if case.options.get("device", "cpu") != "cpu":
        figures["GPU memory, GB"] = torch.cuda.max_memory_allocated() / _GIGA
    return [Figure(case.part, case.name, name, float(value)) for name, value in figures.items()]


def _peak_memory() -> float:
    """Return the most memory that this process has had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIGA


def run_speed(
    out: str | Path,
    *,
    smoke: bool = False,
    device: str = "cpu",
    say: Callable[[str], object] = lambda _: None,
) -> pd.DataFrame:
    """Measure every case in a process of its own; what is there from before is kept.

    Parameters
    ----------
    out
        Directory for ``speed.csv`` and the simulated screens.
    smoke
        Small sizes, whose numbers mean nothing.
    device
        ``"cpu"``, or ``"cuda"`` for steps, their memory and the roofline of a GPU.
    say
        Called with a line for each case.

    Returns
    -------
    DataFrame
        Columns part, case, figure and value.

    Raises
    ------
    CradleError
        If a case fails, or there is no such device.
    """
    if device not in ("cpu", "cuda"):
        raise CradleError(f"Expected device 'cpu' or 'cuda', found '{device}'.")
    if device == "cuda" and not torch.cuda.is_available():
        raise CradleError("Expected a GPU for device 'cuda', found none. Leave it out.")
    out = Path(out)
    folder = out / "screens"
    folder.mkdir(parents=True, exist_ok=True)
    path = out / "speed.csv"
    known = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=list(Figure._fields))
    for case in cases_of(folder, smoke=smoke, device=device):
        if ((known["part"] == case.part) & (known["case"] == case.name)).any():
            continue
        say(f"{case.part}: {case.name}")
        figures = pd.DataFrame(_in_a_process(case), columns=list(Figure._fields))
        known = figures if known.empty else pd.concat([known, figures], ignore_index=True)
        write_text_atomic(path, known.to_csv(index=False))
    return known


def _in_a_process(case: Case) -> list[Figure]:
    command = [sys.executable, "-m", "cradle_pyro.evaluation.speed", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise CradleError(f"Measuring '{case.part}: {case.name}' failed: {last[0]}")
    return [Figure(*row) for row in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    """Measure the case that is given as JSON, and print its figures as JSON."""
    warnings.simplefilter("ignore")
    sys.stdout.write(json.dumps(run_case(Case(*json.loads(sys.argv[1])))) + "\n")


if __name__ == "__main__":
    main()
