"""One configuration a file; default.py explains every key."""
