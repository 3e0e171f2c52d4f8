"""What this machine offers a server with host memory, and what is wrong with it."""
