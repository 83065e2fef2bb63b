"""A step taken apart on GPUs: kernels, GEMMs, links."""
