"""The directory that a client and its trainer share."""
