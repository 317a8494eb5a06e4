"""Flower's deployment engine, started for the user."""
