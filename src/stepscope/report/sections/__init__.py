"""The sections of the page: one file each, with its figures, its tables and its sentences."""
