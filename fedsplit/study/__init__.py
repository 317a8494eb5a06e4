"""Many runs as one experiment: which there are to be, and what they came to."""
