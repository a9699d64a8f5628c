"""Launching and supervision of ranks: in this process, on this host, over ssh, through Slurm."""
