"""What the commands share: worker processes, finding workers, the networks of the seeds."""
