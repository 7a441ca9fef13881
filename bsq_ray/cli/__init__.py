"""The `bsq-ray` command, one module per command group."""
