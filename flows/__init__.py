"""Prefect flows: supervision and display of the stages of fm_core, without any computation."""
