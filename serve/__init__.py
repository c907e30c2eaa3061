"""Deployments of the scoring service on Ray Serve."""
