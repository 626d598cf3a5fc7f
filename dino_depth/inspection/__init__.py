"""Inspection of one's own parts: good parts to a model, unlabelled scans to decisions, defects in millimetres."""
