"""Plots, image grids, tables, HTML pages and model cards. This package knows no experiment."""
