"""Short programs that use the project from Python."""
