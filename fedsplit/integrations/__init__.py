"""Thin ties to other trainers, imported by the scripts that use them."""
