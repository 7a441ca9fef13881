"""One training loop for every stage, with or without Ray."""
