"""loopfm_ray: the knowledge of one large recommendation model in many small ones, right about time."""

__version__ = "0.1.0"

__all__ = ["__version__"]
