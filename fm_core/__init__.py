"""Flow matching: every stage of the pipeline, as functions and as commands, without Prefect."""
