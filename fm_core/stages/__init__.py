"""Stages: each is a function RunConfig -> StageResult and a command; they communicate by files.

No stage imports another. preflight, stage_rules, doctor and score_checkpoints are compositions of them.
"""
