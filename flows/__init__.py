"""Prefect flows: they supervise the stages of fm_core and show them; they compute nothing."""
