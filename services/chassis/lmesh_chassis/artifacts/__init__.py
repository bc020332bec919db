"""Files by what they hold: datasets, checkpoints, adapters, exports."""
