"""Knowledge graph embedding: triples, backbones, losses, negatives, filtered ranks and training."""
