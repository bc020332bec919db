"""Modules over ops; the attention backend is injected."""
