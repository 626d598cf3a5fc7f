"""What frozen features know of depth maps they have not seen: the probe of encoders, its figures and intervals."""
