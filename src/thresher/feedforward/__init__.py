"""Feed-forward layers as attention over hidden units."""
