"""Logging set-up. Only the command line, Ray workers and Serve replicas call `setup`."""

import logging
import sys

__all__ = ["setup"]

_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


def setup(level: str = "INFO") -> None:
    """Send this package's records at `level` and above to standard error, once."""
    logger = logging.getLogger("loopfm_ray")
    logger.setLevel(level)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
