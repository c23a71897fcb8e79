"""What a run needs around the method: settings, checkpoints on disk, memory, several processes."""
