"""Dataset versions on disk, 4-bit codes, the offline history and the online stores."""
