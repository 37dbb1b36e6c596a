"""Estimates the memory of training and serving on a number of chips, and the shortest time of a step."""
