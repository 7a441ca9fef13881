"""Figures of evaluation results: comparison grids, class grids, frame strips."""
