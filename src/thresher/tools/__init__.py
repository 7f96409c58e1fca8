"""Commands beside training and evaluation; none of them imports another."""
