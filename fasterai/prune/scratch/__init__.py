"""Pruning from scratch: gates on frozen random weights, the widths that they ask for, and a fresh network of these widths."""
