"""The report over runs, sweeps and studies: tables for the terminal, Markdown and CSV, and a page that one would
attach.
"""
