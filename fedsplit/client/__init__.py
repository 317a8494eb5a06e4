"""One relay between the server and the exchange directory."""
