"""Unit tests: tiny models on one thread, and no look at any hub."""

import os

# Before torch is imported. Threads that wait for each other on a busy machine make a tiny model
# forty times slower, and sums in another order are no longer equal.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
