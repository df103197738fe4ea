"""The command line: each command calls one library function and says what it wrote."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.markup import escape

from cradle_pyro.errors import CradleError, DataWarning

if TYPE_CHECKING:
    from cradle_pyro.config import Config
    from cradle_pyro.inference.posterior import Posterior

__all__ = ["app", "main"]

_USER_MISTAKE = 2

cli = typer.Typer(
    name="cradle-pyro",
    help="Perturbation effects of single-cell CRISPR screens, freed from technical artifacts.\n\n"
    "A screen goes through simulate (or your own h5ad), annotate, train and evaluate; then ask the "
    "run with query and effects, and send a report. "
    "Try everything at once with: cradle-pyro demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _leave_warnings_out(quiet: bool) -> bool:
    if quiet:
        warnings.simplefilter("ignore", DataWarning)
    return quiet


Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print nothing but errors.", callback=_leave_warnings_out),
]
Settings = Annotated[
    Optional[list[str]],
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting; may be repeated."),
]
ConfigFile = Annotated[
    Optional[Path],
    typer.Option("--config", help="TOML file with settings; it sets exactly what the flags set."),
]
Screen = Annotated[
    Path, typer.Argument(metavar="DATA.h5ad", help="The screen.", show_default=False)
]

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.", show_default=False)]


def _console(quiet: bool) -> Console:
    return Console(quiet=quiet, highlight=False, soft_wrap=True)


@cli.command()
def simulate(
    out: Annotated[Path, typer.Option("--out", help="h5ad file to write.")],
    cells: Annotated[int, typer.Option(help="Number of cells.", min=20)] = 6000,
    genes: Annotated[int, typer.Option(help="Number of genes.", min=20)] = 1000,
    perturbations: Annotated[int, typer.Option(help="Single perturbations.", min=2)] = 24,
    pairs: Annotated[int, typer.Option(help="Pairs of perturbations.", min=0)] = 12,
    seed: Annotated[int, typer.Option(help="Seed.", min=0)] = 0,
    quiet: Quiet = False,
) -> None:
    """Write a simulated screen with known truth, artifacts included.

    Example: cradle-pyro simulate --out screen.h5ad --cells 3000
    """
    from cradle_pyro.data.fields import check_target, write_h5ad_atomic
    from cradle_pyro.simulate.perturbseq import simulate_perturbseq

    check_target(out)
    adata = simulate_perturbseq(
        n_cells=cells, n_genes=genes, n_perturbations=perturbations, n_pairs=pairs, seed=seed
    )
    write_h5ad_atomic(adata, out)
    _console(quiet).print(f"Wrote {out}: {adata.n_obs:,} cells x {adata.n_vars:,} genes.")


@cli.command()
def annotate(
    data: Screen,
    out: Annotated[Path, typer.Option("--out", help="h5ad file to write.")],
    n_mads: Annotated[
        Optional[float],
        typer.Option(help="Distance from the median, in MADs, at which a cell is flagged."),
    ] = None,
    fit_on: Annotated[
        Optional[str],
        typer.Option(help="Cells that thresholds are fitted on, as column=value; default all."),
    ] = None,
    layer: Annotated[Optional[str], typer.Option(help="Layer with raw counts; default X.")] = None,
    config: ConfigFile = None,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Flag cells that fail quality control; no cell is dropped.

    Example: cradle-pyro annotate screen.h5ad --out annotated.h5ad --n-mads 3
    """
    from cradle_pyro.data.fields import (
        BackedCounts,
        check_target,
        read_counts,
        read_screen,
        write_annotated_copy,
        write_h5ad_atomic,
    )
    from cradle_pyro.data.prepare import annotate as annotate_as_configured

    flags = {"qc.n_mads": n_mads, "data.layer": layer}
    resolved = _config(config, settings, flags)
    check_target(out)
    backed = resolved.data.backed if data.is_file() else False  # zarr stores are read whole
    adata = read_screen(data, backed=backed, layer=resolved.data.layer)
    annotate_as_configured(adata, resolved.data, resolved.qc, fit_on=fit_on)
    if isinstance(read_counts(adata, resolved.data.layer), BackedCounts):
        write_annotated_copy(adata, data, out)
    else:
        write_h5ad_atomic(adata, out)
    share = adata.obs["cradle_artifact"].mean()
    _console(quiet).print(
        f"Wrote {out}: {share:.1%} of {adata.n_obs:,} cells carry an artifact flag."
    )


