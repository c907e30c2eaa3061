"""One self-contained HTML page from the records of a run."""
