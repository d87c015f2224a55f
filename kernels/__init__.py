"""Fused CUDA kernels of the distillation losses and the detector's pooling, each beside a torch implementation.

attention_kd, generative_kd and boundary_max_pool, one file each, are registered with torch as genkd::NAME when their
file is imported; backend.select says which implementation runs.
"""
