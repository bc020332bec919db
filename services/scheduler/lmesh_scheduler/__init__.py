"""The control plane: admission, placement, the state of every request."""
