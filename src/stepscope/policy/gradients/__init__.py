"""Gradients: of sums over tokens, along a direction, and of every sequence by itself."""
