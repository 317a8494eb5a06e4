"""Thin ties to other libraries; each module is imported only by who uses it, and none by `fedsplit` itself.

``ddp`` is imported by `Trainer` where a process group is initialised; ``lightning`` and ``transformers`` by the script.
"""
