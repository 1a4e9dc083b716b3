"""Data modules for data as people have it: images in folders, tables, text, data sets of Hugging Face."""
