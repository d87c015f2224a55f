"""Online half: shards to batches on the device."""
