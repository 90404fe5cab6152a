"""Workloads: which tokens come in. A workload is a function `(model, batch, seq_len, seed, device, dtype, phase)`."""
