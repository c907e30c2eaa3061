"""What a run's figures say: significance over seeds, parts of the test set, where the gain comes from."""
