"""A state_dict as bytes, and its names."""
