"""DINO-v2 pretraining on depth maps: crops, batches, student and teacher, losses, health, and the loop."""
