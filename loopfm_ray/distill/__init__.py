"""Losses that pull a vertical model to the foundation model."""
