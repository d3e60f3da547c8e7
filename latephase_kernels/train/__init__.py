"""Training programs behind the command line."""
