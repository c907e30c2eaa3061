"""Events in, batches out: schemas, readers, negatives, splits, point-in-time features."""
