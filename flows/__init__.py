"""Prefect flows: supervision and display of the stages of fm_core; nothing is computed here."""
