"""The Fisher kernel that couples sequences, and its structure."""
