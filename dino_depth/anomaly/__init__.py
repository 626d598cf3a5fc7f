"""Anomaly detection and 3D localisation from frozen encoders: samples, features, heads, volumes, exact metrics."""
