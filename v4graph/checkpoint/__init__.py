"""Checkpoints: opened by memory map, checked, bound to graph inputs, packed, and made at random."""

from v4graph.checkpoint.model import Checkpoint

__all__ = ["Checkpoint"]
