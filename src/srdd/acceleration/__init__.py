"""Kernels and arithmetic for drawing that are faster than the defaults of torch and diffusers."""
