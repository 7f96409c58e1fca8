"""Networks: built dense, then given their attention."""
