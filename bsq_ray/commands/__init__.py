"""The functions behind `bsq-ray`: each parses, calls one function of the package, and prints."""
