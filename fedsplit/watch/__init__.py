"""People looking on: the terminal, the trackers, the plot."""
