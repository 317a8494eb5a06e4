"""The commands of ``python -m fedsplit``, a module each.

None imports torch, Flower or matplotlib before it has to.
"""
