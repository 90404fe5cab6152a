"""Routers: which experts each token goes to, and with what weight."""
