"""Questions to a posterior: effects of interventions, latents, cells in other worlds."""
