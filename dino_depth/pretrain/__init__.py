"""DINO-v2 pretraining on depth maps: shards, crops, student and teacher, losses, health, and the probe of encoders."""
