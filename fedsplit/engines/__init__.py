"""Flower's two engines."""
