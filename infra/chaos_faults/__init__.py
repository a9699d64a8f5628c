"""Parts of the chaos test, `python infra/chaos.py`."""
