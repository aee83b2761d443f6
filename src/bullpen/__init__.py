"""Bullpen keeps vLLM warmed up and puts any model on your accelerators in seconds."""

__version__ = "0.1.0"
