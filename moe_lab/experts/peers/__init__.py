"""The expert kernels of other projects: `experts=vllm`, `sonic`, `deepgemm`, `flashinfer`, ...

What they have in common is `Peer` (peer.py). A peer reads the same matrices as every other implementation, and sorts
the slots itself, as it would in the project that it comes from.
"""
