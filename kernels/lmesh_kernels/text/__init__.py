"""Everything between text and token ids; torch-free, used by gateway, trainer and CLI."""
