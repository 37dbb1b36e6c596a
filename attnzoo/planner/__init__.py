"""What fits: memory of training and serving on so many chips, and the least time a step takes."""
