"""Penalties on the units of a model, which drive whole units to zero while it trains."""
