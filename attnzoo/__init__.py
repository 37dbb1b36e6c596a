"""attnzoo: attention variants written once, trained under DeepSpeed, served on Ray Serve."""

__version__ = "0.1.0"
