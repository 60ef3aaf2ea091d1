"""Sources of text: named datasets, files, docstrings, and the network code they share."""
