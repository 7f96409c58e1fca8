"""Networks: build them dense, then inject their attention."""
