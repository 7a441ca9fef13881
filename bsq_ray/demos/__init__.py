"""Demos: from data to results in one command, on two CPU cores."""
