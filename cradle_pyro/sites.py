"""Names of the Pyro sites and plates, in one file, since Pyro ignores a misspelt name."""

from __future__ import annotations

from typing import Final

# Global latents
EFFECT_MASK: Final = "effect_mask"
EFFECT: Final = "effect"
GENE_EFFECT: Final = "gene_effect"
INTERACTION: Final = "interaction"
ARTIFACT_EFFECT: Final = "artifact_effect"
ARTIFACT_RISK: Final = "artifact_risk"
DEPTH_SHIFT: Final = "depth_shift"

# Local latents
Z_BASAL: Final = "z_basal"
Z_ARTIFACT: Final = "z_artifact"

# Structural variables, in causal order
PERTURBATION: Final = "perturbation"
ARTIFACT: Final = "artifact"
PERTURBATION_SHIFT: Final = "perturbation_shift"
ARTIFACT_SHIFT: Final = "artifact_shift"
LIBRARY: Final = "library"
RATE: Final = "rate"
COUNTS: Final = "counts"

# Plates
CELLS: Final = "cells"
PERTURBATIONS: Final = "perturbations"
COMBINATIONS: Final = "combinations"
ARTIFACTS: Final = "artifacts"
