"""Sweeps: the search space, the durable study, and what a trial is measured by."""
