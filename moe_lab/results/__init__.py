"""Results: reading records with pandas. Imports no torch."""
