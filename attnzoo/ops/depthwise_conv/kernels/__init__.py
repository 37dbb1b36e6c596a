"""The device side of the depthwise convolution."""
