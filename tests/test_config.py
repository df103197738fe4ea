"""Configuration: defaults, TOML, settings, and the files in configs/."""

from __future__ import annotations

import tomllib

import pytest
from conftest import ROOT

from cradle_pyro.config import (
    Config,
    GeneEffectConfig,
    KLTerm,
    NetworkConfig,
    PartnerTerm,
    SleepTerm,
)
from cradle_pyro.errors import ConfigError

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
SCREENS = {
    "papalexi": "papalexi2021_eccite.h5ad",
    "norman_panel": "norman2019_crispra_combos.h5ad",
    "gasperini": "gasperini2019_highmoi.h5ad",
    "kang": "kang2018_pbmc_ifnb.h5ad",
}
# Latents, mask probability, beta, learning rate, split: the published table, written out.
PUBLISHED = {
    "norman": (200, 0.01, 0.5, 3e-4, "combinations"),
    "dixit": (200, 0.01, 0.5, 3e-4, "combinations"),
    "adamson": (100, 0.001, 0.1, 1e-4, "cells"),
    "replogle": (200, 0.001, 0.05, 1e-3, "cells"),
}


def read(name):
    return Config.from_toml(ROOT / "configs" / f"{name}.toml")


def keys(values, prefix=""):
    """Return every leaf of a nested mapping as section.key."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


# ------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["model.gene_effect=none", "data.layer=counts", "data.n_top_genes=500"],
        ["objective.counterfactual=partner", 'data.covariate_keys=["batch", "donor"]'],
        ["objective.counterfactual=none", "qc.counts_key=n_counts_full"],
        ["objective.counterfactual.kind=kl", "objective.counterfactual.flip_artifact=0.25"],
        ['split.held_out=["A+B"]', "train.learning_rate=3e-4", 'data.control="non-targeting"'],
    ],
)
def test_toml_reads_back_unchanged(tmp_path, settings):
    config = Config().with_settings(settings)
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert Config.from_toml(path) == config


def test_toml_spells_out_every_setting():
    written = set(keys(tomllib.loads(Config().to_toml())))
    assert {"model.gene_effect.spike_scale", "objective.counterfactual.kind"} <= written
    assert written == set(keys(Config().model_dump(mode="json")))


def test_a_component_switched_off_is_written_as_none():
    config = Config().with_settings(["model.gene_effect=none", "objective.counterfactual=none"])
    assert config.model.gene_effect is None
    assert config.objective.counterfactual is None
    values = tomllib.loads(config.to_toml())
    assert values["model"]["gene_effect"] == "none"
    assert values["objective"]["counterfactual"] == "none"


def test_configurations_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().train.batch_size = 1


# -------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("setting", "read_value", "expected"),
    [
        ("train.max_epochs=7", lambda c: c.train.max_epochs, 7),
        (" train.max_epochs = 7 ", lambda c: c.train.max_epochs, 7),
        ("train.learning_rate=3e-4", lambda c: c.train.learning_rate, 3e-4),
        ("model.linear_path=false", lambda c: c.model.linear_path, False),
        ("data.library_key=n_counts_full", lambda c: c.data.library_key, "n_counts_full"),
        ('data.library_key="n counts"', lambda c: c.data.library_key, "n counts"),
        ("data.library_key=a=b", lambda c: c.data.library_key, "a=b"),
        ('data.covariate_keys=["batch"]', lambda c: c.data.covariate_keys, ("batch",)),
        ("model.decoder.hidden=8", lambda c: c.model.decoder, NetworkConfig(hidden=8, layers=0)),
        ("model.decoder={hidden=8}", lambda c: c.model.decoder, NetworkConfig(hidden=8)),
        ("objective.counterfactual=kl", lambda c: c.objective.counterfactual, KLTerm()),
        ("objective.counterfactual=partner", lambda c: c.objective.counterfactual, PartnerTerm()),
        (
            "objective.counterfactual.flip_artifact=1",
            lambda c: c.objective.counterfactual,
            SleepTerm(flip_artifact=1.0),
        ),
    ],
)
def test_settings_are_written_as_in_toml(setting, read_value, expected):
    assert read_value(Config().with_settings([setting])) == expected


def test_settings_change_nothing_else_and_later_ones_win():
    changed = Config().with_settings(["train.seed=1", "train.seed=2"])
    assert changed.train.seed == 2
    assert changed.model_copy(update={"train": Config().train}) == Config()


def test_a_setting_switches_a_component_on_again():
    off = Config().with_settings(["model.gene_effect=none"])
    assert off.with_settings(
        ["model.gene_effect.spike_scale=0.5"]
    ).model.gene_effect == GeneEffectConfig(spike_scale=0.5)


@pytest.mark.parametrize("setting", ["train.max_epochs", "=3", "", "train.max_epochs:3"])
def test_a_setting_without_a_value_is_refused(setting):
    with pytest.raises(ConfigError, match=r"Expected section\.key=value"):
        Config().with_settings([setting])


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("train.max_epoch=3", "max_epochs"),
        ("modle.n_latents=3", "model"),
        ("model.decoder.hiden=3", "hidden"),
        ("model.gene_effect.spike_scal=3", "spike_scale"),
        ("objective.counterfactual.flip_artefact=1", "flip_artifact"),
        ("max_epochs=3", "train"),  # nothing is near: the known ones are listed
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(setting, named):
    with pytest.raises(ConfigError, match="Unknown setting") as caught:
        Config().with_settings([setting])
    hint = str(caught.value).partition(";")[2]
    assert named in hint
    assert not hint.endswith("?.")


def test_a_key_of_another_term_is_not_offered_for_the_partner_term():
    partner = {"objective": {"counterfactual": {"kind": "partner", "flip_artifact": 0.5}}}
    with pytest.raises(ConfigError, match="Unknown setting") as caught:
        Config.from_mapping(partner)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("train.max_epochs=0", "train.max_epochs"),
        ("train.learning_rate=-1", "train.learning_rate"),
        ("train.batch_size=many", "train.batch_size"),
        ("split.train=1.5", "split.train"),
        ("model.mask_probability=1", "model.mask_probability"),
        ("model.likelihood=gamma", "model.likelihood"),
        ("model.linear_path=maybe", "model.linear_path"),
        ("objective.counterfactual=dream", "objective.counterfactual"),
        ("model.n_latents=none", "model.n_latents"),
    ],
)
def test_an_impossible_value_is_refused_by_name(setting, key):
    with pytest.raises(ConfigError) as caught:
        Config().with_settings([setting])
    assert key in str(caught.value)
    assert setting.partition("=")[2] in str(caught.value)


def test_files_that_cannot_be_read_say_why(tmp_path):
    with pytest.raises(ConfigError, match="found nothing at"):
        Config.from_toml(tmp_path / "absent.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\nseed = 1")
    with pytest.raises(ConfigError, match="not a valid TOML file"):
        Config.from_toml(broken)
    broken.write_text("[train]\nsede = 1")
    with pytest.raises(ConfigError, match=r"broken\.toml.*did you mean 'seed'"):
        Config.from_toml(broken)


# ------------------------------------------------------------------------------ files in configs/


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_loads_and_explains_itself(path):
    Config.from_toml(path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert "cradle-pyro train" in text


def test_the_default_file_spells_out_the_defaults():
    """To bring it up to date: change the value, or add the key, that the difference shows."""
    path = ROOT / "configs" / "default.toml"
    written = tomllib.loads(path.read_text(encoding="utf-8"))
    assert Config.from_mapping(written).model_dump() == Config().model_dump()
    assert set(keys(written)) == set(keys(Config().model_dump(mode="json")))


def test_there_is_a_file_for_every_published_and_shared_screen():
    assert {path.stem for path in CONFIGS} == {"default", "smoke", *PUBLISHED, *SCREENS}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_hold_the_published_settings(name):
    config = read(name)
    n_latents, mask_probability, beta, learning_rate, split = PUBLISHED[name]
    model, guide, train = config.model, config.guide, config.train
    assert (model.n_latents, model.mask_probability) == (n_latents, mask_probability)
    assert (model.effect_scale, model.likelihood, model.combine) == (1.0, "nb", "concat")
    assert model.decoder == NetworkConfig(hidden=400, layers=2)
    assert guide.encoder == NetworkConfig(hidden=400, layers=1)
    assert guide.effect_encoder == NetworkConfig(hidden=400, layers=4)
    assert guide.family == "structured"
    assert (config.objective.beta, config.objective.particles) == (beta, 5)
    assert isinstance(config.objective.counterfactual, PartnerTerm)
    assert train.learning_rate == train.effect_learning_rate == learning_rate
    assert (train.batch_size, train.max_epochs, train.patience) == (512, 2000, 50)
    assert (train.gradient_clip, train.weight_decay) == (100.0, 1e-6)
    assert train.schedule == "constant"
    assert (config.split.method, config.split.seed) == (split, 0)
    assert (config.split.train, config.split.validation) == (0.64, 0.16)
    assert config.split.held_out_fraction == 0.25


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_switch_off_what_was_not_published(name):
    config = read(name)
    assert config.data.artifact == "any"
    assert config.model.gene_effect is None
    assert config.model.n_artifact_latents == 0
    assert config.model.latent_effect
    assert not config.model.artifact_risk
    assert not config.model.depth_shift
    assert not config.model.linear_path
    assert not config.objective.balance_failing


@pytest.mark.parametrize("name", SCREENS)
def test_files_of_shared_screens_name_columns_that_exist(name, screens):
    import h5py

    config = read(name)
    with h5py.File(screens / SCREENS[name]) as file:
        columns = set(file["obs"]) - {"__categories"}
    named = {config.data.perturbation_key, *config.data.covariate_keys}
    named |= {config.data.library_key, config.qc.counts_key}
    named |= {config.qc.genes_key, config.qc.pct_mito_key}
    assert named - {None} <= columns
    # A panel's own counts are no library and no QC metric.
    has_full = "n_counts_full" in columns
    assert config.data.library_key == ("n_counts_full" if has_full else None)
    assert config.qc.counts_key == ("n_counts_full" if has_full else None)
    assert config.qc.doublets == (not has_full)


def test_screens_are_split_and_scored_as_their_designs_ask():
    assert read("gasperini").evaluation.grouping == "marginal"
    assert read("papalexi").evaluation.grouping == "label"
    panel = read("norman_panel").split
    assert panel.method == "combinations"
    assert "KLF1+MAP2K6" in panel.held_out
