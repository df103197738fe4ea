"""The eleven mistakes of the published code (REFERENCE.md): each has a test that catches it.

Some stand here, others beside the code they concern; the first test finds them all.
"""

from __future__ import annotations

import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import tiny
import torch
from factories import make_batch, make_config, make_pair, make_pool, make_schema, with_partners
from lightning.pytorch.callbacks import Callback
from pyro import distributions as dist
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import cradle_pyro as cp
from cradle_pyro import sites
from cradle_pyro.errors import TrainingError
from cradle_pyro.evaluation.predictive import held_out_density
from cradle_pyro.inference.objectives import CradleELBO, kl_term, partner_term
from cradle_pyro.inference.posterior import draw_latents
from cradle_pyro.model.cradle import cells_plate
from cradle_pyro.model.intervene import run_world
from cradle_pyro.queries.effects import effect_draws
from cradle_pyro.types import Batch


def make_elbo(batch: Batch, *, failing_share: float = 0.5, **settings: Any) -> CradleELBO:
    config = make_config(objective=settings).objective
    return CradleELBO(config, make_pool(batch), failing_share=failing_share)


@pytest.mark.parametrize("number", range(1, 12))
def test_each_mistake_has_a_test(number) -> None:
    pattern = re.compile(rf"^def test_mistake_{number:02d}_", re.MULTILINE)
    files = Path(__file__).parent.glob("test_*.py")
    assert any(pattern.search(file.read_text(encoding="utf-8")) for file in files)


# ---------------------------------------------------------------- 3: the divergence and its scale


def stated_guide(batch: Batch) -> None:
    """q(z) with the mean in `counts` and the standard deviation in `library`."""
    with cells_plate(100, batch):
        normal = dist.Normal(batch.counts, batch.library.unsqueeze(-1))
        pyro.sample(sites.Z_BASAL, normal.to_event(1))


def stated(means: list[float], sds: list[float]) -> Batch:
    zeros = torch.zeros(len(means), 1)
    return Batch(torch.tensor(means)[:, None], zeros, zeros, torch.tensor(sds), zeros[:, :0])


def test_mistake_03_gaussian_divergence_divides_by_the_second_variance() -> None:
    """KL(N(0, 1) || N(2, 0.5)) is 8.81; without that division it comes out as 2.81."""
    first, second = stated([0.0], [1.0]), stated([2.0], [0.5])
    oracle = kl_divergence(Normal(0.0, 1.0), Normal(2.0, 0.5)).item()
    assert oracle == pytest.approx(8.81, abs=0.005)
    assert kl_term(stated_guide, {}, first, second).item() == pytest.approx(oracle)
    pair = second.replace(partner=first, partner_rows=torch.tensor([0]))
    assert partner_term(stated_guide, {}, pair).item() == pytest.approx(oracle)


def test_mistake_03_divergence_is_a_mean_over_cells_like_the_bound() -> None:
    means, sds = [0.0, 1.0, -2.0], [1.0, 0.3, 2.0]
    first, second = stated(means, sds), stated([2.0] * 3, [0.5, 1.0, 1.5])
    q, p = (Normal(b.counts[:, 0], b.library) for b in (first, second))
    expected = kl_divergence(q, p).mean().item()
    for copies in (1, 4):
        rows = torch.arange(3).repeat(copies)
        many, others = first.take(rows), second.take(rows)
        assert kl_term(stated_guide, {}, many, others).item() == pytest.approx(expected)
        pair = others.replace(partner=many, partner_rows=torch.arange(3 * copies))
        assert partner_term(stated_guide, {}, pair).item() == pytest.approx(expected)


# ------------------------------------------------------------------- 4: one world, not two worlds


class Recorder(pyro.poutine.messenger.Messenger):
    """Collects the values that each run of a program gives its global sites."""

    names = (sites.EFFECT_MASK, sites.EFFECT, sites.ARTIFACT_EFFECT, sites.GENE_EFFECT)

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, list[Tensor]] = {name: [] for name in self.names}

    def _pyro_post_sample(self, message: dict[str, Any]) -> None:
        if message["name"] in self.values:
            self.values[message["name"]].append(message["value"].detach())


@pytest.mark.parametrize("term", ["sleep", "kl", "partner"])
def test_mistake_04_both_passes_share_one_draw_of_the_globals(term) -> None:
    schema = make_schema()
    model, guide = make_pair(schema)
    batch = with_partners(make_batch(schema))
    recorder = Recorder()
    make_elbo(batch, counterfactual=term).terms(recorder(model), recorder(guide), batch)
    for name, values in recorder.values.items():
        assert len(values) >= 3, name
        assert all(torch.equal(value, values[0]) for value in values), name


# ------------------------------------------------------------------ 5: class weights, flags at work


