"""What a batch is. Knows torch; knows nothing of tasks, models or the command line."""
