"""Tokens by NVIDIA's NIXL-EP kernels, whose buffer gains and loses ranks while it lives."""