def test_mistake_05_a_batch_without_failing_cells_has_a_reconstruction_loss() -> None:
    schema = make_schema()
    model, guide = make_pair(schema)
    cells = make_batch(schema)
    passing = cells.take(torch.arange(0, 10, 2))
    assert not passing.artifact.any()
    terms = []
    for balance in (False, True):
        torch.manual_seed(0)
        objective = make_elbo(cells, failing_share=0.2, balance_failing=balance)
        terms.append(objective.terms(model, guide, passing)[sites.COUNTS])
    assert terms[0] > 1
    torch.testing.assert_close(terms[1], terms[0] * 0.5 / 0.8)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_mistake_05_class_weights_are_positive_with_mean_one_however_many_flags(share) -> None:
    cells = make_batch(make_schema(n_artifacts=6), n_cells=1000)
    failing = (cells.artifact > 0).any(-1)
    rows = [failing.nonzero().ravel(), (~failing).nonzero().ravel()]
    sizes = round(400 * share), 400 - round(400 * share)
    batch = cells.take(torch.cat([r[:n] for r, n in zip(rows, sizes, strict=True)]))
    weights = make_elbo(cells, failing_share=share, balance_failing=True)._class_weights(batch)
    assert (weights > 0).all()
    assert weights.mean().item() == pytest.approx(1, rel=1e-3)


def test_mistake_05_each_flag_does_something_of_its_own() -> None:
    schema = make_schema(n_artifacts=3)
    model, guide = make_pair(schema)
    batch = make_batch(schema)
    latents = draw_latents(guide, batch)
    acts = [torch.zeros_like(batch.artifact) for _ in range(4)]
    for flag in range(3):
        acts[flag + 1][:, flag] = 1.0
    rates = [run_world(model, batch, latents, {sites.ARTIFACT: a})[sites.RATE] for a in acts]
    for i in range(4):
        for j in range(i):
            assert (rates[i] - rates[j]).abs().max() > 1e-3


# -------------------------------------------------------------- 8: arms share their random numbers


def test_mistake_08_arms_share_cells_and_noise_and_the_callers_state_is_kept() -> None:
    posterior = tiny.shared_fit()
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002 (the global state is what is tested)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    label = posterior.schema.perturbations[0]
    draws = effect_draws(posterior, ["control", label, label], draws=4)
    table = cp.average_effect(posterior, label, draws=4)
    again = cp.average_effect(posterior, label, draws=4)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    # Control against control is exactly nothing only if both arms use the same draws.
    assert not draws[:, 0].any()
    assert draws[:, 1].any()
    np.testing.assert_array_equal(draws[:, 1], draws[:, 2])
    assert table.equals(again)
    assert (table["ci_low"] <= table["ci_high"]).all()


# ------------------------------------------------------------- 10: what was hidden or crashed there


class Spoil(Callback):
    """Makes a parameter infinite at the second step."""

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:
            with torch.no_grad():
                pl_module.model.decoder.bias[0] = float("inf")


@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")
def test_mistake_10_a_loss_that_is_not_finite_stops_training() -> None:
    with pytest.raises(TrainingError, match=r"not finite at step 1 .*counts.*model\.decoder\.bias"):
        tiny.make_fit("train.max_epochs=2", callbacks=[Spoil()])


@pytest.mark.parametrize(
    "settings",
    [
        ("guide.family=mean_field",),
        ("objective.particles=1",),
        ("objective.particles=3",),
        ("data.artifact=none",),
        ("data.artifact=none", "guide.family=mean_field", "objective.counterfactual=partner"),
    ],
)
def test_mistake_10_settings_that_crashed_train_and_are_scored(settings) -> None:
    posterior = tiny.make_fit(*settings)
    assert np.isfinite(posterior.history["train_loss"]).all()
    cells = tiny.make_data(*settings).where(split="test").subset(np.arange(10))
    density = held_out_density(posterior, cells, global_draws=2, particles=2)
    assert density.shape == (10,)
    assert np.isfinite(density).all()


def test_mistake_10_a_setting_of_false_is_false() -> None:
    config = cp.Config().with_settings(["model.artifact_risk=false", "model.depth_shift=False"])
    assert config.model.artifact_risk is False
    assert config.model.depth_shift is False


# -------------------------------------------------------- 11: needs, waste and what is written down


def test_mistake_11_a_run_holds_no_pickle_and_loads_without_one(tmp_path, monkeypatch) -> None:
    posterior = tiny.make_fit(checkpoint_dir=tmp_path / "run" / "checkpoints")
    run = posterior.save(tmp_path / "run")
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"model.safetensors", "last.ckpt"} <= {path.name for path in files}
    for path in files:
        head = path.read_bytes()[:2]
        assert head != b"PK", path  # what torch.save writes
        assert head[:1] != b"\x80", path  # the first byte of every pickle since protocol 2

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    for module in (pickle, torch):
        monkeypatch.setattr(module, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    loaded = cp.load(run)
    assert tiny.parameters(loaded) == tiny.parameters(posterior)


def test_mistake_11_a_cpu_is_enough(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    posterior = tiny.make_fit()
    assert posterior.device == torch.device("cpu")
    assert not {"cupy", "cudf", "cuml", "rapids_singlecell"} & set(sys.modules)


@pytest.mark.parametrize(("term", "expected"), [("none", 1), ("partner", 1), ("sleep", 2)])
def test_mistake_11_a_step_decodes_once_and_once_more_only_to_generate(term, expected) -> None:
    schema = make_schema()
    model, guide = make_pair(schema)
    batch = with_partners(make_batch(schema))
    calls: list[nn.Module] = []
    model.decoder.register_forward_hook(lambda module, *_: calls.append(module))
    make_elbo(batch, counterfactual=term).terms(model, guide, batch)
    assert len(calls) == expected
