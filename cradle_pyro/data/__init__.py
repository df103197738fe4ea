"""From AnnData to batches: reading, checking, encoding, splitting and matching."""
