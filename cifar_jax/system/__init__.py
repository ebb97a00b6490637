"""The process and its machine: memory, signals, files and locks, compiled programs."""
