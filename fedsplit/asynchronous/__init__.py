"""Rounds in which nobody waits for the slowest: a merge takes the updates that are there."""
