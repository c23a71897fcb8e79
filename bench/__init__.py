"""`python -m bench`: speed and memory, beside the libraries that do the same."""
