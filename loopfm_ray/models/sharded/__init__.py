"""Embedding tables whose rows are spread over the processes of a group."""
