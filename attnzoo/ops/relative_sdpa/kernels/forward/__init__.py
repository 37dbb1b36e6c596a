"""The parallel form, forward."""
