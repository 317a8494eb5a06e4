"""Bytes that survive a kill: files, checkpoints, payloads."""
