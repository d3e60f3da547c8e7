"""The mathematics of every op in plain PyTorch: what the backends are tested against, and the fallback."""
