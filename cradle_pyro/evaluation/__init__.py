"""Reference effects from held-out cells, their ceilings, and scores as functions of arrays."""
