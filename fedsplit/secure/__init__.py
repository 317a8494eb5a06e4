"""Sums of updates without single updates: SecAgg+ (Bell et al., 2020), and what a rank keeps on its disk meanwhile."""
