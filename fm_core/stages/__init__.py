"""The stages: each is a function RunConfig -> StageResult and a command. They meet in the run directory.

No stage imports another. preflight, doctor and score_checkpoints are compositions of them.
"""
