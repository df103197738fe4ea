"""The Pyro model and guide pair; nothing here sees an AnnData."""
