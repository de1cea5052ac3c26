"""Cloister: an air-gapped LLM serving gateway."""

__version__ = "0.1.0"
