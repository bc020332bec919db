"""Questions that need torch, answered by processes of their own."""
