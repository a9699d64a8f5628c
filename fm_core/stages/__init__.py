"""Stages: each is a function RunConfig -> StageResult and a command; they communicate by files.

No stage imports another. preflight, doctor and score_checkpoints are compositions of them.
"""
