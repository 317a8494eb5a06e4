"""What server and clients say inside Flower's messages."""
