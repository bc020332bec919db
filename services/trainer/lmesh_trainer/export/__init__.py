"""What a job made, in the forms that others read; each is read back and compared before it counts."""
