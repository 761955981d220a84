"""Distillation: small networks that learn from large ones."""
