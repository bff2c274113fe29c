"""One thread for each test process: models this small only get slower with more."""

import os

from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, and for every subprocess
settings.register_profile("lmplay", deadline=None)  # a busy machine is no failure
settings.load_profile("lmplay")
