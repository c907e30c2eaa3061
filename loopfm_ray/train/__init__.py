"""Plain torch training: one step, the loop, checkpoints, evaluation."""
