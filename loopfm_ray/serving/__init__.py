"""The scoring contract, its features, the predictor, bundles and parity."""
