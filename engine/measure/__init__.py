"""What this machine costs: start-up measurement, profiles on disk, identity of weights."""
