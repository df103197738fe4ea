"""Predictors to compare with: simple ones that a model must beat before it is worth its cost."""
