"""`--stage data`: from the report's sources to checked, mixed preference pairs."""
