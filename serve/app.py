"""The Serve application that deployment files name as `serve.app:build_app`.

Its arguments are those of `ServeConfig`. With the project's root on the Python path of the cluster:
`serve run serve.app:build_app bundle=FOLDER online=FOLDER`, or `serve deploy serve/vm.yaml`.
"""

from ray.serve import Application

from loopfm_ray.jobs.serving import ServeConfig
from loopfm_ray.jobs.serving import build_app as _build_app

__all__ = ["build_app"]


def build_app(args: ServeConfig) -> Application:
    """Return the application of `args`, which Serve has checked against ServeConfig."""
    return _build_app(args)
