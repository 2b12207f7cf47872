"""Folders of results read back: every artifact by the class that wrote it, when it is first asked for."""
