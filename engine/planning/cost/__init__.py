"""What work costs: the measured table, its correction, predictions. Pure."""
