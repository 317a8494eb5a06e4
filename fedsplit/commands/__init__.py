"""The commands of ``python -m fedsplit``, a module each: `add_flags` gives a parser its flags, `run` runs it with them.

None imports torch, Flower or matplotlib before it has to.
"""
