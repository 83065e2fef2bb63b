"""What is asked of the machine: its GPUs, its processor, its event loop. No torch."""
