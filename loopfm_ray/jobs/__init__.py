"""Ray programs: they move data and decide nothing."""
