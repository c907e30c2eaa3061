"""Binary, grouped and calibration metrics, gain and transfer ratio."""
