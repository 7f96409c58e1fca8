"""What a network looked at in one example: attention maps by layer and head, and what of them matters."""
