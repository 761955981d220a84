"""Cached teachers: logits of a fixed data set, worked out once, in a file, and found by the content of samples."""
