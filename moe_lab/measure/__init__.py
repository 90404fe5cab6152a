"""Measuring: clocks, memory, phases, the roofline, routing metrics, the environment."""
