"""One configuration per file; default.py explains every key."""
