"""Programs of the cluster in the process of a test."""

from loopfm_ray.jobs.embedding import Embedders


def embed_here(tasks, items, num_workers, progress):
    """Write the shards of a materialize job, in place of its Ray Data program."""
    worker = Embedders(tasks)
    for item in items:
        worker(item)
