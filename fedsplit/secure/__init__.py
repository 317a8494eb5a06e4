"""Sums of updates without single updates: SecAgg+ (Bell et al., 2020), as pure functions that do no input or output."""
