"""A screen of a few cells and models of a few units, for tests that train."""

from __future__ import annotations

from functools import cache

from anndata import AnnData

from cradle_pyro.config import Config
from cradle_pyro.data.dataset import CellData
from cradle_pyro.data.prepare import prepare
from cradle_pyro.inference.posterior import Posterior
from cradle_pyro.inference.train import fit
from cradle_pyro.simulate.perturbseq import simulate_perturbseq

N_CELLS, N_GENES = 180, 60

SETTINGS = (
    "data.layer=counts",
    "qc.doublets=false",
    "model.n_latents=3",
    "model.n_artifact_latents=2",
    "model.decoder={hidden=8, layers=1}",
    "guide.encoder={hidden=8, layers=1}",
    "guide.effect_encoder={hidden=8, layers=1}",
    "train.max_epochs=1",
    "train.batch_size=64",
    "evaluation.draws=2",
    "evaluation.n_controls=10",
    "evaluation.density_draws=2",
    "evaluation.density_particles=2",
    "evaluation.n_density_cells=10",
    "evaluation.min_cells=2",
    "evaluation.split_half_repeats=2",
)


def make_config(*settings: str) -> Config:
    return Config().with_settings([*SETTINGS, *settings])


@cache
def _screen(seed: int) -> AnnData:
    return simulate_perturbseq(
        n_cells=N_CELLS,
        n_genes=N_GENES,
        n_perturbations=3,
        n_pairs=1,
        control_share=0.3,
        median_library=500.0,
        seed=seed,
    )


def make_screen(*, seed: int = 0) -> AnnData:
    """Return a simulated screen that the caller may change."""
    return _screen(seed).copy()


@cache
def _data(settings: tuple[str, ...]) -> CellData:
    return prepare(make_screen(), make_config(*settings)).data


def make_data(*settings: str) -> CellData:
    """Return the screen as cells with flags and a split; sections data, qc and split count."""
    return _data(tuple(s for s in settings if s.startswith(("data.", "qc.", "split."))))


def make_fit(*settings: str, data: CellData | None = None, **options) -> Posterior:
    """Return a posterior trained for one epoch, unless the settings say otherwise."""
    data = make_data(*settings) if data is None else data
    return fit(data, make_config(*settings), progress=False, **options)


@cache
def shared_fit() -> Posterior:
    """Return one trained posterior for all tests that only read it."""
    return make_fit("train.max_epochs=2")


def parameters(posterior: Posterior) -> dict[str, list[float]]:
    """Return all parameters and buffers of a pair, as lists that compare exactly."""
    pair = {"model": posterior.model, "guide": posterior.guide}
    return {
        f"{part}.{name}": value.tolist()
        for part, module in pair.items()
        for name, value in module.state_dict().items()
    }
