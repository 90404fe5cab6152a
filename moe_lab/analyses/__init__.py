"""What recorded routes say: traces of other programs, and analyses of a trace, their tables, plots and page.

Imports no torch (but to read another program's `.pt`), so that a trace is analysed where no model runs. The file itself
is records/trace.py; runs/trace.py records it.
"""
