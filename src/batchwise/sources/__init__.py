"""Data modules for files as people have them: images in folders, tables, text, data sets of Hugging Face."""
