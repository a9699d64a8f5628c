"""Plots, image grids, tables, HTML pages and model cards. Independent of experiments."""
