"""Asks, waits, merges."""
