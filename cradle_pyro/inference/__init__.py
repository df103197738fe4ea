"""Objectives, training, the posterior and its persistence."""
