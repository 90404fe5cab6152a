"""From words to a checked configuration. Imports no torch."""
