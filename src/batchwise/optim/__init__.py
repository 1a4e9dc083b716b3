"""The learning rate follows the batch."""
