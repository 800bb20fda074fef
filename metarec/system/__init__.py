"""What every part may use of the machine: devices, threads, tensors, progress, what is installed."""
