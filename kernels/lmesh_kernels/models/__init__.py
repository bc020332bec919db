"""Configs, decoders and their weights."""
