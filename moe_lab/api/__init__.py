"""What `import moe_lab` offers for a script or a notebook: runs, sweeps, comparisons."""
