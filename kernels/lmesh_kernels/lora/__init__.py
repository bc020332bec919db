"""Adapters: where they act, what they hold, their files."""
