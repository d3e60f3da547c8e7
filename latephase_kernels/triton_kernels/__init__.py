"""Triton implementations of the ops, one file an op; `ops/registry.py` imports a file at its op's first call."""
