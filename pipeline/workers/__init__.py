"""What the processes of a training stage do; one file a stage."""
