"""A checkpoint of any format in the plain layout: weights, moments and settings."""
