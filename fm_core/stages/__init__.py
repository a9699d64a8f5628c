"""Each stage is a function RunConfig -> StageResult and a command; they meet in the run directory."""
