"""Keeps Flower from calling home. Import this before anything of Flower, which reads these when it is imported.

Nothing leaves the machine unless the user's environment asks for it.
"""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
