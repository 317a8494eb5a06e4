"""A model that is cut: its lower part trains at the ranks, its upper part beside the server."""
