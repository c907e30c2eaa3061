"""The foundation model, the vertical models, the bottleneck between them, and their layers."""
