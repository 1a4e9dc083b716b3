"""Your project: the data, the network, the task and the callbacks that you train."""
