"""The Serve application that `serve build serve.app:build_app` and the deployment files name.

Its arguments are those of `ServeConfig`: `serve run serve.app:build_app bundle=FOLDER online=FOLDER`.
"""

from ray.serve import Application

from loopfm_ray.jobs.serving import ServeConfig
from loopfm_ray.jobs.serving import build_app as _build_app

__all__ = ["build_app"]


def build_app(args: ServeConfig) -> Application:
    """Return the application of `args`, which Serve has checked against ServeConfig."""
    return _build_app(args)
