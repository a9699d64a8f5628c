"""Starting and supervising ranks: in this process, on this host, over ssh, through Slurm."""
