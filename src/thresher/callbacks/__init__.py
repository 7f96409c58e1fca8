"""What happens around training: one callback, or one kind of callback, a file."""
