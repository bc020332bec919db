"""Published adapters: which there are, and which worker holds which."""
