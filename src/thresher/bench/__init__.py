"""A benchmark that cannot flatter: mechanisms against PyTorch's own attention, checked, interleaved, in one run."""
