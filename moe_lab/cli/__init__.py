"""The command line: talks to people, and composes nothing and times nothing itself. No run depends on it."""
