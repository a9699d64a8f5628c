"""Plots, image grids, tables, HTML pages and model cards, independent of experiments."""
