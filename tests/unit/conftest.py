"""Unit tests: tiny models on one thread, and no look at any hub."""

import os
import signal

# Before torch is imported. Threads that wait for each other on a busy machine make a tiny model
# forty times slower, and sums in another order are no longer equal.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A shell has what it starts in the background ignore Ctrl-C, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
