"""CRADLE in Pyro: perturbation effects of single-cell CRISPR screens, artifacts disentangled."""
