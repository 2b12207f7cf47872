"""Checkpoints of ``torch.distributed.checkpoint``: tensors in chunks, spread over files."""
