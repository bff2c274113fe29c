"""One thread for each test process: models this small only get slower with more."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, and for every subprocess
