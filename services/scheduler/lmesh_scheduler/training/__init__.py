"""Training jobs: their states, the trainers that run them, and what becomes of what they made."""
