"""Tasks: they own the model, its loss, its optimizer and its metrics."""
