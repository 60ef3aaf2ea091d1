"""Sources of text: Hugging Face datasets, files, docstrings; and the HTTP and retry code that they share."""
