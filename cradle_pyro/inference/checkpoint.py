"""Run directories and resume checkpoints: safetensors, JSON, TOML and CSV, never pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import tomllib
import warnings
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from lightning.fabric.plugins import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cradle_pyro.config import Config
from cradle_pyro.errors import CheckpointError, ConfigError, DataWarning, shown
from cradle_pyro.inference.pair import PairBuilder, build_pair, pair_name
from cradle_pyro.inference.posterior import Posterior, ReferenceCells
from cradle_pyro.model.cradle import Cradle
from cradle_pyro.model.guides import CradleGuide
from cradle_pyro.types import Schema, Statistics

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "FORMAT_VERSION",
    "SafeCheckpointIO",
    "last_checkpoint",
    "load",
    "read_checkpoint",
    "save",
]

FORMAT_VERSION = 5
_CONFIG, _MANIFEST = "config.toml", "manifest.json"
_WEIGHTS, _HISTORY = "model.safetensors", "history.csv"
_VERSIONS = ("cradle-pyro", "torch", "pyro-ppl", "anndata", "scanpy", "numpy", "lightning")


def save(posterior: Posterior, path: str | Path) -> Path:
    """Write a run directory and return its path.

    Files are staged beside their place and moved there one by one, the manifest last: without a
    manifest that fits the weights a directory is not a run, so nothing half-written ever loads.
    Other content of the directory (checkpoints, metrics) is kept.

    Raises
    ------
    CheckpointError
        If the directory cannot be written, for example because the disk is full, or the pair is not
        one that can be built again.
    """
    path = Path(path)
    _check_rebuildable(posterior)
    staging = None
    try:
        path.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=path))
        _write_tensors(_tensors(posterior), staging / _WEIGHTS)
        (staging / _CONFIG).write_text(posterior.config.to_toml(), encoding="utf-8")
        posterior.history.to_csv(staging / _HISTORY, index=False)
        manifest = _manifest(posterior, weights_sha256=_sha256(staging / _WEIGHTS))
        (staging / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        (path / _MANIFEST).unlink(missing_ok=True)
        for name in (_WEIGHTS, _CONFIG, _HISTORY, _MANIFEST):
            os.replace(staging / name, path / name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Could not write the run directory '{path}': {error}. Nothing there is a loadable run "
            "until writing succeeds; free space or choose another --out."
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return path


def load(
    path: str | Path, *, pair: PairBuilder | None = None, device: torch.device | str = "cpu"
) -> Posterior:
    """Return the posterior of a run directory; no training data are needed.

    Parameters
    ----------
    path
        A directory written by :meth:`Posterior.save` or ``cradle-pyro train``.
    pair
        What built the edited pair of this run, as in :func:`~cradle_pyro.fit`. A run directory
        holds its name, never its code.
    device
        Where to put the pair.

    Raises
    ------
    CheckpointError
        If the directory is missing, incomplete, damaged, or of a later format, or was trained with
        an edited pair and `pair` is missing or another one.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    _check_pair(path, manifest.get("pair"), pair_name(pair))
    try:
        config = Config.from_toml(path / _CONFIG)
        history = pd.read_csv(path / _HISTORY) if (path / _HISTORY).stat().st_size > 1 else None
        tensors = load_file(path / _WEIGHTS)
    except (OSError, SafetensorError, ConfigError, tomllib.TOMLDecodeError) as error:
        raise CheckpointError(f"The run directory '{path}' is damaged: {error}") from error
    try:
        schema = _schema(manifest["schema"])
        n_cells = int(manifest["n_train_cells"])
        statistics = Statistics(n_cells=n_cells, **_section(tensors, "statistics"))
        model, guide = build_pair(schema, config, statistics, seed=0, pair=pair)
        model.load_state_dict(_section(tensors, "model"))
        guide.load_state_dict(_section(tensors, "guide"))
        return Posterior(
            model=model.to(device).eval(),
            guide=guide.to(device).eval(),
            schema=schema,
            config=config,
            statistics=statistics,
            reference=ReferenceCells(**_section(tensors, "reference")),
            history=pd.DataFrame() if history is None else history,
            labels=pd.DataFrame(manifest["labels"]),
            failing_artifacts=_section(tensors, "failing")["artifacts"],
            facts=manifest["facts"],
            pair=pair,
        )
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"The run directory '{path}' is damaged: {_WEIGHTS}, {_CONFIG} and {_MANIFEST} do not "
            f"fit together ({str(error).splitlines()[0]}). Copy the run again, or retrain."
        ) from error


def _check_rebuildable(posterior: Posterior) -> None:
    """Raise for a pair that was changed after it was built: weights do not tell how."""
    parts = (posterior.model, posterior.guide)
    if posterior.pair is None:
        built = [type(part) for part in parts] == [Cradle, CradleGuide]
    else:
        built = all(isinstance(part, nn.Module) for part in parts)
    if not built:
        found = ", ".join(getattr(part, "__name__", type(part).__name__) for part in parts)
        raise CheckpointError(
            f"Expected the pair that was trained, found another one ({found}). A run directory "
            "holds weights and names, no code: train with fit(..., pair=builder), which load(..., "
            "pair=builder) builds again, or save the pair before changing it."
        )


def _check_pair(path: Path, trained: str | None, given: str | None) -> None:
    if trained == given:
        return
    if given is None:
        raise CheckpointError(
            f"'{path}' was trained with an edited pair, built by {trained}. Load it in Python and "
            "name what builds it: load(path, pair=...)."
        )
    if trained is None:
        raise CheckpointError(
            f"'{path}' was trained with the standard pair, not with {given}. Leave out pair=."
        )
    warnings.warn(
        f"'{path}' was trained with a pair built by {trained} and is loaded with {given}; make "
        "sure that they are the same.",
        DataWarning,
        stacklevel=3,
    )


