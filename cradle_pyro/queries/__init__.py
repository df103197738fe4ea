"""Questions to a posterior: effects of interventions, profiles of cells in other worlds, latents."""
