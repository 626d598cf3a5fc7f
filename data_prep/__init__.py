"""From raw datasets to depth maps to shards, and synthetic raw datasets in the real on-disk layouts."""
