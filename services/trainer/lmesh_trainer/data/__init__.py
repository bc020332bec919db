"""Datasets: files to rows of token ids with a weight each, and rows to packs."""