@cli.command()
def train(
    data: Screen,
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="Run directory to write.")],
    config: ConfigFile = None,
    settings: Settings = None,
    perturbation_key: Annotated[
        Optional[str], typer.Option(help="Column with perturbation labels.")
    ] = None,
    control: Annotated[Optional[str], typer.Option(help="Label of control cells.")] = None,
    layer: Annotated[Optional[str], typer.Option(help="Layer with raw counts; default X.")] = None,
    library_key: Annotated[
        Optional[str],
        typer.Option(help="Column with the whole-transcriptome total, for gene panels."),
    ] = None,
    covariate_key: Annotated[
        Optional[list[str]], typer.Option(help="Categorical column; may be repeated.")
    ] = None,
    split_key: Annotated[
        Optional[str], typer.Option(help="Column with train, val and test.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in RUN.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Train a model on a screen and write a run directory.

    Cells without artifact flags are annotated first, with thresholds from training cells.

    Example: cradle-pyro train annotated.h5ad --out runs/a --set train.max_epochs=30
    """
    from cradle_pyro.inference.loop import is_first_process
    from cradle_pyro.workflow import train_run

    quiet = _leave_warnings_out(quiet or not is_first_process())

    flags = {
        "data.perturbation_key": perturbation_key,
        "data.control": control,
        "data.layer": layer,
        "data.library_key": library_key,
        "data.covariate_keys": covariate_key or None,
        "split.key": split_key,
        "split.method": "column" if split_key else None,
    }
    resolved = _config(config, settings, flags)
    posterior = train_run(data, out, resolved, resume=resume, progress=not quiet)
    _console(quiet).print(_training_summary(posterior, out))


@cli.command()
def evaluate(
    run: Run,
    out: Annotated[
        Optional[Path], typer.Option("--out", help="JSON file; default RUN/metrics.json.")
    ] = None,
    data: Annotated[
        Optional[Path], typer.Option("--data", help="The screen; default the path in the run.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Score a run on held-out cells, beside ceilings and simple baselines.

    Example: cradle-pyro evaluate runs/a --out metrics.json
    """
    from cradle_pyro.reporting.table import render
    from cradle_pyro.workflow import evaluate_run

    evaluation, path = evaluate_run(run, data=data, out=out)
    console = _console(quiet)
    for table in render(evaluation):
        console.print(table)
    console.print(f"Wrote {path}.")


@cli.command()
def query(
    run: Run,
    cells: Annotated[Path, typer.Option("--cells", help="h5ad file with the cells to ask about.")],
    act: Annotated[
        list[str],
        typer.Option(
            "--do",
            metavar="SITE=VALUE",
            help="What is done: perturbation=A+B (or A=0.5, control), artifact=0 (or flag names, "
            "typical), library=5000; factual holds each cell's own. May be repeated.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="h5ad file to write.")],
    draws: Annotated[int, typer.Option(help="Posterior draws of each cell.", min=1)] = 20,
    count_draws: Annotated[
        int, typer.Option(help="How many draws of the counts to keep.", min=0)
    ] = 1,
    seed: Annotated[int, typer.Option(help="Seed.", min=0)] = 0,
    quiet: Quiet = False,
) -> None:
    """Ask what each cell would have been under an intervention (its counterfactual).

    What is not named follows its causes with the cell's own noise.

    Example: cradle-pyro query runs/a --cells cells.h5ad --do artifact=0 --out clean.h5ad
    """
    from cradle_pyro.queries.interventions import parse_do
    from cradle_pyro.workflow import query_run

    answer = query_run(
        run, cells, parse_do(act), out, draws=draws, count_draws=count_draws, seed=seed,
        progress=not quiet,
    )  # fmt: skip
    _console(quiet).print(
        f"Wrote {out}: {answer.n_obs:,} cells x {answer.n_vars:,} genes under "
        f"{escape(answer.uns['cradle_query']['intervention'])}; layers "
        f"{', '.join(sorted(answer.layers))}."
    )


@cli.command()
def effects(
    run: Run,
    out: Annotated[Path, typer.Option("--out", help="h5ad file to write.")],
    perturbation: Annotated[
        Optional[list[str]],
        typer.Option(help="A label such as A or A+B; may be repeated. Default: all of the screen."),
    ] = None,
    total: Annotated[
        bool,
        typer.Option(
            "--total", help="Let failing cells be part of the effect; default artifact=0."
        ),
    ] = False,
    draws: Annotated[int, typer.Option(help="Posterior draws.", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="Seed.", min=0)] = 0,
    quiet: Quiet = False,
) -> None:
    """Write average effects on every gene, with intervals and false sign rates.

    Example: cradle-pyro effects runs/a --perturbation KLF1+CEBPA --out effects.h5ad
    """
    from cradle_pyro.queries.calls import CALL_RATE
    from cradle_pyro.workflow import effects_run

    table = effects_run(
        run, out, perturbation, kind="total" if total else "direct", draws=draws, seed=seed,
        progress=not quiet,
    )  # fmt: skip
    n_called = int((table.layers["s_value"] <= CALL_RATE).sum())
    _console(quiet).print(
        f"Wrote {out}: {table.n_obs:,} perturbations x {table.n_vars:,} genes, {n_called:,} "
        f"effects called at an expected false sign rate of {CALL_RATE:.0%}."
    )


@cli.command()
def report(
    run: Run,
    out: Annotated[
        Optional[Path], typer.Option("--out", help="HTML file; default RUN/report.html.")
    ] = None,
    data: Annotated[
        Optional[Path], typer.Option("--data", help="The screen; default the path in the run.")
    ] = None,
    draws: Annotated[int, typer.Option(help="Posterior draws of the effects.", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="Seed.", min=0)] = 0,
    quiet: Quiet = False,
) -> None:
    """Write one page to send to a colleague: quality, effects, evaluation, calibration.

    The page is a single HTML file that needs no network.

    Example: cradle-pyro report runs/a --out report.html
    """
    from cradle_pyro.workflow import report_run

    path = report_run(run, data=data, out=out, draws=draws, seed=seed, progress=not quiet)
    size = path.stat().st_size / 1e6
    _console(quiet).print(f"Wrote {path}: one page of {size:.1f} MB. Open it in a browser.")


@cli.command()
def sweep(
    data: Screen,
    out: Annotated[Path, typer.Option("--out", help="Directory to write.")],
    vary: Annotated[
        Optional[list[str]],
        typer.Option(help="section.key=value,value,... to try; may be repeated.  [required]"),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of training for each setting.", min=1)] = 1,
    jobs: Annotated[int, typer.Option(help="Runs at a time.", min=1)] = 1,
    config: ConfigFile = None,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Train with many settings and seeds, side by side, and compare their validation losses.

    Runs that are there already are kept, so that a stopped sweep goes on. A run that fails is
    listed at the end, and the exit code is 1.

    Example: cradle-pyro sweep annotated.h5ad --out sweeps/a --vary model.n_latents=8,16 --seeds 3
    """
    from cradle_pyro.sweeps import summary, sweep, varied_from

    varied = varied_from(vary or [])
    console = _console(quiet)
    table = sweep(
        data, out, varied, _config(config, settings, {}), seeds=range(seeds), jobs=jobs,
        progress=not quiet,
    )  # fmt: skip
    console.print(summary(table, list(varied)).to_string(float_format="{:.2f}".format))
    console.print(f"Wrote {out}: sweep.csv, and {len(table)} run directories in runs.")
    failed = table[table["failed"] != ""]
    if len(failed):
        errors = Console(stderr=True, highlight=False, soft_wrap=True)
        errors.print(f"[red]{len(failed)} runs failed:[/red]")
        for _, row in failed.iterrows():
            where = ", ".join(f"{name}={row[name]}" for name in (*varied, "seed"))
            errors.print(escape(f"  {where}: {row['failed']}"))
        raise typer.Exit(1)


benchmarks = typer.Typer(invoke_without_command=True)
cli.add_typer(benchmarks, name="benchmark")


@benchmarks.callback()
def benchmark(
    context: typer.Context,
    config: Annotated[
        Optional[Path], typer.Option("--config", help="TOML file with the grid.  [required]")
    ] = None,
    out: Annotated[
        Optional[Path], typer.Option("--out", help="Directory to write.  [required]")
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Processes at a time, each on one thread.", min=1)
    ] = 1,
    screens: Annotated[
        Optional[Path],
        typer.Option("--screens", help="Folder with the screens; default $CRADLE_SCREENS."),
    ] = None,
    gather: Annotated[
        bool, typer.Option("--gather", help="Compute nothing: tables of what is there so far.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Compare predictors on screens over splits and seeds, and write tables and a page.

    What is there from before is kept if it still fits, so that a stopped benchmark goes on. A part
    that fails is listed at the end, and the exit code is 1.

    Example: cradle-pyro benchmark --config configs/benchmarks/smoke.toml --out tables/smoke
    """
    from cradle_pyro.evaluation.benchmark import gather_benchmark, run_benchmark
    from cradle_pyro.evaluation.grid_file import read_benchmark
    from cradle_pyro.reporting.benchmark_page import write_benchmark_report

    if context.invoked_subcommand is not None:
        return
    if config is None or out is None:
        missing = "--config" if config is None else "--out"
        raise typer.BadParameter(f"Missing option '{missing}'.")
    console = _console(quiet)
    grid = read_benchmark(config, screens=screens)
    if gather:
        found = gather_benchmark(grid, out)
    else:
        found = run_benchmark(grid, out, workers=workers, progress=not quiet, say=console.print)
    page = write_benchmark_report(grid, found, out)
    console.print(
        f"Wrote {out}: scores.csv, labels.csv, normalised.csv, comparisons.csv, report.md, "
        f"{page.name}."
    )
    if found.failures:
        errors = Console(stderr=True, highlight=False, soft_wrap=True)
        errors.print(f"[red]{len(found.failures)} cells failed:[/red]")
        for name, reason in found.failures.items():
            errors.print(escape(f"  {name}: {reason}"))
        raise typer.Exit(1)


@benchmarks.command()
def speed(
    out: Annotated[Path, typer.Option("--out", help="Directory to write.")],
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Small sizes, to see it run; its numbers mean nothing.")
    ] = False,
    device: Annotated[
        str, typer.Option("--device", help="cuda measures training steps on a GPU, only these.")
    ] = "cpu",
    quiet: Quiet = False,
) -> None:
    """Measure steps, epochs, queries and QC, beside the published way of doing them.

    The largest screen has a million cells: it takes long, and gigabytes of disk. What is there from
    before is kept, so that it can be stopped.

    Example: cradle-pyro benchmark speed --out tables/speed
    """
    from cradle_pyro.evaluation.speed import run_speed
    from cradle_pyro.reporting.speed_page import write_speed_report

    console = _console(quiet)
    figures = run_speed(out, smoke=smoke, device=device, say=console.print)
    page = write_speed_report(figures, out)
    console.print(f"Wrote {out}: speed.csv, speed.md, {page.name}.")


@cli.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory to write.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed.", min=0)] = 0,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A small screen and short training, to see it run.")
    ] = False,
    config: ConfigFile = None,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Simulate, annotate, train and evaluate a screen, and ask it: the whole story in minutes.

    Example: cradle-pyro demo --out demo
    """
    from cradle_pyro.reporting.table import render, render_frame
    from cradle_pyro.workflow import run_demo

    console = _console(quiet)
    resolved = _config(config, settings, {}) if config or settings else None
    found = run_demo(out, resolved, seed=seed, smoke=smoke, progress=not quiet, say=console.print)
    for table in render(found.evaluation):
        console.print(table)
    for title, frame in found.answers.items():
        console.print(render_frame(title, frame))
    console.print(f"Report: {found.report}")


def _config(path: Path | None, settings: list[str] | None, flags: Mapping[str, object]) -> Config:
    """Return the configuration of a file, then flags, then --set."""
    from cradle_pyro.config import Config

    config = Config.from_toml(path) if path is not None else Config()
    given = [f"{key}={_as_toml(value)}" for key, value in flags.items() if value is not None]
    return config.with_settings([*given, *(settings or [])])


def _as_toml(value: object) -> str:
    import json

    return json.dumps(value)


def _training_summary(posterior: Posterior, out: Path) -> str:
    history = posterior.history
    best = history["val_loss"].min() if "val_loss" in history else history["train_loss"].iloc[-1]
    return (
        f"Wrote {out}: {len(history)} epochs, best validation loss {best:.2f} nats per cell. "
        f"Next: cradle-pyro evaluate {out}"
    )


def app(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0 on success and 2 on a user's mistake."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)

    def show(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, DataWarning):
            console.print(f"[yellow]Warning:[/yellow] {_one_line(message)}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", DataWarning)
        warnings.showwarning = show
        try:
            cli(args=arguments, standalone_mode=True)
        except CradleError as error:
            console.print(f"[red]Error:[/red] {_one_line(error)}")
            return _USER_MISTAKE
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 0
    return 0


def _one_line(message: object) -> str:
    """Return a message on one line, with its brackets shown rather than read as markup."""
    return escape(" ".join(str(message).split()))


def main() -> None:
    """Run the command line and leave with its exit code (the console script)."""
    sys.exit(app())