def _tensors(posterior: Posterior) -> dict[str, Tensor]:
    parts: dict[str, Mapping[str, Tensor]] = {
        "model": posterior.model.state_dict(),
        "guide": posterior.guide.state_dict(),
        "reference": posterior.reference._asdict(),
        "failing": {"artifacts": posterior.failing_artifacts},
        "statistics": {
            name: value
            for name, value in posterior.statistics._asdict().items()
            if isinstance(value, Tensor)
        },
    }
    return {
        f"{part}/{name}": value.detach().cpu().contiguous().clone()
        for part, values in parts.items()
        for name, value in values.items()
    }


def _write_tensors(
    tensors: dict[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file that others may read as any new file of this user's."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)  # replaces the file by one that is private
    path.chmod(mode)


def _section(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = f"{part}/"
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _manifest(posterior: Posterior, *, weights_sha256: str) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "versions": {name: _version(name) for name in _VERSIONS},
        "weights_sha256": weights_sha256,
        "pair": pair_name(posterior.pair),
        "n_train_cells": posterior.statistics.n_cells,
        "schema": dataclasses.asdict(posterior.schema),
        "labels": posterior.labels.to_dict("list"),
        "facts": dict(posterior.facts),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _read_manifest(path: Path) -> dict[str, Any]:
    if not (path / _MANIFEST).is_file():
        raise CheckpointError(
            f"Expected a run directory with {_MANIFEST}, found none at '{path}'. "
            "Give the directory that `cradle-pyro train --out` wrote."
        )
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format_version"]
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"'{path}' has format {version}; this version of cradle-pyro reads up to "
                f"{FORMAT_VERSION}. Update cradle-pyro."
            )
        if version < FORMAT_VERSION:
            raise CheckpointError(
                f"'{path}' has format {version}, of an earlier version with other parameters (now "
                f"{FORMAT_VERSION}). Train it again."
            )
        expected = manifest["weights_sha256"]
        found = _sha256(path / _WEIGHTS)
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"The run directory '{path}' is damaged: {error}") from error
    if found != expected:
        raise CheckpointError(
            f"The run directory '{path}' is damaged: {_WEIGHTS} is not the file that {_MANIFEST} "
            "describes (truncated or replaced). Copy the run again, or retrain."
        )
    return manifest


def _schema(values: Mapping[str, Any]) -> Schema:
    covariates = tuple((name, tuple(levels)) for name, levels in values["covariates"])
    names = {key: tuple(values[key]) for key in ("genes", "perturbations", "artifacts")}
    return Schema(**(dict(values) | names | {"covariates": covariates}))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class SafeCheckpointIO(CheckpointIO):
    """Lightning checkpoints as one safetensors file: tensors, and the rest as JSON metadata."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object | None = None
    ) -> None:
        """Write `checkpoint` atomically.

        Raises
        ------
        CheckpointError
            If it cannot be written, for example because the disk is full.
        """
        tensors: dict[str, Tensor] = {}
        structure = json.dumps(_pack(checkpoint, tensors))
        path = Path(path)
        staging = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_tensors(tensors, staging, metadata={"structure": structure})
            os.replace(staging, path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"Could not write the checkpoint '{path}': {error}. Free space, then go on with "
                "--resume from the last one that was written."
            ) from error
        finally:
            with suppress(OSError):
                staging.unlink(missing_ok=True)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable | None = None,
        weights_only: bool | None = None,  # noqa: FBT001 (Lightning's signature)
    ) -> dict[str, Any]:
        """Read a checkpoint onto the CPU."""
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return what :class:`SafeCheckpointIO` wrote.

    Raises
    ------
    CheckpointError
        If the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            structure = json.loads(file.metadata()["structure"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"The checkpoint '{path}' is missing or damaged: {error}") from error
    return _unpack(structure, tensors)


def last_checkpoint(directory: Path, state: Mapping[str, Tensor]) -> Path:
    """Return the checkpoint to resume from.

    Parameters
    ----------
    directory
        Where checkpoints are kept.
    state
        Parameters and buffers of the pair that is to go on, by name.

    Raises
    ------
    CheckpointError
        If there is none, or it is of another model.
    """
    path = directory / "last.ckpt"
    if not path.is_file():
        raise CheckpointError(
            f"Expected a checkpoint to resume from at '{path}', found none. "
            "Leave out --resume to start anew."
        )
    shapes = {name: value.shape for name, value in read_checkpoint(path)["state_dict"].items()}
    expected = {name: value.shape for name, value in state.items()}
    if shapes != expected:
        different = sorted(
            name for name in shapes | expected if shapes.get(name) != expected.get(name)
        )
        raise CheckpointError(
            f"The checkpoint '{path}' is of another model or screen: {shown(different)} differ. "
            "Resume with the configuration and data it was trained with, or start anew without "
            "--resume."
        )
    return path


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return `value` as JSON; tensors go to `tensors`, odd keys and tuples are spelled out."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"items": [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_pack(item, tensors) for item in value]}
    if isinstance(value, list | set):
        return [_pack(item, tensors) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"A checkpoint cannot hold a {type(value).__name__}: {value!r}.")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_unpack(item, tensors) for item in content)
    return {_unpack(key, tensors): _unpack(item, tensors) for key, item in content}
