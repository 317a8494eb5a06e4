"""What travels in fewer bytes: ``--wire``, its codecs, and the payload that they make."""
