"""What is measured and quoted: `python -m benchmarks.NAME` (README.md lists them)."""
